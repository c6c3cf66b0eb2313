"""Whether a loss means the same on several ranks, tried in processes that gloo connects."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from siftclip.trainer.losses import ContrastiveLoss
from siftclip.trainer.optim.loss_samples import (
    SAMPLES,
    STEPS,
    StepAnswer,
    assert_close,
    biases_of,
    parts_of,
    synthetic_batch,
    train_step,
)

WORLD_SIZES = (2, 4)
MICRO_BATCHES = 2  # of a rank, in the second step
TIMEOUT = timedelta(seconds=60)  # of a collective
_SLOW_IMPORTS = ("open_clip.loss",)
GRACE_SECONDS = 2.0  # in which the others say what is wrong, too
_WAY_OUT = (
    "Define its class in a module that Python can import, not in a function, a notebook or a "
    "script, and put that module's folder on PYTHONPATH."
)


def check_on_ranks(loss: ContrastiveLoss) -> None:
    """Check that the mean over 2 and over 4 ranks is what one process computes.

    Values of terms, gradients of the towers, scale and bias, losses of samples and state, in two
    steps, the second in micro-batches and with copies of samples, which other ranks may hold.

    Raises:
        AssertionError: they differ, or the loss cannot go to other processes.
    """
    name = type(loss).__name__
    try:
        pickled = pickle.dumps(loss)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(f"{name} cannot go to other processes: {error}. {_WAY_OUT}") from error
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "loss.pkl").write_bytes(pickled)
        # Forked from a process that has imported once what takes seconds: torch, and what the loss
        # has needed here so far.
        context = multiprocessing.get_context("forkserver")
        needed = [name for name in _SLOW_IMPORTS if name in sys.modules]
        context.set_forkserver_preload([__name__, *needed])
        processes = range(WORLD_SIZES[-1])
        ranks = [context.Process(target=_run, args=(rank, place)) for rank in processes]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, place)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        in_time = sorted(place.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        faults = [json.loads(path.read_text()) for path in in_time]
        done = len(list(place.glob("done*")))
    # What is wrong comes first, and then what the other ranks say when one has left them.
    for kind in ("wrong", "unknown", "failed", "left"):
        for fault in faults:
            assert fault["kind"] != kind, fault["text"]
    assert done == len(ranks), f"{len(ranks) - done} of {len(ranks)} ranks ended without an answer"


def _wait(ranks: Sequence[BaseProcess], folder: Path) -> None:
    """Wait for all ranks; once one has failed, those that wait for it have a moment left."""
    ends = time.monotonic() + 4 * TIMEOUT.total_seconds()
    while any(process.is_alive() for process in ranks) and time.monotonic() < ends:
        time.sleep(0.05)
        if any(folder.glob("*.json")):
            ends = min(ends, time.monotonic() + GRACE_SECONDS)


def _run(rank: int, folder: Path) -> None:
    """Compare a rank with one process; what is wrong is left in a file."""
    torch.set_num_threads(1)
    try:
        loss = pickle.loads((folder / "loss.pkl").read_bytes())  # noqa: S301 - our own bytes
    except Exception as error:
        text = f"the loss cannot go to other processes: {type(error).__name__}: {error}."
        return _leave(folder, rank, "unknown", f"{text} {_WAY_OUT}")
    try:
        for world_size in WORLD_SIZES:
            if rank < world_size:
                _compare_in_group(loss, folder / f"group{world_size}", rank, world_size)
    except AssertionError as error:
        return _leave(folder, rank, "wrong", str(error))
    except Exception as error:
        kind = "left" if "gloo" in str(error) else "failed"  # by a rank that has ended
        return _leave(folder, rank, kind, traceback.format_exc())
    (folder / f"done{rank}").touch()
    return None


def _leave(folder: Path, rank: int, kind: str, text: str) -> None:
    path = folder / f"fault{rank}"
    path.write_text(json.dumps({"kind": kind, "text": text}))
    path.rename(path.with_suffix(".json"))  # complete, where it is looked for


def _compare_in_group(loss: ContrastiveLoss, file: Path, rank: int, world_size: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=file.as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    for bias in biases_of(loss):
        for weighted in (False, True) if loss.takes_weights else (False,):
            _compare_steps(loss, rank, world_size, bias=bias, weighted=weighted)
    # Not where the loss fails: the others would say that they lost a rank before it says why.
    dist.destroy_process_group()


def _compare_steps(
    loss: ContrastiveLoss, rank: int, world_size: int, *, bias: bool, weighted: bool
) -> None:
    alone, shared = copy.deepcopy(loss), copy.deepcopy(loss)
    for step in range(STEPS):
        batch = synthetic_batch(loss, step, weighted=weighted, copies=step > 0)
        expected = train_step(alone, [batch], bias=bias)
        part = parts_of(batch, world_size)[rank]
        micro_batches = parts_of(part, MICRO_BATCHES) if step else [part]
        answer = train_step(shared, micro_batches, bias=bias, rank=rank, world_size=world_size)
        where = f"on {world_size} ranks{', weighted' if weighted else ''}, step {step}"
        _compare_answers(answer, expected, world_size, where)
        _compare_states(shared.state_dict(), alone.state_dict(), where)


def _compare_answers(answer: StepAnswer, expected: StepAnswer, world_size: int, where: str) -> None:
    for name, value in expected.shared.items():
        mean = answer.shared[name].clone()
        dist.all_reduce(mean)
        assert_close(mean / world_size, value, f"the mean of {name} {where} is not that of one")
    if answer.sample_losses is None or expected.sample_losses is None:
        return
    gathered = [torch.empty_like(answer.sample_losses) for _ in range(world_size)]
    dist.all_gather(gathered, answer.sample_losses.contiguous())
    losses = torch.cat(gathered)
    assert len(losses) == SAMPLES, f"sample_losses {where} are not those of the rank's own samples"
    assert_close(losses, expected.sample_losses, f"sample_losses {where} are not those of one")


def _compare_states(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str
) -> None:
    for name, value in expected.items():
        assert_close(found[name], value, f"the state {name} {where} is not that of one process")
