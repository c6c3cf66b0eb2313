"""The demo's data on disk: a noisy pool with known truth, a clean one for a teacher, four tasks.

Everything is derived from the seed: the same call writes the same bytes. The truth lies outside
the pool's folder, so that no selector meets it by accident.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from typing_extensions import NotRequired, TypedDict

from siftclip.datamodules.index.uids import parse_uids, sort_uids, to_structured
from siftclip.errors import InputError, require_int
from siftclip.files import write_json, write_npy, write_tar, write_text
from siftclip.progress import show_progress
from siftclip.records import read_record
from siftclip.trainer.demo.digit_scenes import derive_generator, split_digits
from siftclip.trainer.demo.samples import DefectMix, Sample, Task, make_samples, make_tasks
from siftclip.writing import atomic_path, delete_folder

if TYPE_CHECKING:
    import pandas as pd

MARKER_NAME = "demo_data.json"
OWN_FOLDERS = ("pool", "teacher", "eval", "truth", "subsets")
DATA_VERSION = 1  # raise it with every change of the bytes, so that old data are written anew
SPLIT_FRACTIONS = (0.3, 0.45, 0.25)  # of the digits: teacher, pool, evaluation
SHARD_SAMPLES = 1000
METADATA_ROWS = 2500  # a parquet file; not a multiple of a shard, as in DataComp
PNG_EVERY = 10  # every tenth sample is a PNG, the others are JPEG


class _Marker(TypedDict):
    """What says that the data are complete."""

    complete: bool
    parameters: NotRequired[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoData:
    """Where the demo's data are."""

    root: Path

    @property
    def pool(self) -> Path:
        """The noisy pool."""
        return self.root / "pool"

    @property
    def teacher(self) -> Path:
        """The clean pool."""
        return self.root / "teacher"

    @property
    def tasks(self) -> Path:
        """The folder of the `wds_*` tasks."""
        return self.root / "eval"

    @property
    def truth(self) -> Path:
        """The parquet file with the kind of every sample of the pool."""
        return self.root / "truth" / "pool_truth.parquet"

    @property
    def oracle(self) -> Path:
        """The subset file of the clean samples."""
        return self.root / "subsets" / "oracle.npy"


def _encode(image: np.ndarray, *, suffix: str) -> bytes:
    buffer = io.BytesIO()
    # Full chroma: these images are so small that JPEG's usual half would blur the digits' colours.
    options: dict[str, int] = {"quality": 92, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(image).save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix], **options)
    return buffer.getvalue()


