"""Item `evaluation`: zero-shot classification of many images among many classes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpu_checks.harness import Facts, Setup, require
from gpu_checks.measuring import clip_model
from gpu_checks.pools import MAKE_POOL, workers
from siftclip.eval.evaluate import EvalOptions, evaluate_tasks
from siftclip.eval.tasks.task import find_tasks
from siftclip.files import write_tar

sys.path.insert(0, str(MAKE_POOL.parent))
from make_pool import make_sample

PHOTOGRAPHS = 64  # that differ; each image has a comment of its own, so that none is like another
TEMPLATES = "a photo of a {c}.\na picture of the {c}."


def evaluation(setup: Setup, facts: Facts) -> None:
    """Evaluate a model with random weights in fp32, as DataComp does, and in bf16."""
    images, classes = setup.size((20_000, 1000), (40, 10))
    start = time.perf_counter()
    folder = setup.work / "tasks" / "wds_photographs"
    _write_task(folder, images, classes)
    facts["task written s"] = round(time.perf_counter() - start, 1)
    (task,) = find_tasks(folder.parent).complete()
    clip = clip_model(setup)
    for precision in ("fp32", "bf16"):
        options = EvalOptions(
            batch_size=setup.size(512, 16),
            num_workers=workers(),
            precision=precision,  # type: ignore[arg-type]
            progress=False,
        )
        start = time.perf_counter()
        done = evaluate_tasks(clip, [task], device=setup.device, options=options)
        setup.synchronize()
        seconds = time.perf_counter() - start
        require(not done.failures, f"failures: {done.failures}")
        require(done.results[0].samples == images, f"{done.results[0].samples} images")
        found = {"s": round(seconds, 1), "images/s": round(images / seconds)}
        facts[f"{images} images, {classes} classes, {precision}"] = {
            **found,
            "accuracy": round(done.results[0].main_metric, 4),
        }
    facts.note_peak(setup)


def _write_task(folder: Path, images: int, classes: int) -> None:
    if (folder / "test" / "nshards.txt").exists():
        return
    originals = [make_sample(0, number, "")["jpg"] for number in range(min(PHOTOGRAPHS, images))]
    shards = np.array_split(np.arange(images), max(1, images // 2000))

    def members(numbers: np.ndarray) -> Iterator[tuple[str, bytes]]:
        for number in numbers.tolist():
            yield f"s{number:07d}.jpg", _commented(originals[number % len(originals)], number)
            yield f"s{number:07d}.cls", str(number % classes).encode()

    for shard, numbers in enumerate(shards):
        write_tar(folder / "test" / f"{shard}.tar", members(numbers))
    (folder / "dataset_type.txt").write_text("classification\n")
    (folder / "classnames.txt").write_text("\n".join(f"thing {n}" for n in range(classes)))
    (folder / "zeroshot_classification_templates.txt").write_text(TEMPLATES)
    (folder / "test" / "nshards.txt").write_text(str(len(shards)))


def _commented(jpeg: bytes, number: int) -> bytes:
    """The same picture in other bytes: a JPEG comment behind the mark of its start."""
    text = f"{number:08d}".encode()
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + jpeg[2:]
