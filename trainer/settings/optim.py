"""The optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Lt, MinLen

from siftclip.errors import InputError
from siftclip.trainer.settings.fields.marks import Example, Open, Rare, Words
from siftclip.trainer.settings.fields.section import (
    Count,
    Fraction,
    NotNegative,
    Positive,
    Section,
    WholeNumber,
)

Schedule: TypeAlias = Literal["cosine", "const", "cooldown"]
DecayRule: TypeAlias = Literal["open_clip_3", "open_clip_4"]
_Beta: TypeAlias = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimSettings(Section):
    """open_clip's AdamW for ViTs with its cosine schedule.

    Raises:
        InputError: a value is out of range, or options would have no effect together.
    """

    PLACE: ClassVar[str] = "optim"

    lr: Positive = 5.0e-4
    """Learning rate at the peak, after the warm-up."""

    beta1: _Beta = 0.9
    """AdamW's decay of the mean of gradients."""

    beta2: _Beta = 0.98
    """AdamW's decay of the mean of squared gradients."""

    eps: Positive = 1.0e-6
    """AdamW's epsilon."""

    weight_decay: NotNegative = 0.2
    """AdamW's weight decay, see decay_rule."""

    warmup_steps: WholeNumber = 500
    """Steps over which the rate rises; part of the run, at most all of it."""

    grad_clip_norm: Positive | None = None
    """Clip the norm of all gradients together to this; null: no clipping."""

    schedule: Schedule = "cosine"
    """cosine: to 0; const; cooldown: constant, then down to cooldown_end_lr."""

    cooldown_steps: Count | None = None
    """How many of the last steps cool down, with schedule=cooldown."""

    cooldown_power: Positive = 1.0
    """Shape of the cooldown; 1: in a straight line."""

    cooldown_end_lr: NotNegative = 0.0
    """Where the cooldown ends: a learning rate, not a factor."""

    decay_rule: DecayRule = "open_clip_3"
    """DataComp's is open_clip_3; open_clip_4 also spares position embeddings weight decay."""

    no_decay: Annotated[
        tuple[Annotated[str, MinLen(1)], ...],
        Words("a list of patterns of parameter names, such as [visual.proj]"),
        Example("[token_embedding.*]"),
    ] = ()
    """More parameters without weight decay, by shell patterns of their names."""

    image_layer_decay: Fraction | None = None
    """Factor on lr for each layer of the image tower below the head, such as 0.75."""

    text_layer_decay: Fraction | None = None
    """The same for the text tower."""

    timm: Annotated[
        Mapping[str, Any] | None,
        Rare(),
        Open(),
        Words("a mapping with name, and arguments of that optimizer"),
        Example("{name:lion}"),
    ] = None
    """An optimizer of timm in AdamW's place, with lr, betas, eps and weight_decay from here."""

    ema_decay: Annotated[float, Gt(0), Lt(1)] | None = None
    """Also keep a moving average of the weights, such as 0.9999; it is what is evaluated."""

    def check(self) -> None:
        self._check_cooldown()
        if self.timm is not None and not isinstance(self.timm.get("name"), str):
            raise InputError(
                "optim.timm needs a name, that of an optimizer of timm such as lion, beside its "
                f"arguments. Got {dict(self.timm)!r}."
            )
        if self.no_decay and self.weight_decay == 0:
            raise InputError(
                f"optim.no_decay={list(self.no_decay)!r} has no effect with optim.weight_decay=0. "
                "Leave one of them out."
            )

    def _check_cooldown(self) -> None:
        if self.schedule == "cooldown":
            if self.cooldown_steps is None:
                raise InputError(
                    "optim.cooldown_steps is not set. It must be an integer of at least 1 with "
                    "optim.schedule=cooldown."
                )
            if self.cooldown_end_lr >= self.lr:
                raise InputError(
                    f"optim.cooldown_end_lr must be below optim.lr={self.lr!r}. "
                    f"Got {self.cooldown_end_lr!r}."
                )
            return
        unused = {"cooldown_steps": None, "cooldown_power": 1.0, "cooldown_end_lr": 0.0}
        for name, default in unused.items():
            if getattr(self, name) != default:
                raise InputError(
                    f"optim.{name}={getattr(self, name)!r} has no effect with "
                    f"optim.schedule={self.schedule}. Set optim.schedule=cooldown, or leave it out."
                )