def write_pool(
    root: Path, samples: Sequence[Sample], *, seed: int, advance: Callable[[], object]
) -> list[str]:
    """Write samples as a pool in DataComp's layout, without features.

    Args:
        root: gets `shards/` and `metadata/`; its name is part of the uids.
        samples: the samples, in the order of the rows.
        seed: part of the uids.
        advance: called after each sample.

    Returns:
        The uids, in the order of the samples.
    """
    import pandas as pd

    records: list[dict[str, object]] = []

    def members(first: int) -> Iterator[tuple[str, bytes]]:
        for number in range(first, min(first + SHARD_SAMPLES, len(samples))):
            sample = samples[number]
            key = f"{number // SHARD_SAMPLES:08d}{number % SHARD_SAMPLES:04d}"
            uid = _digest(f"siftclip demo/{seed}/{root.name}/{number}")
            suffix = "png" if number % PNG_EVERY == 0 else "jpg"
            content = _encode(sample.image, suffix=suffix)
            height, width = sample.image.shape[:2]
            url = f"http://demo.invalid/{root.name}/{uid}.{suffix}"
            description = {
                "uid": uid,
                "key": key,
                "url": url,
                "caption": sample.caption,
                "width": width,
                "height": height,
                "status": "success",
            }
            yield f"{key}.{suffix}", content
            yield f"{key}.txt", sample.caption.encode()
            yield f"{key}.json", json.dumps(description).encode()
            records.append(
                {
                    "uid": uid,
                    "url": url,
                    "text": sample.caption,
                    "original_width": width,
                    "original_height": height,
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            )
            advance()

    for shard, first in enumerate(range(0, len(samples), SHARD_SAMPLES)):
        write_tar(root / "shards" / f"{shard:08d}.tar", members(first))
    table = pd.DataFrame(records)
    # In DataComp, the rows of the metadata are not in the order of the shards either.
    order = derive_generator(seed, f"{root.name} metadata").permutation(len(table))
    for part, first in enumerate(range(0, len(table), METADATA_ROWS)):
        name = _digest(f"siftclip demo/{seed}/{root.name}/metadata/{part}")
        rows = table.iloc[order[first : first + METADATA_ROWS]].reset_index(drop=True)
        _write_parquet(root / "metadata" / f"{name}.parquet", rows)
    return [str(record["uid"]) for record in records]


def _digest(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


def write_truth(data: DemoData, samples: Sequence[Sample], uids: Sequence[str]) -> None:
    """Write what each sample of the pool is, and the subset of those worth training on."""
    import pandas as pd

    truth = pd.DataFrame(
        {
            "uid": uids,
            "kind": [sample.kind for sample in samples],
            "digits": [" ".join(sample.words) for sample in samples],
            "colours": [" ".join(sample.inks) for sample in samples],
            "duplicate_of": [uids[s.copy_of] if s.copy_of >= 0 else "" for s in samples],
            "oracle": [sample.kind == "clean" for sample in samples],
        }
    )
    _write_parquet(data.truth, truth)
    oracle = parse_uids(truth.loc[truth["oracle"], "uid"].tolist())
    write_npy(data.oracle, to_structured(oracle[sort_uids(oracle)]))


def write_task(root: Path, task: Task, *, advance: Callable[[], object]) -> None:
    """Write a task in clip_benchmark's webdataset layout; `advance` is called after each sample."""
    suffix = "cls" if task.classes else "txt"

    def members() -> Iterator[tuple[str, bytes]]:
        for number, (image, label) in enumerate(zip(task.images, task.labels, strict=True)):
            yield f"s{number:07d}.png", _encode(image, suffix="png")
            yield f"s{number:07d}.{suffix}", label.encode()
            advance()

    write_tar(root / "test" / "0.tar", members())
    write_text(root / "test" / "nshards.txt", "1")
    write_text(root / "dataset_type.txt", "classification" if task.classes else "retrieval")
    if task.classes:
        write_text(root / "classnames.txt", "\n".join(task.classes) + "\n")
        templates = "\n".join(task.templates) + "\n"
        write_text(root / "zeroshot_classification_templates.txt", templates)


def write_demo_data(
    root: Path,
    *,
    seed: int = 0,
    pool_samples: int = 12_000,
    teacher_samples: int = 6_000,
    classification_samples: int = 1_000,
    count_samples: int = 600,
    retrieval_samples: int = 300,
    mix: DefectMix | None = None,
    progress: bool = True,
) -> DemoData:
    """Write the demo's data below `root`, or return at once if they are there.

    Data of an interrupted call, or of other arguments, are removed and written anew. The file
    `demo_data.json` is what says that the folders are ours and whether they are complete.

    Args:
        root: gets `pool/`, `teacher/`, `eval/wds_<task>/`, `truth/` and `subsets/`.
        seed: all randomness is derived from it.
        pool_samples: size of the noisy pool.
        teacher_samples: size of the clean pool, made of other digits.
        classification_samples: images of each of the tasks digit and colour.
        count_samples: images of the task count.
        retrieval_samples: images, with a caption each, of the task retrieval.
        mix: fractions of the pool's defects.
        progress: show a bar.

    Raises:
        InputError: an argument is out of range, or `root` holds such folders of somebody else.
    """
    mix = mix or DefectMix()
    parameters: dict[str, Any] = {
        "version": DATA_VERSION,
        "seed": require_int("seed", seed, minimum=0),
        "pool_samples": require_int("pool_samples", pool_samples, minimum=1),
        "teacher_samples": require_int("teacher_samples", teacher_samples, minimum=1),
        "classification_samples": require_int(
            "classification_samples", classification_samples, minimum=1
        ),
        "count_samples": require_int("count_samples", count_samples, minimum=1),
        "retrieval_samples": require_int("retrieval_samples", retrieval_samples, minimum=1),
        "mix": asdict(mix),
    }
    counts = mix.counts(pool_samples)
    data = DemoData(root=root)
    if _is_complete(root, parameters):
        return data
    write_json(root / MARKER_NAME, {"complete": False})
    for folder in OWN_FOLDERS:
        delete_folder(root / folder)

    for_teacher, for_pool, for_tasks = split_digits(seed, SPLIT_FRACTIONS)
    tasks = list(
        make_tasks(
            seed,
            for_tasks,
            classification_samples=classification_samples,
            count_samples=count_samples,
            retrieval_samples=retrieval_samples,
        )
    )
    task_samples = sum(len(task.labels) for task in tasks)
    total = pool_samples + teacher_samples + task_samples
    with show_progress(total=total, label="demo data", unit="sample", bar=progress) as bar:
        samples = list(make_samples(seed, "pool", for_pool, counts))
        uids = write_pool(data.pool, samples, seed=seed, advance=bar.update)
        write_truth(data, samples, uids)
        samples = list(make_samples(seed, "teacher", for_teacher, {"clean": teacher_samples}))
        write_pool(data.teacher, samples, seed=seed, advance=bar.update)
        for task in tasks:
            write_task(data.tasks / f"wds_{task.name}", task, advance=bar.update)
    write_json(
        root / MARKER_NAME, {"complete": True, "parameters": parameters, "pool_counts": counts}
    )
    return data


def _is_complete(root: Path, parameters: dict[str, Any]) -> bool:
    """Return whether `root` holds the data of just these parameters; an error if it is not ours."""
    marker = root / MARKER_NAME
    if marker.exists():
        state = read_record(marker, _Marker, way_out=f"Delete {root}, or choose another folder.")
        return state["complete"] and state.get("parameters") == parameters
    taken = [name for name in OWN_FOLDERS if (root / name).exists()]
    if taken:
        raise InputError(
            f"The demo's data must go to a folder of their own, {root} already holds "
            f"{', '.join(taken)} without {MARKER_NAME}. Choose another folder."
        )
    return False
