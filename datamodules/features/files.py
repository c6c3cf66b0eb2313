"""Features that are no pool's: of a target, of class names, a covariance. Nothing is unpickled."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from siftclip.datamodules.features.rows import map_npz_array
from siftclip.errors import InputError
from siftclip.file_identity import START_AGAIN, FileIdentity
from siftclip.files import content_digest, identity_hash, npz_names, read_npy, require_floats
from siftclip.reading import open_file, readable, require_file
from siftclip.selectors.core.source import FeatureFile

MODEL_ARRAY, ACTIVATION_ARRAY = "model", "activation"  # of the files of `siftclip target`
SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".safetensors")

log = logging.getLogger(__name__)


def feature_paths(file: FeatureFile) -> list[Path]:
    """List the files that a feature file stands for, by name.

    Raises:
        InputError: there is none, or it is of another kind.
    """
    path = Path(file.path)
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    else:
        paths = [path] if path.is_file() else []
    if not paths or any(p.suffix not in SUFFIXES for p in paths):
        raise InputError(
            f"The feature file {file.path!r} must be a file ({', '.join(SUFFIXES)}) or a folder "
            "with such files."
        )
    for path in paths:
        require_file(path)
    return paths


def feature_file_stamp(file: FeatureFile) -> str:
    """Return a stamp that changes with the names and the content of the files, not their place."""
    contents = {path.name: content_digest(path) for path in feature_paths(file)}
    return identity_hash({"key": file.key, "files": contents})


def read_feature_file(file: FeatureFile, chunk_samples: int) -> Iterator[Tensor]:
    """Yield the rows of a feature file in tensors float [<= chunk_samples, d].

    Raises:
        InputError: a file is missing or damaged, lacks the key, holds no matrix of floats or one
            of another width than the first, or has changed while it was read.
    """
    first: tuple[Path, int] | None = None
    for path in feature_paths(file):
        identity = FileIdentity.of(path)
        values = _open(path, file.key)
        is_plain = values.layout == torch.strided and values.device.type == "cpu"
        has_columns = values.ndim == 2 and values.shape[1] > 0
        if not has_columns or not values.is_floating_point() or not is_plain:
            raise InputError(
                f"{path}{'' if file.key is None else f', {file.key!r},'} must hold floats [n, d]. "
                f"It holds {'' if is_plain else f'{values.layout} '}{values.dtype} "
                f"{list(values.shape)}."
            )
        first = first or (path, values.shape[1])
        if values.shape[1] != first[1]:
            raise InputError(
                f"{path} has {values.shape[1]} columns, and {first[0]} has {first[1]}: they are "
                "features of two models. Name the files of one model."
            )
        for start in range(0, len(values), chunk_samples):
            identity.require(path, START_AGAIN)  # a map of what was cut off would end the process
            # a copy, because a map of the file is read-only
            chunk = values[start : start + chunk_samples].clone()
            identity.require(path, START_AGAIN)
            yield chunk


def _open(path: Path, key: str | None) -> Tensor:
    if path.suffix == ".npz":
        _warn_of_unknown_activation(path)
        return _from_numpy(path, map_npz_array(path, _only_key(path, key)))
    if path.suffix == ".npy":
        return _from_numpy(path, read_npy(path, mapped=True))
    require_file(path)
    with readable(path, f"{path.suffix} file"):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Tensor):
        return content
    names = sorted(map(str, content)) if isinstance(content, dict) else []
    chosen = key if key is not None else (names[0] if len(names) == 1 else None)
    if chosen not in names or not isinstance(content.get(chosen), Tensor):
        raise InputError(f"{path}: name one of its tensors {names}. Got {key!r}.")
    return content[chosen]


@cache
def _warn_of_unknown_activation(path: Path) -> None:
    """Say once of a target that an earlier version made, maybe with a wrong activation."""
    names = _names(path)
    if MODEL_ARRAY in names and ACTIVATION_ARRAY not in names:
        log.warning(
            "%s was made by an earlier version of siftclip, which gave some models another "
            "activation than their weights need and kept no record of it. The siftclip target "
            "command that made it checks it, and makes it again if it is wrong.",
            path,
        )


def _names(path: Path) -> list[str]:
    with open_file(path) as file, readable(path, "npz file"), zipfile.ZipFile(file) as archive:
        return npz_names(archive)


def _only_key(path: Path, key: str | None) -> str:
    if key is not None:
        return key
    names = _names(path)
    if len(names) != 1:
        raise InputError(f"{path}: name one of its arrays {names}.")
    return names[0]


def _from_numpy(path: Path, values: np.ndarray) -> Tensor:
    require_floats(values.dtype, str(path))
    if not values.flags.writeable:
        # torch warns of read-only memory; nothing here writes to it
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(values)
    return torch.from_numpy(values)
