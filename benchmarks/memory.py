"""Memory of the loader processes over ten passes, each with the pages that are theirs alone.

python benchmarks/memory.py POOL
"""

import argparse
import multiprocessing
from pathlib import Path

import numpy as np
import open_clip
from common import BATCH, choose, describe_machine, open_benchmark_pool
from open_clip.transform import PreprocessCfg, image_transform_v2
from streaming import our_batches


def private_mb(pid: int) -> float:
    """What would be free again if the process ended."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (kilobytes["Private_Dirty"] + kilobytes["Private_Clean"]) / 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--samples", type=int, default=5120, help="of a pass")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    pool = open_benchmark_pool(options.pool)
    rows = choose(pool, np.arange(len(pool)), options.samples / len(pool))
    transform = image_transform_v2(PreprocessCfg(size=224), is_train=True)
    batches = our_batches(
        pool, rows, options.workers, "torch", transform, open_clip.get_tokenizer("ViT-B-32")
    )
    print(describe_machine(), f"; {options.workers} workers, passes of {options.samples}\n")
    steps = options.samples // BATCH
    for step, _ in enumerate(batches, start=1):
        if step % steps == 0:
            used = [private_mb(process.pid or 0) for process in multiprocessing.active_children()]
            print(f"pass {step // steps:2d}: " + ", ".join(f"{mb:.0f} MB" for mb in used))
        if step == 10 * steps:
            break


if __name__ == "__main__":
    main()
