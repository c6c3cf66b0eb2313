"""When a selection is made: once before training, or again while the model trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Lt

from siftclip.errors import InputError
from siftclip.trainer.settings.fields.marks import Follows, Needs, Words
from siftclip.trainer.settings.fields.section import (
    Auto,
    Count,
    Fraction,
    Pixels,
    Positive,
    Samples,
    Section,
    Share,
    WholeNumber,
)
from siftclip.trainer.settings.model import ReferenceModel, ScorerModel
from siftclip.trainer.settings.selector import SelectorNode

# A number, or [[share of training, value], ...] with ascending shares.
Course: TypeAlias = float | tuple[tuple[float, ...], ...]
_COURSE = Words(
    "a number, or knots [[share of training, value], ...] such as [[0.0, 0.0], [0.5, 0.8]]"
)
LoopWeights: TypeAlias = Literal["learner", "ema"]


def _selector_needs(option: str) -> Needs:
    return Needs(
        f"is a group of options: write selector@{option}=NAME, such as "
        f"selector@{option}=learnability."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OnceSettings(Section):
    """The selection is made once, before training."""

    PLACE: ClassVar[str] = "online"

    cadence: Literal["once"] = "once"
    """When a selection is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedReference(Section):
    """Cached features of a reference model."""

    PLACE: ClassVar[str] = "online.reference.features"

    name: Annotated[str, Follows("features.name")]
    """The arrays are NAME_img and NAME_txt."""

    logit_scale: Positive = 100.0
    """Logit scale of the model that made them."""

    logit_bias: float | None = None
    """Logit bias of the model that made them, if it was trained with a sigmoid loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveReference(Section):
    """What a selector calls "reference": cached features, or a live model."""

    PLACE: ClassVar[str] = "online.reference"

    features: CachedReference
    """Cached features of the reference model."""

    model: ReferenceModel = field(default_factory=ReferenceModel)
    """A live model, which takes the place of the cached features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference(Section):
    """What a selector calls "reference": cached features."""

    PLACE: ClassVar[str] = "online.reference"

    features: CachedReference
    """Cached features of the reference model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstStage(Section):
    """Chooses from a larger super-batch by cached features, before anything is read."""

    PLACE: ClassVar[str] = "online.first_stage"

    selector: Annotated[SelectorNode | None, _selector_needs("online.first_stage.selector")] = None
    """The selector of the first stage; null: no first stage."""

    filter_ratio: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Share of what it looks at that is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSettings(Section):
    """How selection runs over training; numbers, or courses [[share of training, value], ...]."""

    PLACE: ClassVar[str] = "online.schedule"

    filter_ratio: Annotated[Course | None, _COURSE] = None
    """Share of a super-batch that is not trained on; null: 1 - online.selector.fraction."""

    temperature: Annotated[Course | None, _COURSE] = None
    """Of draws by softmax(score / temperature); null: the best (jest: 1)."""

    uniform_fraction: Annotated[Course, _COURSE] = 0.0
    """Share of the sub-batch that is chosen at random."""

    warmup_steps: WholeNumber = 0
    """Steps without selection at the start."""

    start: Share = 0.0
    """Share of training before which steps are plain ones."""

    stop: Share = 1.0
    """Share of training from which on steps are plain ones."""

    def check(self) -> None:
        if self.start >= self.stop:
            raise InputError(
                "online.schedule.start must be below online.schedule.stop. Got "
                f"{self.start!r} and {self.stop!r}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSettings(Section):
    """The learner's forward pass over the super-batch; precision also a live reference's."""

    PLACE: ClassVar[str] = "online.scoring"

    image_size: Pixels | None = None
    """Lower resolution, such as 112 for 224; position embeddings are interpolated."""

    patch_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of a ViT's patches that are left out."""

    precision: Literal["bf16"] | None = None
    """Of the forward pass; null: that of training."""

    mode: Literal["eval", "train"] = "eval"
    """train: dropout and batch norms as in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosticsSettings(Section):
    """What is logged about the choices, every trainer.log_every_n_steps steps."""

    PLACE: ClassVar[str] = "online.diagnostics"

    offline: str | None = None
    """Parquet file with uid and score; null: the scores of `selector`, if it has some."""

    clusters: str | None = None
    """Parquet file with uid and cluster: how evenly clusters are chosen."""

    truth: Annotated[str | None, Follows("compare.truth")]
    """Parquet file with uid and kind: the share of each kind among the chosen."""

    record_chosen: bool = False
    """Write the rows that each step was trained on (chosen.npy in the run)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryStepSettings(Section):
    """Every step draws a super-batch, and online.selector chooses what is trained on.

    As much as it says with its fraction: 0.2 is JEST's filter ratio of 0.8. Any selector with
    scores, or jest; those that need no model's features of this step choose before anything is
    read. The selection of `selector` is what super-batches are drawn from.
    """

    PLACE: ClassVar[str] = "online"

    cadence: Literal["every_step"] = "every_step"
    """When a selection is made."""

    features: str = "learner"
    """What features.name means in online.selector: learner, or cached features."""

    weights: LoopWeights = "learner"
    """Weights of the scoring model: those that are trained, or their average (ema)."""

    groups: Count | Auto = "auto"
    """Equal shares are chosen of each group of a super-batch; auto: one group per device."""

    first_stage: FirstStage = field(default_factory=FirstStage)
    """Chooses from a larger super-batch by cached features, before anything is read."""

    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    """How selection runs over training."""

    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    """The learner's forward pass over the super-batch."""

    reference: LiveReference
    """What a selector calls "reference": cached features, or a live model."""

    scorer: ScorerModel = field(default_factory=ScorerModel)
    """What a selector calls "scorer": a small model, trained beside the learner."""

    diagnostics: DiagnosticsSettings
    """What is logged about the choices."""

    selector: Annotated[SelectorNode, _selector_needs("online.selector")]
    """Chooses what is trained on: selector@online.selector=NAME."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryNStepsSettings(Section):
    """Every N steps the samples of `selector` are embedded, and online.selector selects among them.

    The stream continues with what it keeps: a new version of the selection. A fraction is one of
    these samples. every_epoch does the same whenever all samples of a version have been drawn.
    """

    PLACE: ClassVar[str] = "online"

    cadence: Literal["every_n_steps", "every_epoch"] = "every_n_steps"
    """When a selection is made."""

    every_n_steps: Count | None = 1000
    """Steps between two selections; null with every_epoch."""

    features: str = "learner"
    """What features.name means in online.selector: learner, or cached features."""

    weights: LoopWeights = "learner"
    """Weights that embed: those that are trained, or their average (ema)."""

    pool_fraction: Fraction = 1.0
    """A random part of the samples is embedded and selected from, another one each time."""

    batch_size: Samples = 256
    """Samples that are embedded at once."""

    start: Share = 0.0
    """Share of training before which the stream is that of `selector`."""

    stop: Share = 1.0
    """Share of training from which on the stream is that of `selector`."""

    reference: Reference
    """What a selector calls "reference": cached features."""

    selector: Annotated[SelectorNode, _selector_needs("online.selector")]
    """Selects anew: selector@online.selector=NAME."""

    def check(self) -> None:
        if self.start >= self.stop:
            raise InputError(
                f"online.start must be below online.stop. Got {self.start!r} and {self.stop!r}."
            )
        if self.cadence == "every_n_steps" and self.every_n_steps is None:
            raise InputError("online.every_n_steps must be an integer of at least 1. Got None.")


OnlineSettings: TypeAlias = OnceSettings | EveryStepSettings | EveryNStepsSettings
LoopSettings: TypeAlias = EveryStepSettings | EveryNStepsSettings
