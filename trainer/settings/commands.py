"""What each command takes: the groups of options that its stage needs, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from siftclip.errors import InputError
from siftclip.trainer.settings.budget import budget_from
from siftclip.trainer.settings.common import CommonSettings, SelectOptions
from siftclip.trainer.settings.composed import Composed
from siftclip.trainer.settings.data import BudgetSettings, DataSettings, ScaleSettings
from siftclip.trainer.settings.evaluation import EvalSettings
from siftclip.trainer.settings.fields.marks import Needs
from siftclip.trainer.settings.lightning import TrainerSettings
from siftclip.trainer.settings.logger import LoggerSettings
from siftclip.trainer.settings.loss import LossSettings
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.settings.online import EveryStepSettings, OnceSettings, OnlineSettings
from siftclip.trainer.settings.optim import OptimSettings
from siftclip.trainer.settings.pool import FeaturesSettings, PoolSettings
from siftclip.trainer.settings.runs import (
    ReportSettings,
    ReproduceSettings,
    RunsGcSettings,
    RunsListSettings,
    RunsRmSettings,
    RunsSettings,
    RunsShowSettings,
)
from siftclip.trainer.settings.selector import SelectorNode
from siftclip.trainer.settings.subsets import (
    ShowSettings,
    SubsetCombineSettings,
    SubsetExportSettings,
    SubsetImportSettings,
    SubsetShowSettings,
    SubsetVerifySettings,
)
from siftclip.trainer.settings.tools import (
    BenchSettings,
    CompactSettings,
    CompareSettings,
    DemoSettings,
    DiffSettings,
    DownloadSettings,
    ExportSettings,
    TargetSettings,
    WatchSettings,
)

_BUDGET = Needs("needs a unit: budget.seconds=N, budget.flops=N or budget.loaded_samples=N.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSections:
    """What opening a pool takes; all of `siftclip index`."""

    common: CommonSettings
    pool: PoolSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectSections(PoolSections):
    """What scoring and selecting take; all of `siftclip score`."""

    features: FeaturesSettings
    selector: SelectorNode
    trainer: TrainerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectCommand(SelectSections):
    """`siftclip select`."""

    options: SelectOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactCommand(SelectSections):
    """`siftclip data compact`."""

    compact: CompactSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedCommand(PoolSections):
    """`siftclip embed`."""

    LATE: ClassVar[tuple[str, ...]] = ("features.model.name",)

    features: FeaturesSettings
    data: DataSettings
    trainer: TrainerSettings

    def __post_init__(self) -> None:
        _require_model(
            self.features,
            "embed needs a model: features=open_clip features.name=NAME features.model.name=MODEL. "
            "The features that a pool's metadata brings need no embedding.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetCommand:
    """`siftclip target`."""

    LATE: ClassVar[tuple[str, ...]] = ("features.model.name",)

    common: CommonSettings
    features: FeaturesSettings
    data: DataSettings
    trainer: TrainerSettings
    target: TargetSettings

    def __post_init__(self) -> None:
        _require_model(
            self.features,
            "target needs the model whose features the pool has: features=open_clip "
            "features.name=NAME features.model.name=MODEL.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSections:
    """What an evaluation takes, beside the model."""

    common: CommonSettings
    eval: EvalSettings
    data: DataSettings
    trainer: TrainerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalCommand(EvalSections):
    """`siftclip eval`."""

    model: ModelSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchCommand(EvalSections):
    """`siftclip eval watch`."""

    logger: LoggerSettings
    watch: WatchSettings
    composed: Composed


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffCommand:
    """`siftclip eval diff`."""

    eval: EvalSettings
    diff: DiffSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadCommand:
    """`siftclip eval download`."""

    common: CommonSettings
    eval: EvalSettings
    download: DownloadSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCommand:
    """`siftclip export`."""

    export: ExportSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetImportCommand:
    """`siftclip subset import`."""

    common: CommonSettings
    pool: PoolSettings | None
    subset_import: SubsetImportSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetExportCommand:
    """`siftclip subset export`."""

    common: CommonSettings
    pool: PoolSettings | None
    subset_export: SubsetExportSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetListCommand:
    """`siftclip subset list`."""

    common: CommonSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetShowCommand:
    """`siftclip subset show`."""

    common: CommonSettings
    subset_show: SubsetShowSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetCombineCommand:
    """`siftclip subset combine`."""

    common: CommonSettings
    subset_combine: SubsetCombineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetVerifyCommand:
    """`siftclip subset verify`."""

    common: CommonSettings
    pool: PoolSettings | None
    subset_verify: SubsetVerifySettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowCommand:
    """`siftclip show` and `siftclip diff`."""

    common: CommonSettings
    pool: PoolSettings | None
    data: DataSettings
    show: ShowSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsListCommand:
    """`siftclip runs list`."""

    common: CommonSettings
    runs_list: RunsListSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsShowCommand:
    """`siftclip runs show`."""

    common: CommonSettings
    runs_show: RunsShowSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsRmCommand:
    """`siftclip runs rm`."""

    common: CommonSettings
    runs: RunsSettings
    runs_rm: RunsRmSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsGcCommand:
    """`siftclip runs gc`."""

    common: CommonSettings
    runs: RunsSettings
    runs_gc: RunsGcSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainCommand(SelectSections):
    """`siftclip train`."""

    data: DataSettings
    model: ModelSettings
    loss: LossSettings
    optim: OptimSettings
    online: OnlineSettings
    eval: EvalSettings
    logger: LoggerSettings
    scale: ScaleSettings
    budget: Annotated[BudgetSettings, _BUDGET]
    composed: Composed

    def __post_init__(self) -> None:
        """Check what groups must be together, and needs neither a file nor a selector.

        Raises:
            InputError: an option does not go with one of another group.
        """
        budget_from(self.scale)
        online = self.online
        if isinstance(online, OnceSettings):
            return
        if online.weights == "ema" and self.optim.ema_decay is None:
            raise InputError(
                "online.weights=ema needs an average of the weights: set optim.ema_decay."
            )
        is_scaled = isinstance(online, EveryStepSettings) and online.scoring.image_size is not None
        if is_scaled and self.trainer.strategy == "fsdp":
            raise InputError(
                "online.scoring.image_size does not go with trainer.strategy=fsdp, whose position "
                "embeddings are sharded. Use trainer.strategy=ddp, or set it to null."
            )

    @property
    def evaluation(self) -> EvalSections:
        """What evaluating the trained model takes."""
        return EvalSections(
            common=self.common, eval=self.eval, data=self.data, trainer=self.trainer
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchCommand(TrainCommand):
    """`siftclip data bench`."""

    bench: BenchSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproduceCommand(TrainCommand):
    """`siftclip reproduce`."""

    reproduce: ReproduceSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareCommand(TrainCommand):
    """`siftclip compare`."""

    compare: CompareSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportCommand(CompareCommand):
    """`siftclip report`."""

    report: ReportSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoCommand:
    """`siftclip demo`."""

    PASSES_TO: ClassVar[tuple[type, ...]] = (CompareCommand,)  # what is typed holds there, too

    common: CommonSettings
    demo: DemoSettings


def _require_model(features: FeaturesSettings, message: str) -> None:
    """Refuse features without a model to embed with."""
    if features.model is None:
        raise InputError(message)


COMMANDS: dict[str, type] = {
    "index": PoolSections,
    "embed": EmbedCommand,
    "target": TargetCommand,
    "score": SelectSections,
    "select": SelectCommand,
    "train": TrainCommand,
    "eval": EvalCommand,
    "eval watch": WatchCommand,
    "eval diff": DiffCommand,
    "eval download": DownloadCommand,
    "export": ExportCommand,
    "compare": CompareCommand,
    "data compact": CompactCommand,
    "data bench": BenchCommand,
    "subset import": SubsetImportCommand,
    "subset export": SubsetExportCommand,
    "subset list": SubsetListCommand,
    "subset show": SubsetShowCommand,
    "subset combine": SubsetCombineCommand,
    "subset verify": SubsetVerifyCommand,
    "show": ShowCommand,
    "diff": ShowCommand,
    "report": ReportCommand,
    "reproduce": ReproduceCommand,
    "runs list": RunsListCommand,
    "runs show": RunsShowCommand,
    "runs rm": RunsRmCommand,
    "runs gc": RunsGcCommand,
    "demo": DemoCommand,
}
