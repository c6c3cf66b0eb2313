"""Cached features by row, in any order: for batches, for selectors, and before images are read.

The features stay in the files of a `FeatureStore`. Of an array that its npz holds uncompressed,
which is how `siftclip embed` writes them, rows that lie close together are read, and others taken
from a map of the file; a compressed one is held in memory.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from siftclip.datamodules.features.store import FeatureStore
from siftclip.errors import InputError
from siftclip.file_identity import FileIdentity
from siftclip.files import npz_names, read_npy_header, read_npz, require_plain
from siftclip.reading import open_file, readable

_LOCAL_HEADER_BYTES = 30
# Up to so many rows are read for one that is wanted; beyond, a map fetches single pages.
_DENSE_ROWS = 4
_READ_ROWS = 256  # fewer are cheaper through a map


CHANGED = "Start again when nothing writes to it: which rows belong to which samples is not known."


class ArrayPlace(NamedTuple):
    """Where the values of an uncompressed array lie in its file."""

    offset_bytes: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


@dataclass(slots=True, kw_only=True)
class RowFeatures:
    """Looks up features by the pool's rows. Picklable; every process maps the files itself."""

    paths: tuple[Path, ...]  # npz
    identities: tuple[FileIdentity, ...]  # of these files when their rows were joined with the pool
    keys: tuple[str, ...]
    part_of_row: np.ndarray  # int32 [n], index into `paths`; -1 without features
    position_of_row: np.ndarray  # int64 [n], row of the npz
    held_parts: int | None = None  # whose compressed arrays are held at a time; None: all
    _places: dict[tuple[int, str], ArrayPlace | None] = field(default_factory=dict, repr=False)
    _arrays: dict[tuple[int, str], np.ndarray] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, object]:
        names = ("paths", "identities", "keys", "part_of_row", "position_of_row", "held_parts")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._places, self._arrays = {}, {}

    @classmethod
    def build(
        cls,
        store: FeatureStore,
        keys: tuple[str, ...],
        samples: int,
        *,
        held_parts: int | None = None,
    ) -> RowFeatures:
        """Index the features `keys` of a store by the rows of a pool of `samples` samples."""
        part_of_row = np.full(samples, -1, dtype=np.int32)
        position_of_row = np.zeros(samples, dtype=np.int64)
        for number, part in enumerate(store.parts):
            part_of_row[part.rows] = number
            position_of_row[part.rows] = part.positions
        return cls(
            paths=tuple(part.path for part in store.parts),
            identities=tuple(part.identity for part in store.parts),
            keys=keys,
            part_of_row=part_of_row,
            position_of_row=position_of_row,
            held_parts=held_parts,
        )

    def gather(self, rows: np.ndarray, keys: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """Read the features of rows, int64 [b], by key: [b, d] as stored; NaN for rows without.

        `keys` are other arrays of the same files than those that it was built with.
        """
        parts, positions = self.part_of_row[rows], self.position_of_row[rows]
        present = np.unique(parts[parts >= 0]).tolist()
        features = {}
        for key in self.keys if keys is None else keys:
            if len(present) == 1 and (parts >= 0).all():
                features[key] = torch.from_numpy(self._read(present[0], key, positions))
                continue
            pieces = {part: self._read(part, key, positions[parts == part]) for part in present}
            example = pieces[present[0]] if present else self._read(0, key, positions[:0])
            values = np.full((len(rows), example.shape[1]), np.nan, dtype=example.dtype)
            for part, piece in pieces.items():
                values[parts == part] = piece
            features[key] = torch.from_numpy(values)
        return features

    def _read(self, part: int, key: str, positions: np.ndarray) -> np.ndarray:
        """Read rows `positions` of an array of a part: a new array [m, d].

        Raises:
            InputError: the file is another one than that whose rows these are.
        """
        path, identity = self.paths[part], self.identities[part]
        identity.require(path, CHANGED)  # a map of what was cut off would end the process
        values = self._read_file(part, key, positions)
        identity.require(path, CHANGED)
        return values

    def _read_file(self, part: int, key: str, positions: np.ndarray) -> np.ndarray:
        place = self._place(part, key)
        if place is not None and len(positions) >= _READ_ROWS and not place.fortran:
            first, last = int(positions.min()), int(positions.max())
            if last - first < _DENSE_ROWS * len(positions):
                dim = place.shape[1]
                values = np.fromfile(
                    self.paths[part],
                    dtype=place.dtype,
                    count=(last + 1 - first) * dim,
                    offset=place.offset_bytes + first * dim * place.dtype.itemsize,
                )
                if len(values) < (last + 1 - first) * dim:
                    raise InputError(f"{self.paths[part]} ends inside of its array {key!r}.")
                values = values.reshape(-1, dim)
                # in order and without gaps, as in a pass over a part: nothing to copy
                in_order = len(values) == len(positions) and (np.diff(positions) == 1).all()
                return values if in_order else values[positions - first]
        chosen: np.ndarray = self._array(part, key)[positions]
        return chosen

    def _place(self, part: int, key: str) -> ArrayPlace | None:
        if (part, key) not in self._places:
            self._places[part, key] = find_npz_array(self.paths[part], key)
        return self._places[part, key]

    def _array(self, part: int, key: str) -> np.ndarray:
        array = self._arrays.get((part, key))
        if array is None:
            place = self._place(part, key)
            if place is None and self.held_parts is not None:
                held = {n for n, name in self._arrays if self._places[n, name] is None} - {part}
                if len(held) >= self.held_parts:
                    for number, name in [at for at in self._arrays if at[0] in held]:
                        del self._arrays[number, name]
            array = self._arrays[part, key] = map_npz_array(self.paths[part], key)
        return array


def find_npz_array(path: Path, key: str) -> ArrayPlace | None:
    """Find where an array of an npz lies in the file; None if it is compressed.

    Raises:
        InputError: the file is missing or damaged, or lacks the key.
    """
    with open_file(path) as file, readable(path, "npz file"), zipfile.ZipFile(file) as archive:
        names = npz_names(archive)
        if key not in names:
            raise InputError(f"{path} must hold the array {key!r}. It holds {names}.")
        member = archive.getinfo(f"{key}.npy")
        with archive.open(member) as values:  # compares the headers of the archive
            shape, fortran, dtype = read_npy_header(values, member.file_size)
            header_bytes = values.tell()
        require_plain(dtype)
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        start = member.header_offset + len(header) + name_bytes + extra_bytes
        if start + member.file_size > os.fstat(file.fileno()).st_size:
            raise ValueError("it ends inside of an array")
        return ArrayPlace(start + header_bytes, shape, fortran, dtype)


def map_npz_array(path: Path, key: str) -> np.ndarray:
    """Map an array of an npz into memory if it is stored uncompressed, else read it.

    Raises:
        InputError: the file is missing or damaged, or lacks the key.
    """
    place = find_npz_array(path, key)
    if place is None:
        return read_npz(path, [key])[0]
    with open_file(path) as file, readable(path, "npz file"):
        if 0 in place.shape or not place.dtype.itemsize:  # what is empty cannot be mapped
            return np.empty(place.shape, place.dtype)
        mapped = np.memmap(
            file,
            dtype=place.dtype,
            mode="r",
            offset=place.offset_bytes,
            shape=place.shape,
            order="F" if place.fortran else "C",
        )
        return np.asarray(mapped)
