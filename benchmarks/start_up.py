"""How long commands take to start, beside what `import torch` alone takes.

    python benchmarks/start_up.py --before OTHER/src

Each is a new process. A command runs to its end, `train` to the first thing that it prints. All
take turns, so that what the machine does besides hits all of them; their CPU time hardly depends on
it. With `--before` the same commands of another checkout take part.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from common import describe_machine
from PIL import Image

import siftclip

SIFTCLIP = ("-m", "siftclip.trainer.cli")
TORCH = "python -c 'import torch'"
SAMPLES = 64
POOL = ("pool.root=pool", "selector=random", "progress=false")
# By what is measured: the words behind `python`.
RUNS: dict[str, tuple[str, ...]] = {
    "python -c pass": ("-c", "pass"),
    TORCH: ("-c", "import torch"),
    "import torch, to a first line": ("-c", "import torch; print(torch.__version__, flush=True)"),
    "siftclip --help": (*SIFTCLIP, "--help"),
    "siftclip train --help": (*SIFTCLIP, "train", "--help"),
    "siftclip train --cfg job": (*SIFTCLIP, "train", "--cfg", "job"),
    "train, an unknown option": (*SIFTCLIP, "train", "seeds=1"),
    "train, a value that a check refuses": (*SIFTCLIP, "train", "seed=-1"),
    "train, to its first line": (*SIFTCLIP, "train", *POOL, "model=vit_tiny", "scale=tiny"),
    "index, reused": (*SIFTCLIP, "index", *POOL),
    "score, random": (*SIFTCLIP, "score", *POOL),
    "select, random": (*SIFTCLIP, "select", *POOL, "overlap=false"),
    "eval, no tasks there": (*SIFTCLIP, "eval", "eval.root=nowhere"),
    "embed, no model named": (*SIFTCLIP, "embed", "pool.root=pool"),
    "compare, no tasks there": (*SIFTCLIP, "compare", "eval.root=nowhere"),
}
# Killed then: the end of a process that has imported torch takes time, too.
TO_FIRST_LINE = ("import torch, to a first line", "train, to its first line")


def write_pool(root: Path) -> None:
    """Write a pool of one tar of random images."""
    generator = np.random.default_rng(0)
    (root / "shards").mkdir(parents=True)
    with tarfile.open(root / "shards" / "00000000.tar", "w") as tar:
        for number in range(SAMPLES):
            image = io.BytesIO()
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image, format="JPEG")
            record = json.dumps({"uid": f"{number:032x}"}).encode()
            files = {"jpg": image.getvalue(), "txt": b"a photo", "json": record}
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def start(
    words: tuple[str, ...], source: Path, folder: Path, *, first_line: bool
) -> tuple[float, float]:
    """Run `python *words` to its end, or until it prints something: seconds, and CPU seconds."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    begin, cpu = time.perf_counter(), cpu_of_children()
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        if first_line:
            process.stdout.readline()
            process.kill()
        process.stdout.read()
    return time.perf_counter() - begin, cpu_of_children() - cpu


def cpu_of_children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="src/ of another checkout")
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="these rows")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sources = {"now": Path(siftclip.__file__).parents[1]}
    if options.before is not None:
        sources["before"] = options.before.resolve()
    names = [name for name in RUNS if name in options.only or name == TORCH]
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_pool(folder / "pool")
        sides = {
            f"{label}: {name}": partial(
                start, RUNS[name], source, folder, first_line=name in TO_FIRST_LINE
            )
            for name in names
            for label, source in sources.items()
            if label == "now" or RUNS[name][:2] == SIFTCLIP
        }
        for side in sides.values():
            side()  # byte code is written, files are in memory
        rounds = [{key: side() for key, side in sides.items()} for _ in range(options.rounds)]
    print(describe_machine(), f"; medians of {options.rounds} rounds")
    for number, unit in enumerate(("seconds", "CPU seconds")):
        print(f"\n| {unit} | before | now | beyond import torch | times import torch |")
        print("|---|---:|---:|---:|---:|")
        medians = {key: statistics.median(one[key][number] for one in rounds) for key in sides}
        torch = medians[f"now: {TORCH}"]
        for name in names:
            before, now = medians.get(f"before: {name}"), medians[f"now: {name}"]
            print(
                f"| {name} | {'' if before is None else f'{before:.2f}'} | {now:.2f} | "
                f"{now - torch:.2f} | {now / torch:.2f} |"
            )


if __name__ == "__main__":
    main()
