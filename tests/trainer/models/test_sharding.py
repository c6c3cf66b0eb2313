"""FSDP2 on two ranks: which types travel, what stays whole, and steps that are left out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from siftclip.trainer.models.sharding import mixed_precision

SCRIPT = Path(__file__).with_name("sharded_on_ranks.py")


@pytest.mark.parametrize(
    ("precision", "reduced", "param_dtype", "reduce_dtype"),
    [
        ("32-true", torch.float32, None, None),
        ("64-true", torch.float32, None, None),  # wider stays wider
        ("32-true", torch.bfloat16, None, torch.bfloat16),
        ("bf16-mixed", torch.float32, torch.bfloat16, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("bf16-true", torch.float32, None, torch.float32),
    ],
)
def test_types_of_a_precision(
    precision: str,
    reduced: torch.dtype,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
) -> None:
    policy = mixed_precision(precision, reduced)
    assert (policy.param_dtype, policy.reduce_dtype) == (param_dtype, reduce_dtype)
    assert not policy.cast_forward_inputs


def seen_on_two_ranks(launch: Any, folder: Path, *words: str) -> dict[str, Any]:
    result: subprocess.CompletedProcess[str] = launch(str(SCRIPT), str(folder), *words, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for name in ("computed", "exchanged", "kept", "gradients", "whole", "counted"):
        assert first[name] == second[name], name
    for one, other in zip(first["steps"], second["steps"], strict=True):
        assert (one["finite"], one["moved"]) == (other["finite"], other["moved"])
        assert one["waits"] == other["waits"] == []
    return dict(first)


def check_skipped(seen: dict[str, Any]) -> None:
    """A NaN on one rank leaves the step out on all, and counts it not."""
    assert [step["finite"] for step in seen["steps"]] == [False, True, False, True]
    assert [step["moved"] == 0 for step in seen["steps"]] == [True, False, True, False]
    assert seen["steps"][1]["moved"] == seen["parameters"]
    assert seen["counted"] == [2.0]


@pytest.mark.slow
def test_bf16_mixed_gathers_bf16_and_keeps_fp32(launch: Callable[..., Any], tmp_path: Path) -> None:
    seen = seen_on_two_ranks(launch, tmp_path, "bf16-mixed", "float32")
    bf16, fp32 = ["torch.bfloat16"], ["torch.float32"]
    assert seen["computed"]["LayerNorm"] == fp32
    for kind in ("Linear", "Embedding", "Conv2d"):
        assert seen["computed"][kind] == bf16, kind
    assert seen["exchanged"] == [
        "gather torch.bfloat16",
        "reduce torch.float32",
    ]
    assert seen["kept"] == fp32
    assert seen["gradients"] == fp32
    norms = [name for name in seen["whole"] if name != "logit_scale"]
    assert norms
    assert all(".ln_" in f".{name}" for name in norms)
    check_skipped(seen)
    folder = tmp_path / "reduced"
    folder.mkdir()
    coarse = seen_on_two_ranks(launch, folder, "bf16-mixed", "bfloat16")
    assert coarse["exchanged"] == [
        "gather torch.bfloat16",
        "reduce torch.bfloat16",
    ]
    assert coarse["kept"] == coarse["gradients"] == fp32


@pytest.mark.slow
def test_fp32_gathers_fp32_and_shards_all_but_scalars(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    seen = seen_on_two_ranks(launch, tmp_path, "32-true", "float32")
    assert all(kinds == ["torch.float32"] for kinds in seen["computed"].values())
    assert all(each.endswith("torch.float32") for each in seen["exchanged"])
    assert seen["whole"] == ["logit_scale"]
    check_skipped(seen)
