"""Runs `python ...` in processes forked from one that has imported everything already.

Lightning, torchmetrics, torchvision, open_clip and what they import take eight seconds of every
command that a test starts, and siftclip a quarter of a second. This process imports them once, with
CLIP's vocabulary; what a person's command imports by itself is up to test_imports.py, and to tests
that start a new Python. It reads requests from its input, a line of JSON each, and answers with the
exit status when the child has ended; or, where a request names a file for the status, with the
child's process number at once.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from made_once import compositions_once, nothing_flushed, vocabulary_once

FORK = multiprocessing.get_context("fork")
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


def environment_of_children() -> dict[str, str]:
    """Return the environment of a child: one thread, and no launcher's variables."""
    drop = ("RANK", "WORLD_SIZE", "TORCHELASTIC", "WANDB")
    kept = {k: v for k, v in os.environ.items() if not any(word in k for word in drop)}
    return {**kept, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def warm_up() -> None:
    """Import the packages and siftclip, and make once what commands make.

    Garbage is looked for afterwards, and among new objects alone: that takes a fifth of an import,
    and the first collection in every child would copy what they share.
    """
    gc.disable()
    for package in PACKAGES:
        importlib.import_module(package)
    siftclip = importlib.import_module("siftclip")
    for module in pkgutil.walk_packages(siftclip.__path__, "siftclip."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    patch = pytest.MonkeyPatch()
    compositions_once(patch)
    nothing_flushed(patch)
    vocabulary_once(patch)
    importlib.import_module("open_clip.tokenizer").SimpleTokenizer()
    importlib.import_module("siftclip.datamodules.identity.code_identity").code_identity(
        [importlib.import_module("siftclip.selectors").ClipScore]
    )
    gc.freeze()
    gc.enable()


COMPOSED: set[tuple[str, ...]] = set()


def compose_first(words: list[str]) -> None:
    """Put the configuration of a command together here, so that its process and later ones copy it.

    Of what is wrong with it the process itself will speak.
    """
    store = importlib.import_module("siftclip.trainer.settings.store")
    commands = importlib.import_module("siftclip.trainer.settings.commands").COMMANDS
    names = (" ".join(words[2:end]) for end in (4, 3))  # such as "data compact" and "train"
    command = next((name for name in names if name in commands), None)
    if words[:2] != ["-m", "siftclip.trainer.cli"] or command is None:
        return
    parts = [re.match(r"\+?([\w/]+)(@[\w.]+)?=", word) for word in words]
    chosen = [part.string for part in parts if part and part[1] in store.configuration_groups()]
    if (command, *chosen) in COMPOSED:
        return
    COMPOSED.add((command, *chosen))
    with suppress(Exception), store.composing():
        importlib.import_module("hydra").compose(command.replace(" ", "_"), overrides=chosen)
    gc.freeze()


def run_python(words: list[str]) -> None:
    """Do what `python *words` does: a script's path or `-m module`, then its arguments."""
    sys.path[1:1] = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
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
    """The same under torchrun's own launcher and agent, which fork the ranks here.

    A rank that does not end when it is told to is killed after five seconds, not thirty.
    """
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    close = PContext.close

    def close_soon(self: Any, death_sig: Any = None, timeout: int = 30) -> None:
        close(self, death_sig, min(timeout, 5))

    PContext.close = close_soon  # type: ignore[method-assign]

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
    if "stdin" in request:
        with open(request["stdin"], "rb") as file:
            os.dup2(file.fileno(), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for good
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if request["ranks"] is None:
        run_python(request["words"])
    else:
        run_ranks(request["words"], request["ranks"])


def run_requests(requests: list[dict[str, Any]]) -> None:
    """The same with several, one after the other until one fails."""
    for request in requests:
        try:
            run_request(request)
        except SystemExit as status:
            if status.code:
                raise
        sys.stdout.flush()
        sys.stderr.flush()


def watch_request(request: dict[str, Any], answers: int) -> None:
    """In a child: start another for the request, answer with its number, and keep its status."""
    child = FORK.Process(target=run_request, args=(request,))
    child.start()
    os.write(answers, b"%d\n" % child.pid)
    child.join()
    written = Path(f"{request['status']}.tmp")
    written.write_text(str(child.exitcode), encoding="utf-8")
    written.rename(request["status"])


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.dup(1)  # whatever the children print goes to files
    for line in sys.stdin:
        request = json.loads(line)
        compose_first(request["words"])
        # both end without Python's own clearing up, which takes two seconds for so many modules
        if "status" in request:
            FORK.Process(target=watch_request, args=(request, answers)).start()
        else:
            child = FORK.Process(target=run_request, args=(request,))
            child.start()
            child.join()
            os.write(answers, b"%d\n" % child.exitcode)


if __name__ == "__main__":
    warm_up()
    serve()
