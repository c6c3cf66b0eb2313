"""What a run is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.trainer.builders.objective import LossData
from siftclip.trainer.builders.selection import PoolSelection
from siftclip.trainer.settings.common import CommonSettings
from siftclip.trainer.settings.data import DataSettings
from siftclip.trainer.settings.lightning import TrainerSettings
from siftclip.trainer.settings.loss import LossSettings
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.settings.online import OnlineSettings
from siftclip.trainer.settings.optim import OptimSettings
from siftclip.trainer.settings.pool import PoolSettings
from siftclip.trainer.settings.selector import SelectorNode


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """What a run is made of: the settings of its parts, and what they have been made into."""

    common: CommonSettings
    pool: PoolSettings
    data: DataSettings
    model: ModelSettings
    loss: LossSettings
    optim: OptimSettings
    trainer: TrainerSettings
    online: OnlineSettings
    selector: SelectorNode
    clip: ClipModel
    selected: PoolSelection
    loss_data: LossData
    folder: Path  # of the run
    global_batch_size: int
    world_size: int
    micro_batch_size: int | None  # samples that a device takes at a time; None: all of its batch

    @property
    def source(self) -> PoolSource:
        return self.selected.source
