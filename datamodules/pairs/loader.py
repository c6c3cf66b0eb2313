"""An iterable of plain batches, for training loops that are not Siftclip's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from siftclip.datamodules.pairs.forms import Form
from siftclip.datamodules.streaming.batches import SampleDataset
from siftclip.datamodules.streaming.datamodule import (
    OrderSampler,
    SelectionVersion,
    StepLoader,
    order_identity,
    require_order,
)
from siftclip.datamodules.streaming.load_counts import LoadCounts
from siftclip.datamodules.streaming.loader import LoaderOptions, StreamLoader, make_loader
from siftclip.datamodules.streaming.order import SampleOrder
from siftclip.errors import require_int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a training loop is."""

    batches: int  # done in all
    of_epoch: int  # of these, in the epoch that is under way


@dataclass(kw_only=True, eq=False)
class PairLoader:
    """The batches of one rank, an epoch each time it is iterated; `SelectedPairs.loader` makes it.

    Batches follow from the seed and their number alone, whatever ranks and workers there are. An
    epoch has `len(loader)` of them, which hold each selected sample once or more: passes over the
    selection are laid end to end, and what is left of the last batch begins the next pass.

    Iterating continues behind the last batch that was given, also after a `break`: `state_dict`
    inside a loop and `load_state_dict` in another process lose and repeat nothing.
    """

    order: SampleOrder
    dataset: SampleDataset
    counts: LoadCounts  # of this rank: samples, retries, bad samples
    form: Form
    options: LoaderOptions
    rank: int
    world_size: int
    pin_memory: bool = False
    find_progress: Callable[[], Progress] | None = None  # of a loop that counts by itself
    given: int = field(default=0, init=False)  # batches, of all epochs

    def __len__(self) -> int:
        """Count the batches of an epoch, the same on all ranks."""
        return -(-len(self.order.rows) // self.order.global_batch)

    @property
    def num_batches(self) -> int:
        """The batches of an epoch, under open_clip's name."""
        return len(self)

    @property
    def num_samples(self) -> int:
        """The samples of an epoch over all ranks, under open_clip's name."""
        return len(self) * self.order.global_batch

    @property
    def batch_size(self) -> int:
        """The samples of a batch, on each rank."""
        return self.order.global_batch // self.world_size

    @property
    def epoch(self) -> int:
        """The epoch that is under way, or begins next."""
        return self.given // len(self)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless it is the one under way, which then continues."""
        if require_int("epoch", epoch, minimum=0, owner=self) != self.epoch:
            self.given = epoch * len(self)

    def __iter__(self) -> Iterator[Any]:
        """Yield what is left of the epoch, each batch in its form.

        Raises:
            InputError: too many samples are bad, or the loader processes fail.
        """
        progress = self._progress()
        stop = progress.batches + len(self) - progress.of_epoch
        version = SelectionVersion(
            number=0, rows=self.order.rows, start_step=0, stop_step=stop, weights=None
        )
        steps = StepLoader(
            self._open, lambda step: version, start_step=progress.batches, total_steps=stop
        )
        for number, step in enumerate(steps, start=progress.batches + 1):
            (batch,) = step.micro_batches
            self.counts.add(batch)
            self.given = number
            yield self.form(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return where this loader is, and of which samples; plain values."""
        return {
            "given": self.given,
            "order": order_identity(self.order, self.dataset.reader.pool),
            **self.counts.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where another loader of the same samples was.

        Raises:
            InputError: it was one of other samples, or of another global batch.
        """
        require_order(state_dict["order"], order_identity(self.order, self.dataset.reader.pool))
        self.given = state_dict["given"]
        self.counts.load_state_dict(state_dict)

    def _progress(self) -> Progress:
        if self.find_progress is not None:
            return self.find_progress()
        return Progress(batches=self.given, of_epoch=self.given % len(self))

    def _open(self, version: SelectionVersion, step: int) -> tuple[StreamLoader, OrderSampler]:
        sampler = OrderSampler(
            order=self.order,
            global_batch=self.order.global_batch,
            start_step=step,
            total_steps=version.stop_step,
            rank=self.rank,
            world_size=self.world_size,
        )
        return make_loader(self.dataset, sampler, self.options, pin_memory=self.pin_memory), sampler
