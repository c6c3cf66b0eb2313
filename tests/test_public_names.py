"""The public names of the four packages: all there, typed, and imported when they are asked for."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("selectors", "datamodules", "eval", "trainer")
HEAVY = {"torch", "numpy", "lightning", "open_clip", "pandas", "hydra"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(f"siftclip.{package}")
    assert len(module.__all__) >= 10
    assert dir(module) == sorted(module.__all__)
    for name in module.__all__:
        found = getattr(module, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            assert found.__name__ == name
            assert found.__doc__, name
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = module.NoSuchName


def test_importing_a_package_imports_nothing_heavy() -> None:
    code = f"""
import sys
import {", ".join(f"siftclip.{package}" for package in PACKAGES)}
print(sorted({HEAVY} & sys.modules.keys()))
from siftclip.selectors import ClipScore
assert ClipScore.__module__.startswith("siftclip.selectors.")
assert "lightning" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def targets(node: object) -> list[str]:
    """All `_target_`s in a tree of plain values."""
    if isinstance(node, list):
        return [name for item in node for name in targets(item)]
    if not isinstance(node, dict):
        return []
    here = [str(node["_target_"])] if "_target_" in node else []
    return here + targets(list(node.values()))


def test_configurations_name_public_names() -> None:
    found = set()
    for path in (ROOT / "configs").rglob("*.yaml"):
        found |= set(targets(OmegaConf.to_container(OmegaConf.load(path), resolve=False)))
    public = importlib.import_module("siftclip.selectors").__all__
    assert len(found) > 30
    of_hydra = "siftclip.trainer.cli.typed_credentials.MovesCredentials"  # which makes it itself
    assert found <= {of_hydra, *(f"siftclip.selectors.{name}" for name in public)}
