"""Cached features by row, in any order: for batches and for what looks at ids before reading.

The features stay in the files of a `FeatureStore`. An array that its npz holds uncompressed, which
is how DataComp and `siftclip embed` write them, is mapped; a compressed one is held in memory.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from siftclip.datamodules.features import FeatureStore
from siftclip.datamodules.files import read_npy_header, read_npz
from siftclip.selectors.errors import InputError

_LOCAL_HEADER_BYTES = 30


@dataclass(slots=True, kw_only=True)
class RowFeatures:
    """Looks up features by the pool's rows. Picklable; every process maps the files itself."""

    paths: tuple[Path, ...]  # npz
    keys: tuple[str, ...]
    part_of_row: np.ndarray  # int32 [n], index into `paths`; -1 without features
    position_of_row: np.ndarray  # int64 [n], row of the npz
    _arrays: dict[tuple[int, str], np.ndarray] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> tuple[object, ...]:
        return self.paths, self.keys, self.part_of_row, self.position_of_row

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.paths, self.keys, self.part_of_row, self.position_of_row = state  # type: ignore[assignment]  # as __getstate__ packs them
        self._arrays = {}

    @classmethod
    def build(cls, store: FeatureStore, keys: tuple[str, ...], samples: int) -> RowFeatures:
        """The features `keys` of a store, for a pool of so many samples."""
        part_of_row = np.full(samples, -1, dtype=np.int32)
        position_of_row = np.zeros(samples, dtype=np.int64)
        for number, part in enumerate(store.parts):
            part_of_row[part.rows] = number
            position_of_row[part.rows] = part.positions
        return cls(
            paths=tuple(part.path for part in store.parts),
            keys=keys,
            part_of_row=part_of_row,
            position_of_row=position_of_row,
        )

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The features of rows, int64 [b], by key: [b, d] as stored; NaN for rows without."""
        parts, positions = self.part_of_row[rows], self.position_of_row[rows]
        found = {}
        for key in self.keys:
            example = self._array(max(0, int(parts.max(initial=0))), key)
            values = np.full((len(rows), example.shape[1]), np.nan, dtype=example.dtype)
            for part in np.unique(parts[parts >= 0]).tolist():
                here = parts == part
                values[here] = self._array(part, key)[positions[here]]
            found[key] = torch.from_numpy(values)
        return found

    def _array(self, part: int, key: str) -> np.ndarray:
        array = self._arrays.get((part, key))
        if array is None:
            array = self._arrays[part, key] = map_npz_array(self.paths[part], key)
        return array


def map_npz_array(path: Path, key: str) -> np.ndarray:
    """An array of an npz, mapped into memory if it is stored uncompressed, else read.

    Raises:
        InputError: the file is missing or damaged, or lacks the key.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            member = archive.getinfo(f"{key}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                return read_npz(path, [key])[0]
            file.seek(member.header_offset)
            header = file.read(_LOCAL_HEADER_BYTES)
            name_bytes, extra_bytes = (
                int.from_bytes(header[at : at + 2], "little") for at in (26, 28)
            )
            file.seek(name_bytes + extra_bytes, 1)
            shape, fortran, dtype = read_npy_header(file)
            if dtype.hasobject:
                raise ValueError("object arrays would be unpickled")
            mapped = np.memmap(
                file,
                dtype=dtype,
                mode="r",
                offset=file.tell(),
                shape=shape,
                order="F" if fortran else "C",
            )
            return np.asarray(mapped)
    except KeyError:
        raise InputError(f"{path} must hold the array {key!r}.") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a readable npz file: {error}.") from None
