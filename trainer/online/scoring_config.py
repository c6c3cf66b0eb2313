"""What `online.scoring` in the configuration says, apart from what computes the features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from siftclip.errors import InputError, require_choice, require_finite, require_int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringConfig:
    """How the features of a super-batch are computed.

    Raises:
        InputError: a value is out of range.
    """

    image_size: int | None = None  # pixels a side; None: the model's own
    patch_dropout: float = 0.0  # share of an image's patches that are left out, in [0, 1)
    precision: Literal["bf16"] | None = None  # None: that of training
    mode: Literal["eval", "train"] = "eval"

    def __post_init__(self) -> None:
        if self.image_size is not None:
            require_int("online.scoring.image_size", self.image_size, minimum=1)
        dropout = require_finite("online.scoring.patch_dropout", self.patch_dropout)
        if not 0.0 <= dropout < 1.0:
            raise InputError(
                "online.scoring.patch_dropout must be in the range [0, 1). "
                f"Got {self.patch_dropout!r}."
            )
        if self.precision not in (None, "bf16"):
            raise InputError(
                f"online.scoring.precision must be bf16, or null. Got {self.precision!r}."
            )
        require_choice("online.scoring.mode", self.mode, ("eval", "train"))
