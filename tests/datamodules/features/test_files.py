"""Features of targets and class names, from the kinds of files that people have."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from siftclip.datamodules.features.files import feature_file_stamp, read_feature_file
from siftclip.errors import InputError
from siftclip.selectors.core.source import FeatureFile

VALUES = np.random.default_rng(0).standard_normal((23, 5)).astype(np.float16)


def write(path: Path, values: np.ndarray = VALUES) -> Path:
    tensor = torch.from_numpy(values)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez(path, img=values, txt=-values)
    elif path.suffix == ".safetensors":
        save_file({"img": tensor, "txt": (-tensor).contiguous()}, path)
    else:
        torch.save({"img": tensor, "txt": -tensor}, path)
    return path


def read(path: Path, key: str | None = None, chunk_samples: int = 7) -> np.ndarray:
    chunks = list(read_feature_file(FeatureFile(path=str(path), key=key), chunk_samples))
    assert all(len(chunk) <= chunk_samples for chunk in chunks)
    return torch.cat(chunks).numpy()


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pt", ".pth", ".safetensors"])
def test_rows_of_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}")
    keyed = suffix != ".npy"
    assert np.array_equal(read(path, "img" if keyed else None), VALUES)
    if keyed:
        assert np.array_equal(read(path, "txt"), -VALUES)
        with pytest.raises(InputError, match=r"a\.\w+.*\['img', 'txt'\]"):
            read(path)


def test_folder_is_read_in_the_order_of_the_names(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        np.save(tmp_path / f"part{number}.npy", VALUES + np.float16(number))
    expected = np.concatenate([VALUES + np.float16(number) for number in range(3)])
    assert np.array_equal(read(tmp_path), expected)


def test_single_arrays_need_no_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", anything=VALUES)
    assert np.array_equal(read(tmp_path / "a.npz"), VALUES)
    torch.save(torch.from_numpy(VALUES), tmp_path / "b.pt")
    assert np.array_equal(read(tmp_path / "b.pt"), VALUES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: np.save(path / "a.npy", np.zeros(4)), r"must hold floats \[n, d\]"),
        (lambda path: np.save(path / "a.npy", np.zeros((4, 2), int)), "must hold floats"),
        (lambda path: np.save(path / "a.npy", np.zeros((4, 0))), r"must hold floats.*\[4, 0\]"),
        (lambda path: (path / "a.npy").write_bytes(b"x"), "not a readable npy file"),
        (lambda path: (path / "a.npz").write_bytes(b"x"), "not a readable npz file"),
        (lambda path: (path / "a.pt").write_bytes(b"x"), "not a readable .pt file"),
        (lambda path: (path / "a.safetensors").write_bytes(b"x"), "not a readable .safetensors"),
        (lambda path: torch.save([1, 2], path / "a.pt"), "name one of its tensors"),
        (lambda path: (path / "a.txt").write_bytes(b"x"), "must be a file"),
        (lambda path: None, "must be a file"),
    ],
)
def test_files_that_are_no_features(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        read(tmp_path)
    with pytest.raises(InputError, match="must be a file"):
        read(tmp_path / "nowhere.npy")


class Intruder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


def test_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Intruder(proof)))
    torch.save({"img": Intruder(proof)}, tmp_path / "b.pt")
    np.save(tmp_path / "c.npy", np.array([Intruder(proof)], dtype=object))
    for name in ("a.pt", "b.pt", "c.npy"):
        with pytest.raises(InputError, match="not a readable"):
            read(tmp_path / name, "img")
    assert not proof.exists()


def test_stamp_changes_with_file_and_key(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.npz"))
    first = feature_file_stamp(FeatureFile(path=path, key="img"))
    assert feature_file_stamp(FeatureFile(path=path, key="img")) == first
    found = {first, feature_file_stamp(FeatureFile(path=path, key="txt"))}
    write(Path(path), np.concatenate([VALUES, VALUES]))
    found.add(feature_file_stamp(FeatureFile(path=path, key="img")))
    assert len(found) == 3


def test_files_of_two_widths(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VALUES)
    np.save(tmp_path / "b.npy", VALUES[:, :3])
    with pytest.raises(InputError, match=r"b\.npy has 3 columns, and .*a\.npy has 5"):
        read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {1: torch.zeros(2, 2), "img": torch.zeros(3, 3).to_sparse()},
        {"img": torch.zeros(2, 2, device="meta")},
        {"img": [1.0]},
        [torch.zeros(2, 2)],
    ],
)
def test_contents_of_a_pt_that_are_no_matrix(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt"):
        read(tmp_path / "a.pt", key="img")
