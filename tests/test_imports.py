"""Commands import large packages only when something needs them, so that they start fast."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from siftclip import selectors
from siftclip.trainer.cli.main import COMMANDS

SCRIPT = Path(__file__).with_name("imports_of_commands.py")

CONFIGURATION = ("hydra", "omegaconf", "antlr4")
TORCH = ("torch", "numpy")
# Of what a training or an evaluation needs, and nothing before it.
LARGE = (
    *("clip_benchmark", "fsspec", "lightning", "open_clip", "pandas", "pyarrow", "scipy"),
    *("sklearn", "sympy", "timm", "torch._dynamo", "torchmetrics", "torchvision", "transformers"),
    *("wandb", "webdataset"),
)

# Each command with words that it refuses, once the options are composed, before any file is read;
# and a part of what it says then. A new command must be listed.
REFUSED: Mapping[str, tuple[list[str], str]] = {
    "index": ([], "pool.root must name"),
    "embed": ([], "features.model.name must name"),
    "target": (
        ["target.root=nowhere", "features.name=x", "features.model.name=ViT-B-32"],
        "target.root must be a folder",
    ),
    "score": ([], "pool.root must name"),
    "select": ([], "pool.root must name"),
    "train": ([], "pool.root must name"),
    "eval": (["model.name=x", "eval.root=null"], "eval.root must name"),
    "eval watch": ([], "watch.run must name"),
    "eval diff": ([], "diff.a must name"),
    "eval download": ([], "download.folder must name"),
    "export": ([], "export.source must be given"),
    "compare": (["pool.root=nowhere"], "eval.root must name"),
    "data compact": ([], "compact.output must name"),
    "data bench": (["bench.samples=0"], "bench.samples must be"),
    "show": (["show.selection=nowhere"], "must be the name of a subset"),
    "diff": ([], "show.selection and show.other must be given"),
    "report": ([], "report.runs must name"),
    "reproduce": ([], "reproduce.run must name"),
    "subset import": ([], "subset_import.path must name"),
    "subset export": ([], "subset_export.path must name"),
    "subset list": (["output_dir=https://x/y"], "output_dir must be a path"),
    "subset show": ([], "subset_show.name must name"),
    "subset combine": ([], "subset_combine.a must name"),
    "subset verify": ([], "subset_verify.subset must name"),
    "runs list": ([], "must be a folder that commands have written"),
    "runs show": ([], "runs_show.run must name"),
    "runs rm": ([], "runs_rm.run must name"),
    "runs gc": ([], "must be a folder that commands have written"),
    "demo": (["demo.pool_samples=0"], "pool_samples must be"),
}


class Case(NamedTuple):
    """Words of `siftclip`, or `import` and modules; what they must not import, how they end."""

    words: list[str]
    forbidden: Sequence[str]
    status: int = 0
    says: str = ""


def offenders(cases: Sequence[Case], cwd: Path, *, after: Sequence[str] = ()) -> dict[str, Any]:
    """What went wrong, by the words of the case: forbidden modules, or another end."""
    requests = [{"words": case.words, "cwd": str(cwd)} for case in cases]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *after],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    wrong: dict[str, Any] = {}
    for case, answer in zip(cases, json.loads(result.stdout), strict=True):
        imported = sorted(set(answer["modules"]) & set(case.forbidden))
        if imported:
            wrong[" ".join(case.words)] = imported
        elif answer["status"] != case.status or case.says not in answer["printed"]:
            wrong[" ".join(case.words)] = answer["status"], answer["printed"]
    return wrong


@pytest.mark.slow
def test_help_and_options_need_no_torch(tmp_path: Path) -> None:
    everything = (*CONFIGURATION, *TORCH, *LARGE)
    without_torch = (*TORCH, *LARGE)
    bare = [
        Case(["import", "siftclip"], everything),
        Case(["--help"], everything),
        Case(["--version"], everything),
        Case(["data", "--help"], everything),
        Case(["trian"], everything, 2, "Did you mean train?"),
    ]
    composed = [
        Case(["train", "--help"], without_torch),
        Case(["train", "seeds=1"], without_torch, 2, "seeds is not an option"),
        Case(["train", "selector=vsa"], without_torch, 2, "there is no such configuration"),
        Case(["train", "seed"], without_torch, 2, "options are written NAME=VALUE"),
        *(Case([*command.split(), "--cfg", "job"], without_torch) for command in COMMANDS),
    ]
    assert offenders(bare, tmp_path) == {}
    assert offenders(composed, tmp_path, after=["hydra.main"]) == {}


@pytest.mark.slow
def test_checks_and_pools_need_torch_alone(
    tmp_path: Path, make_samples: Callable[..., Any], write_pool: Callable[..., Path]
) -> None:
    assert set(REFUSED) == set(COMMANDS)
    cases = [
        Case([*command.split(), "progress=false", *words], LARGE, 2, says)
        for command, (words, says) in REFUSED.items()
    ]
    modules = [
        module.name for module in pkgutil.walk_packages(selectors.__path__, "siftclip.selectors.")
    ]
    assert "siftclip.selectors.methods.vas" in modules
    write_pool(make_samples(6))
    pool = ["pool.root=pool", "progress=false"]
    cases += [
        Case(["import", *modules], LARGE),
        Case(["train", "loss=siglip", "online=every_step", "pool.root=nowhere"], LARGE, 2),
        Case(["train", "selector=random", "pool.root=nowhere"], LARGE, 2, "options checked"),
        Case(["train", "seed=-1"], LARGE, 2, "seed must be"),
        Case(["train", "pool.root=x", "eval.root=nowhere"], LARGE, 2, "nowhere"),
        # pyarrow only where a pool has tables, fsspec only where it is remote
        Case(["index", *pool], LARGE, 0, "samples    6"),
        Case(["select", *pool, "selector=random", "overlap=false"], LARGE, 0, "random"),
        Case(["score", *pool, "selector=random"], LARGE, 0, "written"),
    ]
    assert offenders(cases, tmp_path, after=["torch", "hydra.main"]) == {}


def test_imports_are_seen(tmp_path: Path) -> None:
    wrong = offenders([Case(["import", "pyarrow"], LARGE)], tmp_path)
    assert wrong == {"import pyarrow": ["pyarrow"]}
