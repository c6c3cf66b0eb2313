"""The losses of contrastive training, right on any number of ranks.

`SoftmaxLoss` is CLIP's; `SigLipLoss` scores pairs one by one; `DistillLoss` adds what a teacher
says of each pair; `ReferenceGuidedLoss` learns what a reference model does not know yet. The
captioning term of CoCa is a sum of its own, `caption_loss_sum`; `CocaLoss` is the term beside it.
"""

from siftclip.trainer.losses.base import ContrastiveLoss, LossRun, mean_over_ranks
from siftclip.trainer.losses.caption import caption_loss_sum, caption_tokens
from siftclip.trainer.losses.coca import CocaLoss
from siftclip.trainer.losses.collectives import gather_features
from siftclip.trainer.losses.distill import DistillLoss
from siftclip.trainer.losses.inputs import LossInputs, check_weights
from siftclip.trainer.losses.reference import ReferenceGuidedLoss
from siftclip.trainer.losses.siglip import SigLipLoss
from siftclip.trainer.losses.softmax import SoftmaxLoss

__all__ = [
    "CocaLoss",
    "ContrastiveLoss",
    "DistillLoss",
    "LossInputs",
    "LossRun",
    "ReferenceGuidedLoss",
    "SigLipLoss",
    "SoftmaxLoss",
    "caption_loss_sum",
    "caption_tokens",
    "check_weights",
    "gather_features",
    "mean_over_ranks",
]
