"""How samples are loaded, and how long a run is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

from annotated_types import Ge

from siftclip.errors import InputError
from siftclip.trainer.settings.fields.marks import AtMost
from siftclip.trainer.settings.fields.section import (
    Auto,
    Count,
    Positive,
    Seconds,
    Section,
    Workers,
)

Unit: TypeAlias = Literal["loaded_samples", "flops", "seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings(Section):
    """How samples get from the tars to the trainer."""

    PLACE: ClassVar[str] = "data"

    num_workers: Annotated[int, Ge(0), AtMost(1024)] | Auto = "auto"
    """Loader processes per rank; auto: its cores - 1, as far as memory allows; 0: none."""

    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    """How loader processes start; null: the platform's default."""

    prefetch_batches: Workers = 2
    """Batches that each loader process works ahead."""

    timeout_seconds: Seconds = 600
    """Seconds without a batch before the run stops (with loader processes); 0: never."""

    max_image_pixels: Count = 25000000
    """Larger images are bad samples; the header is checked before decoding."""

    resize: Literal["pillow", "torch", "gpu"] = "pillow"
    """pillow: open_clip's pixels; gpu: these, on CUDA; torch: faster, some differ a little."""

    shuffle_window_shards: Count | None = None
    """null: shuffle over the whole selection; N: over N tars at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSettings(Section):
    """Budget and batch of a run; scale=NAME sets both, and a recipe for the optimiser."""

    PLACE: ClassVar[str] = "scale"

    samples_seen: Annotated[int, Ge(1)]  # `budget_from` knows the most
    """Samples to train on, repetitions counted; rounded up to full batches."""

    global_batch_size: Annotated[int, Ge(2), AtMost(2**22)]
    """Samples per step, over all devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSettings(Section):
    """How long a run is in another unit, in place of scale.samples_seen; at most one of them."""

    PLACE: ClassVar[str] = "budget"

    loaded_samples: Positive | None = None
    """Samples to load, of which selection in the loop trains on a part."""

    flops: Positive | None = None
    """FLOPs of the models' forward and backward passes."""

    seconds: Positive | None = None
    """Seconds of training, estimated from a few measured steps."""

    @property
    def given(self) -> dict[Unit, float]:
        """The units that have an amount."""
        units: tuple[Unit, ...] = ("loaded_samples", "flops", "seconds")
        amounts = {unit: getattr(self, unit) for unit in units}
        return {unit: amount for unit, amount in amounts.items() if amount is not None}

    def check(self) -> None:
        if len(self.given) > 1:
            raise InputError(f"Only one of budget.* can limit a run. Got {self.given}.")
