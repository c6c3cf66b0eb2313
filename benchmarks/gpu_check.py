"""One command that says what a GPU machine does with Siftclip: correctness, speed and memory.

    python benchmarks/gpu_check.py --out results                       # a GPU, at most 8 minutes
    python benchmarks/gpu_check.py --device cpu --tiny --out results   # the same code, without one
    python benchmarks/gpu_check.py --out results --only step --only kernels

Nothing is downloaded. `gpu_check.json` and `gpu_check.md` are written anew after each item, so
that a check that is cut off has told what it knows; what items print is in `logs/`. The status is
1 if an item has failed, was cut off, or found no time. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
# Where Siftclip is not installed; children find it the same way.
sys.path.insert(0, str(SOURCE))
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # which leaves CUDA alone, for forks
os.environ["PYTHONPATH"] = os.pathsep.join(
    path for path in (str(SOURCE), os.environ.get("PYTHONPATH")) if path
)

import torch  # noqa: E402
from gpu_checks import (  # noqa: E402
    data,
    environment,
    evaluation,
    kernels,
    losses,
    runs,
    selection,
    steps,
)
from gpu_checks.harness import GOOD, Item, Outcome, Setup, run_item  # noqa: E402
from gpu_checks.report import JSON_NAME, TABLE_NAME, line, write_report  # noqa: E402

# In the order in which they run. What takes longest comes last, with the time that is left.
ITEMS = (
    Item(name="environment", seconds=40, run=environment.environment),
    Item(name="tests", seconds=170, run=environment.tests),
    Item(name="step", seconds=90, run=steps.step),
    Item(name="losses", seconds=60, run=losses.losses),
    Item(name="selection", seconds=90, run=selection.selection),
    Item(name="kernels", seconds=60, run=kernels.kernels),
    Item(name="loader", seconds=80, run=data.loader),
    Item(name="evaluation", seconds=60, run=evaluation.evaluation),
    Item(name="resume", seconds=70, run=runs.resume),
    Item(name="distributed", seconds=60, run=runs.distributed),
    Item(name="embedding", seconds=40, run=data.embedding),
    Item(name="step compiled", seconds=150, run=steps.step_compiled),
)

PATIENCE = 5  # of a tiny check, on cores that others use as well: it measures nothing


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="a folder for results")
    parser.add_argument("--seconds", type=float, default=450, help="of the whole check")
    names = [item.name for item in ITEMS]
    parser.add_argument("--only", action="append", choices=names, help="this item; may be repeated")
    return parser.parse_args()


def check(options: argparse.Namespace, work: Path) -> list[Outcome]:
    """Run the items, and write the report after each."""
    start = time.monotonic()
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    setup = Setup(device=device, tiny=options.tiny, work=work)
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    about: dict[str, Any] = {"device": options.device, "tiny": options.tiny}
    about |= {"torch": torch.__version__, "begun": time.strftime("%Y-%m-%d %H:%M:%S")}
    for item in ITEMS:
        if options.only and item.name not in options.only:
            continue
        left = options.seconds - (time.monotonic() - start)
        item = replace(item, seconds=PATIENCE * item.seconds) if options.tiny else item
        log = logs / f"{item.name.replace(' ', '_')}.log"
        outcomes.append(run_item(item, setup, seconds_left=left, log=log))
        about["seconds"] = round(time.monotonic() - start, 1)
        write_report(options.out, about, outcomes)
        print(line(outcomes[-1]), flush=True)
    return outcomes


def main() -> None:
    """Check, and say how it went."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and with it what runs
    options = parse()
    options.out = options.out.resolve()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        outcomes = check(options, Path(work))
    good = sum(outcome.status in GOOD for outcome in outcomes)
    print(f"\n{good} of {len(outcomes)} items passed: {options.out / JSON_NAME}, {TABLE_NAME}")
    sys.exit(good < len(outcomes))


if __name__ == "__main__":
    main()
