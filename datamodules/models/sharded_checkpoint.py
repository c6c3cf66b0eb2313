"""Checkpoints in parts: a folder into which each rank has written its rows of sharded tensors.

    step-300.ckpt/
        rest.ckpt      a checkpoint as it is in one file, but of sharded tensors only type and shape
        rank-0.ckpt    the rows that rank 0 had, by where the tensors stand in the rest
        rank-1.ckpt    ...

All of them are files of torch, with checksums, and are read with `weights_only`: nothing in them
can run code. Any number of ranks can read them, each the rows that it needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REST_NAME = "rest.ckpt"


def part_name(rank: int) -> str:
    """Return the name of the file of a rank."""
    return f"rank-{rank}.ckpt"


def is_sharded_checkpoint(path: str | Path) -> bool:
    """Return whether a checkpoint is a folder of parts."""
    return (Path(path) / REST_NAME).is_file()


def is_weights_file(path: str | Path) -> bool:
    """Return whether weights can lie there: in a file, or in a checkpoint in parts."""
    return Path(path).is_file() or is_sharded_checkpoint(path)


def rows_of_rank(rows: int, rank: int, ranks: int) -> slice:
    """Return which of a tensor's rows a rank holds: those of `torch.chunk`, as FSDP2 shards."""
    size = -(-rows // ranks)
    return slice(min(rank * size, rows), min((rank + 1) * size, rows))


def map_tensors(value: Any, change: Callable[[str, Tensor], Any], place: str = "") -> Any:
    """Copy a checkpoint with its tensors changed.

    Args:
        value: tensors and plain values, in mappings, lists and tuples; these keep their types.
        change: of the place of a tensor, such as `optimizer_states/0/state/3/exp_avg`, and it.
        place: of `value` itself.
    """
    inside = f"{place}/" if place else ""
    if isinstance(value, Tensor):
        return change(place, value)
    if isinstance(value, Mapping):
        changed = {key: map_tensors(each, change, f"{inside}{key}") for key, each in value.items()}
        return changed if type(value) is dict else _as(value, changed)
    if type(value) in (list, tuple):
        return type(value)(
            map_tensors(each, change, f"{inside}{number}") for number, each in enumerate(value)
        )
    return copy.deepcopy(value)


def _as(value: Mapping[Any, Any], inside: dict[Any, Any]) -> Any:
    """Return a mapping of the type of another, such as OrderedDict, with these values."""
    other = copy.copy(value)
    other.update(inside)  # type: ignore[attr-defined]  # mappings of checkpoints can be written
    return other


class ShardedCheckpoint:
    """A checkpoint in parts, opened: files are mapped, and read where they are asked for.

    Attributes:
        folder: its path.
        ranks: how many have written it.
        rest: the checkpoint; tensors that are sharded are on the device `meta`.
    """

    def __init__(self, folder: Path) -> None:
        """Open it.

        Raises:
            ValueError: it is no such checkpoint. Damaged files make torch raise anything.
        """
        self.folder = folder
        content = _read(folder / REST_NAME)
        ranks = content.get("ranks") if isinstance(content, dict) else None
        if not isinstance(ranks, int) or ranks < 1 or not isinstance(content.get("rest"), dict):
            raise ValueError(f"{REST_NAME} in it is not of a checkpoint in parts")
        self.ranks: int = ranks
        self.rest: dict[str, Any] = content["rest"]
        self._parts: dict[int, Mapping[str, Tensor]] = {}

    @property
    def files(self) -> list[Path]:
        """All files of it, that of the rest first."""
        return [self.folder / name for name in (REST_NAME, *map(part_name, range(self.ranks)))]

    def rows(self, place: str, value: Tensor, rows: slice | None = None) -> Tensor:
        """Read a tensor, or some of its rows; on the CPU, a copy.

        Args:
            place: of the tensor, see `map_tensors`.
            value: what `rest` has there.
            rows: without a step, from its start to its stop; None: the tensor as it is.

        Raises:
            ValueError: a part lacks it, or has another shape or type of it.
        """
        if not value.is_meta:
            return value.clone() if rows is None else value[rows].clone()
        wanted = slice(0, len(value)) if rows is None else rows
        pieces = [value.new_empty((0, *value.shape[1:]), device="cpu")]
        for rank in range(self.ranks):
            own = rows_of_rank(len(value), rank, self.ranks)
            start, stop = max(own.start, wanted.start), min(own.stop, wanted.stop)
            if start < stop:
                piece = self._piece(rank, place, value, own)
                pieces.append(piece[start - own.start : stop - own.start])
        return torch.cat(pieces)

    def whole(self, value: Any, place: str) -> Any:
        """Copy what `rest` has at a place, with all tensors in it read."""
        return map_tensors(value, self.rows, place)

    def check(self) -> None:
        """Look at the types and shapes of all parts.

        Raises:
            ValueError: see `rows`.
        """

        def look(place: str, value: Tensor) -> None:
            for rank in range(self.ranks if value.is_meta else 0):
                self._piece(rank, place, value, rows_of_rank(len(value), rank, self.ranks))

        map_tensors(self.rest, look)

    def _piece(self, rank: int, place: str, value: Tensor, rows: slice) -> Tensor:
        if rank not in self._parts:
            self._parts[rank] = self._read_part(rank)
        piece = self._parts[rank].get(place)
        shape = (rows.stop - rows.start, *value.shape[1:])
        if piece is None or piece.shape != shape or piece.dtype != value.dtype:
            found = "nothing" if piece is None else f"{tuple(piece.shape)} of {piece.dtype}"
            raise ValueError(
                f"{part_name(rank)} in it must have {shape} of {value.dtype} under {place!r}, and "
                f"has {found}"
            )
        return piece

    def _read_part(self, rank: int) -> Mapping[str, Tensor]:
        content = _read(self.folder / part_name(rank))
        marks = {"rank": rank, "ranks": self.ranks, "step": self.rest.get("global_step")}
        found = {name: content.get(name) for name in marks} if isinstance(content, dict) else {}
        if found != marks:
            raise ValueError(f"{part_name(rank)} in it is not of this checkpoint")
        rows: Mapping[str, Tensor] = content["rows"]
        return rows


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
