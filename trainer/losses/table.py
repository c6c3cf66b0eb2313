"""The losses by their names: the built-in ones, and those that other distributions bring."""

from __future__ import annotations

from siftclip.plugins import LOSS_GROUP, PluginGroup
from siftclip.trainer.losses.base import ContrastiveLoss
from siftclip.trainer.losses.coca import CocaLoss
from siftclip.trainer.losses.distill import DistillLoss
from siftclip.trainer.losses.reference import ReferenceGuidedLoss
from siftclip.trainer.losses.siglip import SigLipLoss
from siftclip.trainer.losses.softmax import SoftmaxLoss

BUILT_IN: dict[str, type[ContrastiveLoss]] = {
    "clip": SoftmaxLoss,
    "siglip": SigLipLoss,
    "coca": CocaLoss,
    "distill": DistillLoss,
    "drrho": ReferenceGuidedLoss,
}
PLUGINS = PluginGroup(
    name=LOSS_GROUP,
    base=ContrastiveLoss,  # type: ignore[type-abstract]  # mypy 4717
    public_name="siftclip.trainer.ContrastiveLoss",
)
