"""Files of a kept index that are damaged: made again where they are a cache, named where not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.datamodules.index.tar_index import load_shard_index
from siftclip.datamodules.index.tar_walk import LocalTar
from siftclip.datamodules.pool.pool import Pool
from siftclip.errors import InputError

Make = Callable[..., Any]


@pytest.fixture
def opened(
    make_samples: Make, write_pool: Make, load_pool: Make
) -> tuple[Pool, Callable[[], Pool]]:
    root = write_pool(make_samples(4))
    return load_pool(root), lambda: load_pool(root)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.json", b"[]"),
        ("notes.json", b"{}"),
        ("uids.npy", np.zeros((4, 2))),
        ("keys.npy", np.zeros(4)),
        ("keys.npy", np.asarray(b"x")),
        ("image_sizes_bytes.npy", np.zeros(3, np.int64)),
        ("shard_of_row.npy", np.full(4, 9, np.int32)),
        ("sorted_uids.npy", b""),
    ],
)
def test_tables(opened: Any, name: str, content: Any, caplog: pytest.LogCaptureFixture) -> None:
    pool, again = opened
    uids = pool.uids.copy()  # the file is mapped
    path = pool.table_folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    assert np.array_equal(again().uids, uids)
    assert re.search(rf"is made again: .*{path.stem}", caplog.text)
    caplog.clear()
    assert len(again()) == len(pool)
    assert not caplog.text


def test_notes_with_wrong_numbers(opened: Any, caplog: pytest.LogCaptureFixture) -> None:
    pool, again = opened
    path = pool.table_folder / "notes.json"
    notes = json.loads(path.read_text())
    path.write_text(json.dumps({**notes, "faults": {"counts": {"x": "1"}, "examples": {}}}))
    assert np.array_equal(again().uids, pool.uids)
    assert "notes.json: faults.counts.x must be a whole number" in caplog.text


def test_an_index_of_a_tar_is_made_again(opened: Any, tmp_path: Path) -> None:
    pool, _ = opened
    shard = pool.shards[0]
    kept = tmp_path / "kept.npz"

    def load() -> Any:
        return load_shard_index(shard.name, shard.stamp, lambda: LocalTar(shard.path), kept)

    whole = load()
    with np.load(kept) as file:
        arrays = dict(file)
    notes = json.loads(str(arrays["notes"]))
    for changes in (
        {"uids": arrays["uids"].astype(np.float32)},
        {"keys": arrays["keys"][:2]},
        {"image_sizes_bytes": -arrays["image_sizes_bytes"]},
        {"notes": np.asarray("[")},
        {"notes": np.asarray(json.dumps({**notes, "repeated": "x"}))},
    ):
        np.savez(kept, **{**arrays, **changes})
        assert np.array_equal(load().image_sizes_bytes, whole.image_sizes_bytes)
    kept.unlink()
    kept.mkdir()
    with pytest.raises(InputError, match=r"kept\.npz must be a file, .* Delete that folder"):
        load()


@pytest.mark.parametrize("probes", ["[]", '{"00000000.tar": 3}', '{"00000000.tar": []}', "{"])
def test_probes_are_made_again(opened: Any, probes: str) -> None:
    pool, again = opened
    (pool.table_folder.parent / "probes.json").write_text(probes)
    assert again().shards == pool.shards
