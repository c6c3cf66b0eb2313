"""Ranks that decide alone compare what they have chosen."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from siftclip.datamodules.streaming.order import rows_digest
from siftclip.errors import InputError
from siftclip.trainer.runtime.rank_agreement import RankAgreement, require_same

Compose = Callable[..., DictConfig]
Cli = Callable[..., subprocess.CompletedProcess[str]]


class Together:
    """One of several ranks, and the digests of all."""

    def __init__(self, rank: int, digests: list[list[int]]) -> None:
        self.rank, self.size, self.digests = rank, len(digests), digests

    def sum(self, values: Tensor) -> Tensor:
        assert (values != 0).any(1).nonzero().flatten().tolist() in ([], [self.rank])
        return torch.tensor(self.digests)

    def barrier(self) -> None:
        raise NotImplementedError


DIGESTS = st.sampled_from([0, 1, -(2**63), 2**63 - 1])


@given(digests=st.lists(st.lists(DIGESTS, min_size=2, max_size=2), min_size=1, max_size=4))
def test_every_rank_finds_any_difference(digests: list[list[int]]) -> None:
    differ = [len(set(column)) > 1 for column in zip(*digests, strict=True)]
    messages = set()
    for rank, own in enumerate(digests):
        try:
            require_same(Together(rank, digests), own, ["first", "second"])
            messages.add("")
        except InputError as error:
            messages.add(str(error))
    assert len(messages) == 1
    (message,) = messages
    assert ("different first" in message) == differ[0]
    assert ("different second" in message) == (differ[1] and not differ[0])
    assert bool(message) == any(differ)


def test_message_names_step_and_ranks() -> None:
    agreement = RankAgreement()
    for step in (7, 8):
        agreement.note(step, read=step, trained=-step)
    others = [[7, -7, 8, -8], [7, -7, 8, -9], [7, -7, 8, -8]]
    message = r"different samples to train on at step 8 .*: rank 1 others than rank 0, 2\."
    with pytest.raises(InputError, match=message):
        agreement.check(Together(0, others))
    agreement.check(Together(0, others))  # nothing was noted since
    assert [step for step in range(1, 121) if agreement.is_due(step, 120)] == [1, 50, 100, 120]


def test_digest_stands_for_order_rows_and_weights() -> None:
    rows, weights = np.arange(5), np.ones(5, np.float32)
    digests = [
        rows_digest(rows),
        rows_digest(rows[::-1]),
        rows_digest(rows, weights),
        rows_digest(rows, 2 * weights),
    ]
    assert len(set(digests)) == 4
    assert rows_digest(rows, None) == digests[0]
    assert all(-(2**63) <= digest < 2**63 for digest in digests)


# Rank 1 decides otherwise, in one of the ways that ranks decide; each run must end on both.
DISAGREE = """
import contextlib, json, os, sys
import numpy as np
from omegaconf import OmegaConf
from siftclip.datamodules.streaming.order import SampleOrder
from siftclip.selectors.core.base import Choice
from siftclip.errors import InputError
from siftclip.selectors.methods.uniform import Uniform
from siftclip.trainer.online.in_loop import CachedFirstStage, StepDraw
from siftclip.trainer.settings.commands import TrainCommand
from siftclip.trainer.settings.read_command import read_command
from siftclip.trainer.stages.train import train_stage

rank = int(os.environ["RANK"])

@contextlib.contextmanager
def patched(owner, name, change):
    original = getattr(owner, name)
    setattr(owner, name, lambda self, *args: change(self, original(self, *args), *args))
    yield
    setattr(owner, name, original)

def other_row(order, answer, start, samples):
    positions, rows = answer
    if rank == 1 and start == 3 * samples:
        rows = rows.copy()
        rows[0] = order.rows[order.rows != rows[0]][0]
    return positions, rows

def other_candidates(stage, chosen, step, rows, wanted):
    if rank == 1 and step == 2:
        chosen = np.sort(np.append(chosen[1:], np.setdiff1d(np.arange(len(rows)), chosen)[:1]))
    return chosen

def other_choice(draw, choice, source, step, samples):
    if rank == 1 and step == 4:
        kept = choice.multiplicities.reshape(2, -1)[:, ::-1].ravel().copy()
        choice = Choice(multiplicities=kept, scores=choice.scores)
    return choice

def other_selection(selector, choice, source):
    if rank == 1:
        kept = np.roll(choice.multiplicities, 1)
        choice = Choice(multiplicities=kept, scores=choice.scores)
    return choice

WAYS = {
    "order": (SampleOrder, "span", other_row),
    "first stage": (CachedFirstStage, "__call__", other_candidates),
    "in the loop": (StepDraw, "__call__", other_choice),
    "version": (Uniform, "select", other_selection),
    "selection": (Uniform, "select", other_selection),
}
for way, config in json.loads(sys.argv[1]).items():
    config = read_command(TrainCommand, OmegaConf.create(config))
    if way == "version":  # the selection itself is made before
        from siftclip.trainer.builders.selection import select_stage
        select_stage(config)
    with patched(*WAYS[way]):
        try:
            train_stage(config)
            print(f"\\n{rank} {way}: trained", flush=True)  # others may have left a part of a line
        except InputError as error:
            print(f"\\n{rank} {way}: {error}", flush=True)
"""
EVERY_STEP = ["online=every_step", "online.selector.fraction=0.5"]
EXPECTED = {
    "order": "different samples to read at step 3 of training",
    "first stage": "different samples to read at step 2 of training",
    "in the loop": "different samples to train on at step 4 of training",
    "version": "different samples of selection 1, from step 2 on",
    "selection": "different samples for the selection",
}


@pytest.mark.slow
def test_ranks_that_disagree_end_the_run(
    base: list[str], compose_tree: Compose, launch: Cli, tmp_path: Path
) -> None:
    random = ["selector=random", "selector.fraction=0.9"]
    cached = [*EVERY_STEP, "selector@online.selector=easy_reference"]
    version = ["online=every_n_steps", "online.every_n_steps=2", "selector@online.selector=random"]
    options: dict[str, list[str]] = {
        "order": [*random, "data.num_workers=1"],
        "first stage": [*random, *cached],
        "in the loop": [*random, *EVERY_STEP],
        "version": [*random, *version],
        "selection": ["selector=random", "selector.fraction=0.7"],
    }
    configs: dict[str, Any] = {
        way: OmegaConf.to_container(
            compose_tree("train", [*base, *own, f"run_dir={tmp_path / way}"])
        )
        for way, own in options.items()
    }
    (tmp_path / "disagree.py").write_text(DISAGREE)
    result = launch("disagree.py", json.dumps(configs), ranks=2)
    lines = [line for line in result.stdout.splitlines() if line[:2] in ("0 ", "1 ")]
    assert len(lines) == 2 * len(EXPECTED), result.stderr[-4000:]
    for way, message in EXPECTED.items():
        told = sorted(line for line in lines if line[2:].startswith(f"{way}:"))
        assert len(told) == 2
        assert told[0][2:] == told[1][2:]  # the same on both
        assert message in told[0]
        assert "rank 1 others than rank 0" in told[0]
        assert not (tmp_path / way / "model").exists()
