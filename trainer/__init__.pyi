# The public names, imported when they are first asked for.
from .budget import Budget as Budget
from .checkpointing import StepCheckpoint as StepCheckpoint
from .losses.distill import DistillLoss as DistillLoss
from .losses.objective import ContrastiveObjective as ContrastiveObjective
from .losses.reference import ReferenceGuidedLoss as ReferenceGuidedLoss
from .losses.siglip import SigLipLoss as SigLipLoss
from .losses.softmax import SoftmaxLoss as SoftmaxLoss
from .module import ClipTraining as ClipTraining
from .online.schedule import Schedule as Schedule
from .run_dir import RunDir as RunDir
