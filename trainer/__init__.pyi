# The public names, imported when they are first asked for.
from .loop.checkpointing import StepCheckpoint as StepCheckpoint
from .loop.module import ClipTraining as ClipTraining
from .losses.base import ContrastiveLoss as ContrastiveLoss
from .losses.distill import DistillLoss as DistillLoss
from .losses.reference import ReferenceGuidedLoss as ReferenceGuidedLoss
from .losses.siglip import SigLipLoss as SigLipLoss
from .losses.softmax import SoftmaxLoss as SoftmaxLoss
from .online.choosing import choose_sub_batch as choose_sub_batch
from .online.schedule import Schedule as Schedule
from .optim.gradients import Objective as Objective
from .runtime.run_dir import RunDir as RunDir
from .settings.budget import Budget as Budget
from .settings.optim import OptimSettings as OptimSettings
