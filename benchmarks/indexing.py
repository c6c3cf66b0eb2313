"""Building the index: samples per second against tarfile and webdataset's own iteration.

    python benchmarks/indexing.py POOL

Every side goes through all tars and learns each sample's uid: tarfile by its headers and the JSON
member, webdataset by its samples, siftclip by the index it builds and writes.
"""

import argparse
import json
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import webdataset as wds
from common import alternate, describe_machine, table

from siftclip.datamodules.index.tar_index import build_shard_index
from siftclip.datamodules.index.tar_walk import LocalTar
from siftclip.datamodules.pool.pool import open_pool
from siftclip.datamodules.storage.local import LocalStorage


def by_tarfile(paths: list[Path]) -> int:
    """Offsets of every member by tarfile, and the uid from the JSON."""
    uids = set()
    for path in paths:
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            while (info := archive.next()) is not None:
                if info.name.endswith(".json"):
                    file.seek(info.offset_data)
                    uids.add(json.loads(file.read(info.size))["uid"])
                archive.members = []  # type: ignore[attr-defined]  # it keeps them all otherwise
    return len(uids)


def by_webdataset(paths: list[Path]) -> int:
    """The uid of every sample that webdataset gives."""
    names = [str(path) for path in paths]
    pipeline = wds.DataPipeline(wds.SimpleShardList(names), wds.tarfile_to_samples())
    return len({json.loads(sample["json"])["uid"] for sample in pipeline})


def by_siftclip(paths: list[Path]) -> int:
    """The index of every tar, one after the other."""
    samples = 0
    for path in paths:
        with LocalTar(path) as tar:
            samples += len(build_shard_index(tar, path.name))
    return samples


def by_command(pool: Path, workers: int) -> int:
    """All that `siftclip index` does: tars at the same time, files, the table of the pool."""
    with TemporaryDirectory() as cache:
        return len(
            open_pool(
                LocalStorage(str(pool)),
                cache_dir=Path(cache),
                max_bad_fraction=0,
                workers=workers,
                progress=False,
            )
        )


def rewrite(path: Path, copy: Path) -> Path:
    """A tar as img2dataset and DataComp's resharder leave it."""
    pipeline = wds.DataPipeline(wds.SimpleShardList([str(path)]), wds.tarfile_to_samples())
    with wds.TarWriter(str(copy), encoder=False) as writer:
        for sample in pipeline:
            writer.write(
                {k: v for k, v in sample.items() if k in ("__key__", "jpg", "txt", "json")}
            )
    return copy


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    paths = sorted((options.pool / "shards").glob("*.tar"))
    print(f"{describe_machine()}; {len(paths)} tars, page cache warm\n")
    sides = {
        "tarfile": lambda: by_tarfile(paths),
        "webdataset": lambda: by_webdataset(paths),
        "siftclip, one process": lambda: by_siftclip(paths),
        f"siftclip index, {options.workers} workers": lambda: by_command(
            options.pool, options.workers
        ),
    }
    print(table(alternate(sides, options.rounds), "tarfile"))
    with TemporaryDirectory(dir=options.pool) as folder:
        copies = [rewrite(path, Path(folder) / path.name) for path in paths[:2]]
        print("\nTwo of the tars as webdataset's TarWriter writes them, with pax headers:\n")
        written = {
            "tarfile": lambda: by_tarfile(copies),
            "webdataset": lambda: by_webdataset(copies),
            "siftclip, one process": lambda: by_siftclip(copies),
        }
        print(table(alternate(written, options.rounds), "tarfile"))


if __name__ == "__main__":
    main()
