"""The losses, each with the options that it has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Le

from siftclip.errors import InputError
from siftclip.trainer.settings.fields.section import Fraction, Positive, Section
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipLoss(Section):
    """CLIP's softmax contrastive loss, over the batches of all devices."""

    PLACE: ClassVar[str] = "loss"

    name: Literal["clip"] = "clip"
    """The loss."""

    weights: SampleWeights = field(default_factory=SampleWeights)
    """What each sample counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SigLipLoss(Section):
    """SigLIP's sigmoid loss (arXiv 2303.15343); loss=siglip also sets initial scale and bias."""

    PLACE: ClassVar[str] = "loss"

    name: Literal["siglip"] = "siglip"
    """The loss."""

    dist_impl: Literal["bidir", "shift", "reduce", "gather"] = "bidir"
    """How devices exchange texts, as in open_clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CocaLoss(Section):
    """CoCa's: the contrastive loss and the caption loss of the text decoder; for CoCa models."""

    PLACE: ClassVar[str] = "loss"

    name: Literal["coca"] = "coca"
    """The loss."""

    contrastive_weight: Positive = 1.0
    """Weight of the contrastive loss."""

    caption_weight: Positive = 2.0
    """Weight of the caption loss."""

    weights: SampleWeights = field(default_factory=SampleWeights)
    """What each sample counts, in both losses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillLoss(Section):
    """The contrastive loss and the distance from a teacher's similarities, as open_clip distils."""

    PLACE: ClassVar[str] = "loss"

    name: Literal["distill"] = "distill"
    """The loss."""

    teacher: Teacher = field(default_factory=Teacher)
    """The teacher: a model, or its cached features."""

    weights: SampleWeights = field(default_factory=SampleWeights)
    """What each sample counts."""

    def check(self) -> None:
        named = [
            key
            for key, name in (
                ("features", self.teacher.features.name),
                ("model", self.teacher.model.name),
            )
            if name is not None
        ]
        if len(named) != 1:
            raise InputError(
                "loss=distill needs one teacher: loss.teacher.model.name (an open_clip model) or "
                f"loss.teacher.features.name (cached features). Got {named or 'neither'}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrrhoLoss(Section):
    """DRRho (arXiv 2505.06699): a cached reference model says which negatives are worth the effort.

    Its authors' settings; they train without gamma, at the fixed temperature 0.01.
    """

    PLACE: ClassVar[str] = "loss"

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
        if self.teacher.features.name is None:
            raise InputError(
                "loss=drrho needs the cached features of a reference model: "
                "loss.teacher.features.name such as b32, whose arrays are b32_img and b32_txt."
            )


LossSettings: TypeAlias = ClipLoss | SigLipLoss | CocaLoss | DistillLoss | DrrhoLoss

# What loss=siglip also sets
SIGLIP_MODEL_OPTIONS = {"init_logit_scale": 2.302585093, "init_logit_bias": -10.0}  # ln 10
