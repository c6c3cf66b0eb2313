"""The model that is trained or evaluated, and other models that are loaded beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Lt

from siftclip.errors import InputError
from siftclip.redaction import begins_as_url
from siftclip.trainer.settings.fields.marks import AtMost, Example, Late, Needs, Open, Rare, Words
from siftclip.trainer.settings.fields.reader import read
from siftclip.trainer.settings.fields.rules import joined
from siftclip.trainer.settings.fields.section import Pixels, Section, Weights, WholeNumber

_NAME_NEEDS = Needs("must name a model: one of open_clip's, a run directory, or a folder.")
_PIXELS = Words("a number of pixels, or [height, width]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions(Section):
    """Options of open_clip; null: what the architecture says."""

    PLACE: ClassVar[str] = "model.options"

    force_quick_gelu: bool | None = None
    """Use QuickGELU, which OpenAI's weights were trained with."""

    force_custom_text: bool | None = None
    """Use open_clip's CustomTextCLIP, whose text tower is a module of its own."""

    force_patch_dropout: Annotated[
        Annotated[float, Ge(0), Lt(1)] | None, Words("a number in the range [0, 1)")
    ] = None
    """Fraction of the patches that a training step leaves out."""

    force_image_size: Annotated[Pixels | tuple[Pixels, ...] | None, _PIXELS] = None
    """Pixels, or [height, width]."""

    force_context_length: Annotated[
        Annotated[int, Ge(1), AtMost(8192)] | None, Words("a number of tokens, at least 1")
    ] = None
    """Tokens of a text."""

    image_mean: Annotated[
        tuple[float, ...] | None, Words("three numbers, for R, G and B"), Example("[0.5,0.5,0.5]")
    ] = None
    """Mean of R, G, B in [0, 1]."""

    image_std: Annotated[
        tuple[float, ...] | None, Words("three numbers above 0, for R, G and B")
    ] = None
    """Standard deviation of R, G, B in [0, 1]."""

    image_interpolation: Literal["bicubic", "bilinear", "random"] | None = None
    """Outside training."""

    image_resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """Outside training."""

    init_logit_scale: float | None = None
    """Of random weights: the logarithm of the scale, ln(1 / 0.07)."""

    init_logit_bias: float | None = None
    """Of random weights: SigLIP has -10; null: no bias."""

    nonscalar_logit_scale: bool | None = None
    """Keep the scale as a vector of one number, as some FSDP code needs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockSettings(Section):
    """Weights that keep their values in training (LiT: image=true)."""

    PLACE: ClassVar[str] = "model.lock"

    image: bool = False
    """Lock the image tower."""

    image_unlocked_groups: WholeNumber = 0
    """This many of the last groups of layers of the image tower are trained all the same."""

    image_freeze_bn_stats: bool = False
    """Also freeze the running statistics of batch norms."""

    text: bool = False
    """Lock the text tower."""

    text_unlocked_layers: WholeNumber = 0
    """This many of the last layers of the text tower are trained all the same."""

    text_freeze_layer_norm: bool = True
    """false trains the layer norms of a Hugging Face text tower."""

    def check(self) -> None:
        if not self.image and (self.image_unlocked_groups or self.image_freeze_bn_stats):
            raise InputError(
                "model.lock.image must be true, or image_unlocked_groups and image_freeze_bn_stats "
                "have no effect. Got False."
            )
        if not self.text and (self.text_unlocked_layers or not self.text_freeze_layer_norm):
            raise InputError(
                "model.lock.text must be true, or text_unlocked_layers and text_freeze_layer_norm "
                "have no effect. Got False."
            )


def _refuse_urls(model: ModelSettings | OtherModel) -> None:
    for name in ("name", "pretrained", "pretrained_image", "pretrained_text"):
        value = getattr(model, name)
        if value is not None and begins_as_url(value):
            raise InputError(
                f"{joined(model.PLACE, name)} must be a name, a tag or a file, and no "
                f"URL. Got {value!r}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings(Section):
    """Any model that open_clip knows, a model folder, or a run directory."""

    PLACE: ClassVar[str] = "model"

    name: Annotated[str, _NAME_NEEDS, Example("ViT-B-32")]
    """Name in open_clip such as ViT-B-32, hf-hub:org/repo, a model folder, or a run directory."""

    pretrained: Annotated[str | None, Example("openai")] = None
    """An open_clip tag (openai), or a checkpoint file; null: random weights."""

    pretrained_image: str | None = None
    """A file with the weights of the image tower, or of a model that has it."""

    pretrained_text: str | None = None
    """A file with the weights of the text tower, or of a model that has it."""

    weights: Weights = "auto"
    """Of a .ckpt with a moving average (EMA): auto and ema take it, raw does not."""

    architecture: Annotated[Mapping[str, Any] | None, Open()] = None
    """open_clip's embed_dim, vision_cfg, text_cfg, ...; the name is a label then."""

    augmentation: Annotated[Mapping[str, Any] | None, Open(), Example("{scale:[0.5,1.0]}")] = None
    """open_clip's aug_cfg; null: RandomResizedCrop with scale (0.9, 1)."""

    options: ModelOptions = field(default_factory=ModelOptions)
    """Options of open_clip; null: what the architecture says."""

    lock: LockSettings = field(default_factory=LockSettings)
    """Weights that keep their values in training."""

    def check(self) -> None:
        _refuse_urls(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherModel(Section):
    """A model that is loaded beside the one that is trained; null for its name: none."""

    name: str | None = None
    """As model.name."""

    pretrained: str | None = None
    """As model.pretrained."""

    architecture: Annotated[Mapping[str, Any] | None, Open()] = None
    """As model.architecture."""

    pretrained_image: Annotated[str | None, Rare()] = None
    """As model.pretrained_image."""

    pretrained_text: Annotated[str | None, Rare()] = None
    """As model.pretrained_text."""

    weights: Annotated[Weights | None, Rare()] = None
    """As model.weights."""

    augmentation: Annotated[Mapping[str, Any] | None, Rare(), Open()] = None
    """As model.augmentation."""

    options: Annotated[Mapping[str, Any] | None, Rare(), Open()] = None
    """As model.options."""

    def check(self) -> None:
        _refuse_urls(self)
        if self.options:
            read(ModelOptions, self.options, f"{self.PLACE}.options")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingModel(OtherModel):
    """The model that embeds the pool or the target tasks."""

    PLACE: ClassVar[str] = "features.model"

    name: Annotated[str | None, Late(), _NAME_NEEDS, Example("ViT-B-32")] = None
    """Name in open_clip, hf-hub:org/repo, a model folder, or a run directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherModel(OtherModel):
    """A frozen model that sees the same images and tokens."""

    PLACE: ClassVar[str] = "loss.teacher.model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel(OtherModel):
    """A live reference model, which takes the place of cached features."""

    PLACE: ClassVar[str] = "online.reference.model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerModel(OtherModel):
    """A small model, trained beside the learner, that scores in its place."""

    PLACE: ClassVar[str] = "online.scorer"

    options: Annotated[Mapping[str, Any], Open()] = field(default_factory=dict)
    """As model.options."""
