"""Batches are copied one ahead, on a stream of their own, and used when their copy is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from siftclip.datamodules.streaming.batches import Batch, StepBatch
from siftclip.datamodules.streaming.device_copies import on_device

CUDA = torch.device("cuda", 0)
COMPUTING = "the stream that computes"


class Log(list[str]):
    """What happens to a simulated CUDA device, in order; streams are their names."""

    stream = COMPUTING

    def add(self, text: str) -> None:
        self.append(f"{text} [{self.stream}]")


@dataclass
class Stream:
    """A stream that notes what is asked of it."""

    log: Log
    name: str

    def record_event(self) -> str:
        return f"the end of {self.log[-1]}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


@dataclass
class Sample:
    """A batch of one tensor, known by its number."""

    log: Log
    number: int

    def to(self, device: torch.device, non_blocking: bool = False) -> Sample:
        assert device == CUDA
        assert non_blocking
        self.log.add(f"copy {self.number}")
        return self

    def tensors(self) -> list[Any]:
        return [self]

    def record_stream(self, stream: Stream) -> None:
        self.log.append(f"{self.number} is used by {stream.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Of a device whose streams are simulated."""
    log = Log()

    @contextmanager
    def on_stream(stream: Stream) -> Iterator[None]:
        log.stream = stream.name
        yield
        log.stream = COMPUTING

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log, "side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(log, log.stream))
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    return log


def test_the_next_batch_is_copied_beside_the_one_that_is_computed(log: Log) -> None:
    for sample in on_device([Sample(log, number) for number in range(3)], CUDA):
        log.add(f"compute {sample.number}")
    assert log == [
        "copy 0 [side]",
        "copy 1 [side]",
        f"{COMPUTING} waits for the end of copy 0 [side]",
        f"0 is used by {COMPUTING}",
        f"compute 0 [{COMPUTING}]",
        "copy 2 [side]",
        f"{COMPUTING} waits for the end of copy 1 [side]",
        f"1 is used by {COMPUTING}",
        f"compute 1 [{COMPUTING}]",
        f"{COMPUTING} waits for the end of copy 2 [side]",
        f"2 is used by {COMPUTING}",
        f"compute 2 [{COMPUTING}]",
    ]


@pytest.mark.parametrize("count", [0, 1])
def test_few_batches_all_come(log: Log, count: int) -> None:
    samples = [Sample(log, number) for number in range(count)]
    assert list(on_device(samples, CUDA)) == samples


def batch(weights: Tensor | None = None) -> Batch:
    return Batch(
        images=torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        tokens=torch.ones(2, 5, dtype=torch.int64),
        rows=torch.arange(2),
        valid=torch.ones(2, dtype=torch.bool),
        references={"a_img": torch.ones(2, 4)},
        weights=weights,
    )


def test_on_the_cpu_nothing_is_copied_nor_asked_for_ahead() -> None:
    asked: list[int] = []

    def batches() -> Iterator[StepBatch]:
        for number in range(2):
            asked.append(number)
            yield steps[number]

    steps = [StepBatch([batch()]), StepBatch([batch()])]
    for number, step in enumerate(on_device(batches(), torch.device("cpu"))):
        assert asked == [*range(number + 1)]
        assert step is steps[number]


def test_every_tensor_that_moves_is_named() -> None:
    """What is left out would be overwritten while it is in use."""
    whole = batch(weights=torch.ones(2))
    moved = StepBatch([whole, batch()]).to(torch.device("meta"))
    tensors = list(moved.tensors())
    assert len(tensors) == 6 + 5
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    fields = [getattr(whole, name) for name in Batch.__slots__]  # type: ignore[attr-defined]  # made by the dataclass
    of_batch = [value for value in fields if isinstance(value, Tensor)]
    assert len(of_batch) + len(whole.references) == 6


def test_what_is_not_trained_on_is_given_up() -> None:
    parts = [batch(), batch()]
    step = StepBatch(parts)
    step.keep(parts[:1])
    assert step.samples == 4
    assert len(list(step.tensors())) == 5
