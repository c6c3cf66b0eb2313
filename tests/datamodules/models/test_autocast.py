"""Our own autocasts have no cache of weights, and nothing opens one past them."""

from __future__ import annotations

import ast

import pytest
import torch
from source_files import sources

from siftclip.datamodules.models.autocast import autocast, no_weight_cache

HELPER = "datamodules/models/autocast.py"
CPU = torch.device("cpu")


def is_free_of_casts(call: ast.Call) -> bool:
    """Whether the autocast is switched off, so that it casts and keeps nothing."""
    switches = [keyword.value for keyword in call.keywords if keyword.arg == "enabled"]
    return any(isinstance(value, ast.Constant) and value.value is False for value in switches)


def test_whatever_opens_an_autocast_takes_ours() -> None:
    found = [
        f"{file}:{node.lineno}: {ast.unparse(node)}"
        for file, tree in sources(but=HELPER)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(("torch.autocast", "amp.autocast"))
        and not is_free_of_casts(node)
    ]
    assert not found, "\n".join(["Use siftclip.datamodules.models.autocast:", *found])


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_there_is_no_cache_inside(dtype: torch.dtype | None) -> None:
    layer = torch.nn.Linear(4, 4)
    with autocast(CPU, dtype):
        assert not torch.is_autocast_cache_enabled()
        assert torch.is_autocast_enabled("cpu") == (dtype is not None)
        assert layer(torch.ones(2, 4)).dtype == (dtype or torch.float32)
    assert torch.is_autocast_cache_enabled()


def interrupted() -> None:
    with no_weight_cache():
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
        raise KeyError


def test_an_autocast_of_others_stays_in_force() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError):
            interrupted()
        assert torch.is_autocast_cache_enabled()  # also after a failure
