"""Checkpoints in parts: every rank's rows come back, whichever ranks read them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from siftclip.datamodules.models.sharded_checkpoint import (
    REST_NAME,
    ShardedCheckpoint,
    is_sharded_checkpoint,
    map_tensors,
    part_name,
    rows_of_rank,
)
from siftclip.datamodules.models.weights import CONFIG_KEY, read_config, read_weights
from siftclip.errors import InputError


def write_parts(checkpoint: dict[str, Any], folder: Path, ranks: int) -> Path:
    """Write a checkpoint as `ranks` ranks do that shard all tensors with dimensions."""
    folder.mkdir()
    rows: list[dict[str, Tensor]] = [{} for _ in range(ranks)]

    def shape(place: str, value: Tensor) -> Tensor:
        if not value.ndim:
            return value
        for rank, piece in enumerate(rows):
            piece[place] = value[rows_of_rank(len(value), rank, ranks)].clone()
        return torch.empty_like(value, device="meta")

    rest = map_tensors(checkpoint, shape)
    torch.save({"ranks": ranks, "rest": rest}, folder / REST_NAME)
    step = checkpoint["global_step"]
    for rank, piece in enumerate(rows):
        part = {"rank": rank, "ranks": ranks, "step": step, "rows": piece}
        torch.save(part, folder / part_name(rank))
    return folder


def checkpoint_of(rows: list[int]) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    weights = {f"model.{n}": torch.randn(r, 3, generator=random) for n, r in enumerate(rows)}
    moments = {n: {"step": torch.tensor(4.0), "exp_avg": w} for n, w in enumerate(weights.values())}
    return {
        "global_step": 4,
        "state_dict": OrderedDict(weights, **{"model.scale": torch.tensor(2.5)}),
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        CONFIG_KEY: {"model_cfg": {"embed_dim": 3}},
        "half": torch.arange(5, dtype=torch.bfloat16),
    }


@given(st.integers(0, 40), st.integers(1, 9))
def test_rows_are_those_of_torchs_chunks(rows: int, ranks: int) -> None:
    values = torch.arange(rows)
    chunks = [chunk.tolist() for chunk in torch.chunk(values, ranks)] if rows else []
    found = [values[rows_of_rank(rows, rank, ranks)].tolist() for rank in range(ranks)]
    assert [part for part in found if part] == [part for part in chunks if part]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_any_number_of_ranks_reads_what_others_wrote(ranks: int, tmp_path: Path) -> None:
    original = checkpoint_of([1, 2, 5, 16])
    parts = ShardedCheckpoint(write_parts(original, tmp_path / "step-4.ckpt", ranks))
    parts.check()
    assert len(parts.files) == ranks + 1
    found = {key: parts.whole(value, key) for key, value in parts.rest.items()}
    assert found.keys() == original.keys()
    assert type(found["state_dict"]) is OrderedDict
    torch.testing.assert_close(found["state_dict"], original["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(
        found["optimizer_states"], original["optimizer_states"], rtol=0, atol=0
    )
    assert found["half"].dtype == torch.bfloat16
    assert found["half"].tolist() == [0, 1, 2, 3, 4]
    for name, value in original["state_dict"].items():
        for readers in (1, 2, 4) if value.ndim else ():
            for reader in range(readers):
                own = rows_of_rank(len(value), reader, readers)
                place = f"state_dict/{name}"
                read = parts.rows(place, parts.rest["state_dict"][name], own)
                assert torch.equal(read, value[own])


def test_weights_are_read_without_the_moments(tmp_path: Path) -> None:
    original = checkpoint_of([4, 2])
    folder = write_parts(original, tmp_path / "step-4.ckpt", 2)
    found = read_weights(folder)
    assert found.keys() == {"0", "1", "scale"}
    assert all(torch.equal(found[k], original["state_dict"][f"model.{k}"]) for k in found)
    assert read_config(folder) == original[CONFIG_KEY]
    with pytest.raises(InputError, match="holds no moving average"):
        read_weights(folder, weights="ema")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"rank-1\.ckpt in it is not of this checkpoint"),
        ({"step": 3}, r"rank-1\.ckpt in it is not of this checkpoint"),
        ({"rows": {}}, r"must have \(2, 3\) of torch\.float32 .* has nothing"),
        ({"rows": {"state_dict/model.0": torch.zeros(1, 3)}}, r"has \(1, 3\) of torch\.float32"),
    ],
)
def test_parts_that_do_not_belong_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_parts(checkpoint_of([4]), tmp_path / "step-4.ckpt", 2)
    part = torch.load(folder / part_name(1), weights_only=True)
    torch.save({**part, **change}, folder / part_name(1))
    with pytest.raises(ValueError, match=message):
        ShardedCheckpoint(folder).check()
    with pytest.raises(InputError, match=r"step-4\.ckpt does not hold the weights"):
        read_weights(folder)


class Intruder:
    """Would be made anew by code, when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


@pytest.mark.parametrize("name", [REST_NAME, part_name(0)])
def test_nothing_in_it_can_run_code(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_parts(checkpoint_of([4]), tmp_path / "step-4.ckpt", 2)
    content = torch.load(folder / name, weights_only=True)
    torch.save({**content, "extra": Intruder()}, folder / name)
    with pytest.raises(InputError, match="it holds more than tensors"):
        read_weights(folder)
    assert capsys.readouterr().out == ""


def test_a_folder_of_something_else_is_none(tmp_path: Path) -> None:
    assert not is_sharded_checkpoint(tmp_path)
    assert not is_sharded_checkpoint(tmp_path / "missing")
    with pytest.raises(InputError, match="is not a file"):
        read_weights(tmp_path)
    torch.save({"ranks": 0, "rest": {}}, tmp_path / REST_NAME)
    with pytest.raises(InputError, match=r"rest\.ckpt in it is not of a checkpoint in parts"):
        read_weights(tmp_path)
