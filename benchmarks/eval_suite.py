"""A suite of small tasks: `siftclip eval` against clip_benchmark's own command, each in one run.

    python benchmarks/eval_suite.py --root FOLDER                      # tasks of yours
    python benchmarks/eval_suite.py --root FOLDER --model ViT-S-32-alt --tasks mnist,clothing

Both evaluate the same random weights, written as a model folder, in fp32, on the tasks of `--root`
that are zero-shot classification; they take turns. clip_benchmark gets the repairs without which it
does not run on numpy 2.4 (clip_benchmark_fixed.py) and one loader process, since it cannot have
more of them than a task has tars. The largest difference of the metrics is printed, too.

Ours also computes 95 % intervals from 1,000 resamples, which the other side does not have.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from common import describe_machine

from siftclip.datamodules.models.load import load_clip_model, save_model_folder
from siftclip.eval.results.files import read_results
from siftclip.eval.tasks.kinds.values import Task
from siftclip.eval.tasks.task import find_tasks

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def write_model(name: str, folder: Path) -> None:
    """A model folder with random weights: `rn_tiny`, or a model of open_clip's by name."""
    torch.manual_seed(0)
    config = CONFIGS / "model" / f"{name}.yaml"
    architecture = None
    if config.is_file():
        architecture = yaml.safe_load(config.read_text()).get("architecture")
    save_model_folder(load_clip_model(name, architecture=architecture), folder)


def run_ours(model: Path, root: Path, tasks: Sequence[Task], output: Path, device: str) -> None:
    """`siftclip eval` on all tasks."""
    names = ",".join(task.name for task in tasks)
    command = [
        *(sys.executable, "-m", "siftclip.trainer.cli", "eval", str(model)),
        *(f"eval.root={root}", f"eval.tasks=[{names}]", f"output_dir={output}", "progress=false"),
        *("data.num_workers=1", f"trainer.accelerator={device}", "trainer.devices=1"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run_theirs(model: Path, tasks: Sequence[Task], output: Path, batch_size: int) -> None:
    """clip_benchmark's command on all tasks."""
    output.mkdir(parents=True, exist_ok=True)
    roots = {task.root.name.removeprefix("wds_"): task.root for task in tasks}
    links = output / "tasks"  # its option is one template for all data sets
    links.mkdir(exist_ok=True)
    for name, root in roots.items():
        (links / name).symlink_to(root)
    command = [
        *(sys.executable, str(Path(__file__).parent / "tools" / "clip_benchmark_fixed.py"), "eval"),
        *("--dataset", *(f"wds/{name}" for name in roots)),
        *("--dataset_root", f"{links}/{{dataset}}", "--task", "zeroshot_classification"),
        *("--model", f"local-dir:{model}", "--pretrained", "", "--no_amp"),
        *("--batch_size", str(batch_size), "--num_workers", "1"),
        *("--output", f"{output}/{{dataset}}.json"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def largest_difference(ours: Path, theirs: Path, tasks: Sequence[Task]) -> float:
    """Of acc1, acc5 and mean_per_class_recall over all tasks."""
    (file,) = ours.glob("eval/*/eval_results.jsonl")
    found = {result.key: result.metrics for result in read_results(file)}
    worst = 0.0
    for task in tasks:
        name = task.root.name.removeprefix("wds_")
        expected = json.loads((theirs / f"{name}.json").read_text())["metrics"]
        for metric in ("acc1", "acc5", "mean_per_class_recall"):
            value = found[task.name][metric]
            if value is not None:
                worst = max(worst, abs(value - expected[metric]))
    return worst


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--tasks", help="names, with commas between them; default: all")
    parser.add_argument("--model", default="rn_tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--their-batch-size", type=int, default=64, help="64 is its default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    names = arguments.tasks.split(",") if arguments.tasks else None
    found = find_tasks(arguments.root, names).complete()
    tasks = [task for task in found if task.kind == "classification" and task.special is None]
    seconds: dict[str, list[float]] = {"siftclip eval": [], "clip_benchmark eval": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(arguments.model, folder / "model")
        for number in range(arguments.rounds):
            ours, theirs = folder / f"ours{number}", folder / f"theirs{number}"
            start = time.perf_counter()
            run_theirs(folder / "model", tasks, theirs, arguments.their_batch_size)
            middle = time.perf_counter()
            run_ours(folder / "model", arguments.root, tasks, ours, arguments.device)
            seconds["clip_benchmark eval"].append(middle - start)
            seconds["siftclip eval"].append(time.perf_counter() - middle)
        difference = largest_difference(ours, theirs, tasks)
    print(f"{describe_machine()}; {arguments.model}, {len(tasks)} tasks")
    base = statistics.median(seconds["clip_benchmark eval"])
    for name, values in seconds.items():
        median = statistics.median(values)
        rounds = ", ".join(f"{value:.1f}" for value in values)
        print(f"{name:<20} {median:7.1f} s   {base / median:.2f} times as fast   ({rounds})")
    print(f"largest difference of a metric: {difference:.2g}")


if __name__ == "__main__":
    main()
