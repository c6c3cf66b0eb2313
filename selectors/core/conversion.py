"""What is given as arrays, checked and turned into what selectors read."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError, ParameterError
from siftclip.uid_texts import UID_RULE, plain_uid

# Of a norm from 1: what rounding unit vectors to bfloat16 or float16 leaves. Beyond it, vectors are
# scaled, because every score here is one of directions.
UNIT_TOLERANCE = 4e-3


def kind_of(values: Any) -> str:
    """Say what a value is: dtype and shape of an array, of numpy or torch, else its class."""
    if isinstance(values, Tensor) and values.is_nested:
        return "a nested tensor"
    if isinstance(values, np.ndarray | Tensor):
        return f"{values.dtype} {list(values.shape)}"
    return type(values).__name__


def _refuse(rule: str, parameter: str, values: Any, owner: object) -> NoReturn:
    raise ParameterError(rule, owner=owner, parameter=parameter, got=kind_of(values))


def as_tensor(values: Any, name: str, owner: object = None) -> Tensor:
    """Return numbers as a tensor: numpy's are converted, torch's stay as they are.

    Raises:
        ParameterError: it is neither.
    """
    tensor = _tensor(values) if isinstance(values, np.ndarray) else values
    if not isinstance(tensor, Tensor):
        _refuse("must be an array of numpy or torch", name, values, owner)
    return tensor


def vectors(values: Any, name: str, owner: object = None) -> Tensor:
    """Return vectors as a tensor, as they are; those of masked arrays are NaN where masked.

    Args:
        values: float [n, d], numpy or torch.
        name: of the parameter, for messages.
        owner: of the parameter, for messages.

    Raises:
        ParameterError: it is no such array.
    """
    rule = "must be a float array [samples, dim], of numpy or torch"
    tensor = _tensor(values) if isinstance(values, np.ndarray) else values
    if isinstance(tensor, Tensor) and tensor.is_nested:
        _refuse(rule, name, values, owner)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or not tensor.is_floating_point():
        _refuse(rule, name, values, owner)
    if not tensor.shape[1]:
        _refuse(rule, name, values, owner)
    if tensor.layout is not torch.strided or tensor.is_meta:
        _refuse(f"{rule}, with all of its numbers", name, values, owner)
    tensor = tensor.detach()
    return tensor.float() if tensor.itemsize == 1 else tensor  # torch computes with no float8


def unit_rows(values: Any, name: str, owner: object = None) -> Tensor:
    """Return vectors as a tensor, those that are not of unit norm scaled to it (float32 or finer).

    Rows of zeros or with components that are not finite stay: they have no direction, and their
    samples get no score. Arguments and errors are those of `vectors`.
    """
    tensor = vectors(values, name, owner)
    exact = torch.promote_types(tensor.dtype, torch.float32)
    norms = torch.linalg.vector_norm(tensor, dim=1, dtype=exact)
    has_direction = norms.isfinite() & (norms > 0)
    if not ((norms - 1).abs() > UNIT_TOLERANCE)[has_direction].any():
        return tensor
    scales = torch.where(has_direction, norms, torch.ones_like(norms))
    return tensor.to(exact) / scales[:, None]


def _tensor(values: np.ndarray) -> Tensor | None:
    if values.dtype.kind not in "fiu":
        return None
    if isinstance(values, np.ma.MaskedArray):
        values = values.filled(np.nan) if values.dtype.kind == "f" else values.filled()
    dtype = np.dtype(np.float64) if values.dtype.itemsize > 8 else values.dtype.newbyteorder("=")
    native = np.ascontiguousarray(values, dtype=dtype)
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def as_uids(values: Any, *, owner: object = None, name: str = "uids") -> np.ndarray:
    """Return uids as uint64 [n, 2].

    Args:
        values: whole numbers of 64 bits, [n, 2]; or n texts, see `plain_uid`; or DataComp's
            structured array [n].
        owner: of the parameter, for messages.
        name: of the parameter, for messages.

    Raises:
        ParameterError: they are neither.
    """
    array = values if isinstance(values, np.ndarray) else np.asarray(values)
    if array.dtype.names == ("f0", "f1") and array.ndim == 1:
        array = np.stack([array["f0"], array["f1"]], axis=1)
    if array.dtype.kind in "SUOT" and array.ndim == 1:
        texts = [each.decode("latin-1") if isinstance(each, bytes) else str(each) for each in array]
        plain = [plain_uid(text) for text in texts]
        if None in plain:
            rule = f"must be {UID_RULE}, each"
            value = texts[plain.index(None)]
            raise ParameterError(rule, owner=owner, parameter=name, value=value)
        digits = bytes.fromhex("".join(uid for uid in plain if uid is not None))
        return np.frombuffer(digits, dtype=">u8").astype(np.uint64).reshape(-1, 2)
    is_whole = array.dtype.kind == "u" or (array.dtype.kind == "i" and not (array < 0).any())
    if not is_whole or array.ndim != 2 or array.shape[1] != 2:
        rule = f"must be uint64 [samples, 2], or texts of {UID_RULE}"
        _refuse(rule, name, array, owner)
    return array.astype(np.uint64, copy=False)


def as_numbers(values: Any, *, owner: object, name: str) -> np.ndarray:
    """Return one number for each sample, float64 [n]; NaN where there is none.

    Raises:
        ParameterError: they are no numbers, or not one for each sample.
    """
    rule = "must be one number for each sample"
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy() if not values.is_complex() else values
    if isinstance(values, str | bytes | Mapping | Set | Tensor):
        _refuse(rule, name, values, owner)
    try:
        array = np.asarray(values)
        if array.ndim != 1 or array.dtype.kind in "cSUMmV":
            _refuse(rule, name, array, owner)
        if isinstance(values, np.ma.MaskedArray):
            array = np.ma.filled(values.astype(np.float64), np.nan)
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(
            f"{rule}: {error}", owner=owner, parameter=name, got=kind_of(values)
        ) from error


def as_sizes(values: Any, *, owner: object) -> np.ndarray:
    """Return the widths and heights of images, int64 [n, 2].

    Raises:
        ParameterError: they are not two whole numbers for each sample.
    """
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    is_whole = array.dtype.kind in "iu" or (
        array.dtype.kind == "f" and bool((np.isfinite(array) & (array == np.floor(array))).all())
    )
    if not is_whole or array.shape[1:] != (2,):
        rule = "must be whole numbers [samples, 2], width and height; -1 where they are not known"
        _refuse(rule, "sizes", array, owner)
    return array.astype(np.int64)


def as_captions(values: Any, *, owner: object) -> list[str]:
    """Return captions as a list.

    Raises:
        ParameterError: they are no texts, or in no order.
    """
    if isinstance(values, str | bytes | Mapping | Set):
        rule = "must be a list of texts, one for each sample"
        raise ParameterError(rule, owner=owner, parameter="captions", value=values)
    captions = [*values]
    for number, text in enumerate(captions):
        if not isinstance(text, str):
            raise ParameterError(
                f"must be texts, and number {number} is none",
                owner=owner,
                parameter="captions",
                got=kind_of(text),
                way_out='A sample without a caption has "".',
            )
    return captions


def as_rows(values: Any, *, owner: object) -> np.ndarray:
    """Return the numbers of samples, int64 [n].

    Raises:
        ParameterError: they are no distinct whole numbers.
    """
    array = np.asarray(values, dtype=None if len(values) else np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(np.unique(array)) < len(array):
        _refuse("must be distinct whole numbers [samples]", "rows", array, owner)
    return array.astype(np.int64, copy=False)


def require_same_samples(lengths: Mapping[str, int]) -> None:
    """Check that all arrays are of the same samples; `lengths` by their names.

    Raises:
        InputError: their lengths differ.
    """
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"All arrays must be of the same samples. Their lengths are {dict(lengths)}."
        )
