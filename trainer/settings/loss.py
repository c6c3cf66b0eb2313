"""The losses, each with the options that it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Le

from siftclip.errors import InputError
from siftclip.plugins import LOSS_GROUP
from siftclip.trainer.settings.fields.marks import Example, Needs, Open
from siftclip.trainer.settings.fields.rules import hints
from siftclip.trainer.settings.fields.section import Fraction, Positive, Recorded, Section, to_plain
from siftclip.trainer.settings.model import TeacherModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleWeights(Section):
    """What each sample counts in the loss."""

    PLACE: ClassVar[str] = "loss.weights"

    path: str | None = None
    """Parquet file with uid and the column; null: all samples count alike."""

    column: str = "weight"
    """The column of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceFeatures(Section):
    """Cached features of a reference model."""

    PLACE: ClassVar[str] = "loss.teacher.features"

    name: str | None = None
    """The arrays are NAME_img and NAME_txt, such as DataComp's b32."""

    root: str | None = None
    """Folder of the npz files; null: the pool's metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFeatures(ReferenceFeatures):
    """Cached features of a teacher, which cost no forward pass."""

    logit_scale: Positive = 100.0
    """Scale of the teacher's similarities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher(Section):
    """One of two: a model, or its cached features."""

    PLACE: ClassVar[str] = "loss.teacher"

    model: TeacherModel = field(default_factory=TeacherModel)
    """A frozen model that sees the same images and tokens."""

    features: TeacherFeatures = field(default_factory=TeacherFeatures)
    """Its cached features, which cost no forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceTeacher(Section):
    """The reference of DRRho."""

    PLACE: ClassVar[str] = "loss.teacher"

    features: ReferenceFeatures = field(default_factory=ReferenceFeatures)
    """Cached features of the reference model."""


class LossSection(Section):
    """What the builders ask of any loss, whatever options it has."""

    __slots__ = ()

    PLACE: ClassVar[str] = "loss"
    OF_THE_RUN: ClassVar[tuple[str, ...]] = ("name", "teacher", "weights")

    name: str

    @property
    def title(self) -> str:
        """What messages call the loss: the option that chooses it."""
        return f"loss={self.name}"

    @property
    def short_name(self) -> str:
        """What names of folders call it."""
        return self.name

    @property
    def arguments(self) -> dict[str, Any]:
        """What its class is given, by the names of its arguments."""
        names = [name for name in hints(type(self)) if name not in self.OF_THE_RUN]
        return {name: getattr(self, name) for name in names}

    def option_of(self, argument: str) -> str:
        """Return the option that an argument of its class is read from."""
        return f"loss.{argument}"

    @property
    def sample_weights(self) -> SampleWeights | None:
        """The weights of samples; None if no file of them is named."""
        return None

    @property
    def cached_teacher(self) -> ReferenceFeatures | None:
        """The cached features of a teacher; None if none are named."""
        return None

    @property
    def live_teacher(self) -> TeacherModel | None:
        """The teacher that is a model; None if none is named."""
        return None


class WeightedSection(LossSection):
    """A loss in which samples can have weights."""

    __slots__ = ()

    weights: SampleWeights

    @property
    def sample_weights(self) -> SampleWeights | None:
        return None if self.weights.path is None else self.weights


class TaughtSection(LossSection):
    """A loss that can have a teacher."""

    __slots__ = ()

    teacher: Teacher | ReferenceTeacher

    @property
    def cached_teacher(self) -> ReferenceFeatures | None:
        return None if self.teacher.features.name is None else self.teacher.features

    @property
    def live_teacher(self) -> TeacherModel | None:
        if isinstance(self.teacher, ReferenceTeacher) or self.teacher.model.name is None:
            return None
        return self.teacher.model

    def check_teacher(self, kind: Literal["none", "features", "model_or_features"]) -> None:
        """Check that the teacher is of the kind that the class of the loss declares.

        Raises:
            InputError: it is another one, or is missing.
        """
        named = [
            key
            for key, teacher in (("features", self.cached_teacher), ("model", self.live_teacher))
            if teacher is not None
        ]
        if kind == "none" and named:
            raise InputError(
                f"{self.title} has no use for a teacher. Got {named}: leave loss.teacher out."
            )
        if kind == "features" and named != ["features"]:
            raise InputError(
                f"{self.title} needs the cached features of a reference model: "
                "loss.teacher.features.name such as b32, whose arrays are b32_img and b32_txt. "
                f"Got {named or 'none'}."
            )
        if kind == "model_or_features" and len(named) != 1:
            raise InputError(
                f"{self.title} needs one teacher: loss.teacher.model.name (an open_clip model) or "
                f"loss.teacher.features.name (cached features). Got {named or 'neither'}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipLoss(WeightedSection):
    """CLIP's softmax contrastive loss, over the batches of all devices."""

    name: Literal["clip"] = "clip"
    """The loss."""

    weights: SampleWeights = field(default_factory=SampleWeights)
    """What each sample counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SigLipLoss(LossSection):
    """SigLIP's sigmoid loss (arXiv 2303.15343); loss=siglip also sets initial scale and bias."""

    name: Literal["siglip"] = "siglip"
    """The loss."""

    dist_impl: Literal["bidir", "shift", "reduce", "gather"] = "bidir"
    """How devices exchange texts, as in open_clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CocaLoss(WeightedSection):
    """CoCa's: the contrastive loss and the caption loss of the text decoder; for CoCa models."""

    name: Literal["coca"] = "coca"
    """The loss."""

    contrastive_weight: Positive = 1.0
    """Weight of the contrastive loss."""

    caption_weight: Positive = 2.0
    """Weight of the caption loss."""

    weights: SampleWeights = field(default_factory=SampleWeights)
    """What each sample counts, in both losses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillLoss(TaughtSection, WeightedSection):
    """The contrastive loss and the distance from a teacher's similarities, as open_clip distils."""

    name: Literal["distill"] = "distill"
    """The loss."""

    teacher: Teacher = field(default_factory=Teacher)
    """The teacher: a model, or its cached features."""

    weights: SampleWeights = field(default_factory=SampleWeights)
    """What each sample counts."""

    def check(self) -> None:
        self.check_teacher("model_or_features")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrrhoLoss(TaughtSection, WeightedSection):
    """DRRho (arXiv 2505.06699): a cached reference model says which negatives are worth the effort.

    Its authors' settings; they train without gamma, at the fixed temperature 0.01.
    """

    name: Literal["drrho"] = "drrho"
    """The loss."""

    teacher: ReferenceTeacher = field(default_factory=ReferenceTeacher)
    """The reference model."""

    logit_scale: Annotated[float, Ge(1), Le(100)] | None = 100.0
    """The scale is kept at this; null: learned."""

    epsilon: Positive | None = 1.0e-4
    """Added to the mean over negatives; null: as a softmax has it."""

    rho: float | None = None
    """Of the constraint: loss + rho, times the temperature; for a learned one."""

    gamma: Fraction | None = None
    """Weight of the newest value in the moving average of a sample; null: no average."""

    weights: SampleWeights = field(default_factory=SampleWeights)
    """What each sample counts."""

    def check(self) -> None:
        self.check_teacher("features")


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginLoss(TaughtSection, WeightedSection):
    """A loss of another distribution, registered in the entry-point group siftclip.losses."""

    name: Literal["plugin"] = "plugin"
    """The loss."""

    plugin: Annotated[
        str,
        Needs(
            "must be given: the name under which a distribution registered its loss.",
            plugins=LOSS_GROUP,
        ),
        Example("my_loss"),
    ]
    """The name under which it is registered."""

    parameters: Annotated[Mapping[str, Any], Open(), Example("{gamma:2.0}")] = field(
        default_factory=dict
    )
    """Its own: what its class takes."""

    teacher: Teacher = field(default_factory=Teacher)
    """The teacher, for a loss that needs one: a model, or its cached features."""

    weights: SampleWeights = field(default_factory=SampleWeights)
    """What each sample counts, for a loss that takes weights."""

    @property
    def title(self) -> str:
        return f"loss.plugin={self.plugin}"

    @property
    def short_name(self) -> str:
        return self.plugin

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.parameters}

    def option_of(self, argument: str) -> str:
        return f"loss.parameters.{argument}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectLoss(PluginLoss, Recorded):
    """A loss that is given as an object, from Python alone; its run trains a copy of it."""

    plugin: str = "object"
    """No entry point."""

    loss: Any
    """A siftclip.trainer.ContrastiveLoss."""

    @property
    def title(self) -> str:
        return f"loss={type(self.loss).__name__}"

    @property
    def short_name(self) -> str:
        return type(self.loss).__name__

    def record(self) -> dict[str, Any]:
        # torch, which options do without
        from siftclip.selectors.core.description import Behind

        return {
            "name": "object",
            "loss": self.loss.description(Behind()),
            "teacher": to_plain(self.teacher),
            "weights": to_plain(self.weights),
        }


LossSettings: TypeAlias = ClipLoss | SigLipLoss | CocaLoss | DistillLoss | DrrhoLoss | PluginLoss

# What loss=siglip also sets
SIGLIP_MODEL_OPTIONS = {"init_logit_scale": 2.302585093, "init_logit_bias": -10.0}  # ln 10
