"""Runs `python ...` in processes forked from one that has imported the large packages already.

Lightning, torchmetrics, torchvision, open_clip and what they import take eight seconds of every
command that a test starts. This process imports them once, and nothing of siftclip: every child
imports that anew, as a person's command does. It reads requests from its input, a line of JSON
each, and answers with the exit status when the child has ended.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "torchvision.transforms.v2",
    "lightning.pytorch",
    "open_clip",
    "transformers",
    "wandb",
    "hydra.main",
    "pandas",
    "pyarrow.parquet",
    "scipy.signal",
    "sklearn.datasets",
    "webdataset",
    "clip_benchmark.metrics.zeroshot_classification",
)


def run_python(words: list[str]) -> None:
    """Do what `python *words` does: a script's path or `-m module`, then its arguments."""
    if words[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).parent)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def run_rank(words: list[str]) -> None:
    """The same as one rank of several."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = int(os.environ["RANK"])  # Lightning looks at its import only
    run_python(words)


def run_ranks(words: list[str], ranks: int) -> None:
    """The same under torchrun's own launcher and agent, which fork the ranks here."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="test",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, run_rank)(words)


def run_request(request: dict[str, Any]) -> None:
    """In a child: take on the folder, environment and files of a request, and do what it says."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, name in enumerate(("stdout", "stderr"), start=1):
        with open(request[name], "wb") as file:
            os.dup2(file.fileno(), number)
    if request["ranks"] is None:
        run_python(request["words"])
    else:
        run_ranks(request["words"], request["ranks"])


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.dup(1)  # whatever the children print goes to files
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        # ends without Python's own clearing up, which takes two seconds for so many modules
        child = fork.Process(target=run_request, args=(json.loads(line),))
        child.start()
        child.join()
        os.write(answers, b"%d\n" % child.exitcode)


if __name__ == "__main__":
    for package in PACKAGES:
        importlib.import_module(package)
    assert not any(name.partition(".")[0] == "siftclip" for name in sys.modules)
    gc.freeze()  # else the first collection in every child would copy what they share
    serve()
