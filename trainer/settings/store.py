"""Gives Hydra the defaults of all groups of options; files in configs/ hold what differs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore

from siftclip.trainer.settings import (
    data,
    evaluation,
    lightning,
    logger,
    loss,
    online,
    runs,
    subsets,
    tools,
)
from siftclip.trainer.settings.common import CommonSettings, SelectOptions
from siftclip.trainer.settings.fields.marks import Follows, Late, Rare
from siftclip.trainer.settings.fields.rules import alternatives, hints, mark_of
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.settings.optim import OptimSettings
from siftclip.trainer.settings.pool import FeaturesSettings, PoolSettings
from siftclip.trainer.settings.selector import SelectorNode

# Groups that are defined in files: the defaults of these are of no one configuration.
_NOT_HERE = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A configuration that Hydra finds as if it were a file GROUP/NAME.yaml."""

    group: str | None  # None: at the top
    name: str
    kind: type
    package: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)  # other defaults in this configuration
    left_out: tuple[str, ...] = ()
    defaults: Sequence[Any] = ()  # Hydra's defaults list
    beside: Mapping[str, Any] = field(default_factory=dict)  # what it also sets, from the top on

    def own_values(self) -> dict[str, Any]:
        """Return the defaults of the group in this configuration."""
        values = {**node_of(self.kind), **self.changes}
        return {name: value for name, value in values.items() if name not in self.left_out}

    def node(self) -> dict[str, Any]:
        """Return what the file would hold."""
        values = self.own_values()
        if self.beside:
            values = {str(self.group): values, **self.beside}
        return {"defaults": [*self.defaults], **values} if self.defaults else values


_LOOP = ["_self_", {"/selector@selector": "clip_score"}]
STORED = (
    Stored(group=None, name="common_options", kind=CommonSettings, package="_global_"),
    Stored(group=None, name="select_options", kind=SelectOptions, package="_global_"),
    *(
        Stored(group=None, name=f"{kind.PLACE}_options", kind=kind, package=kind.PLACE)
        for kind in (
            *(data.BudgetSettings, tools.CompareSettings, tools.DemoSettings, tools.BenchSettings),
            *(tools.CompactSettings, tools.DiffSettings, tools.DownloadSettings),
            *(tools.WatchSettings, tools.ExportSettings, tools.TargetSettings),
            *(subsets.SubsetImportSettings, subsets.SubsetExportSettings),
            *(subsets.SubsetShowSettings, subsets.SubsetCombineSettings),
            subsets.ShowSettings,
            *(subsets.SubsetVerifySettings, runs.RunsSettings, runs.RunsListSettings),
            *(runs.RunsShowSettings, runs.RunsRmSettings, runs.RunsGcSettings),
            *(runs.ReportSettings, runs.ReproduceSettings),
        )
    ),
    Stored(group="pool", name="local", kind=PoolSettings),
    Stored(
        group="features",
        name="metadata",
        kind=FeaturesSettings,
        changes={"name": "l14", "model": None},
        left_out=("batch_size",),
    ),
    Stored(group="features", name="open_clip", kind=FeaturesSettings),
    Stored(group="data", name="default", kind=data.DataSettings),
    Stored(group="model", name="open_clip", kind=ModelSettings),
    Stored(group="loss", name="clip", kind=loss.ClipLoss),
    Stored(
        group="loss",
        name="siglip",
        kind=loss.SigLipLoss,
        package="_global_",
        beside={"model": {"options": loss.SIGLIP_MODEL_OPTIONS}},
    ),
    Stored(group="loss", name="coca", kind=loss.CocaLoss),
    Stored(group="loss", name="distill", kind=loss.DistillLoss),
    Stored(group="loss", name="drrho", kind=loss.DrrhoLoss),
    Stored(group="loss", name="plugin", kind=loss.PluginLoss),
    Stored(group="optim", name="adamw", kind=OptimSettings),
    Stored(group="trainer", name="default", kind=lightning.TrainerSettings),
    Stored(group="online", name="once", kind=online.OnceSettings),
    Stored(
        group="online",
        name="every_step",
        kind=online.EveryStepSettings,
        defaults=[
            "_self_",
            {"/selector@selector": "jest"},
            {"/selector@first_stage.selector": None},
        ],
    ),
    Stored(group="online", name="every_n_steps", kind=online.EveryNStepsSettings, defaults=_LOOP),
    Stored(
        group="online",
        name="every_epoch",
        kind=online.EveryNStepsSettings,
        changes={"cadence": "every_epoch", "every_n_steps": None},
        defaults=["_self_", {"/selector@selector": "infobatch"}],
    ),
    Stored(group="eval", name="default", kind=evaluation.EvalSettings),
    Stored(group="logger", name="wandb", kind=logger.LoggerSettings),
    Stored(
        group="logger",
        name="csv",
        kind=logger.LoggerSettings,
        changes={"wandb": False, "mode": "offline"},
    ),
    *(
        Stored(
            group="logger",
            name=name,
            kind=logger.LoggerSettings,
            changes={"wandb": False, name: True},
        )
        for name in ("tensorboard", "mlflow")
    ),
)


def node_of(kind: type) -> dict[str, Any]:
    """Return the defaults of a group of options, as a file of the configuration would have them."""
    node: dict[str, Any] = {}
    for entry in fields(kind):
        hint = hints(kind)[entry.name]
        value = _default_of(entry, hint)
        if mark_of(hint, Rare) is None and value is not _NOT_HERE:
            node[entry.name] = value
    return node


def _default_of(entry: Any, hint: Any) -> Any:
    follows = mark_of(hint, Follows)
    if follows is not None:
        return f"${{{follows.option}}}"
    if mark_of(hint, Late) is not None:
        return "???"
    if entry.default is not MISSING:
        return to_plain(entry.default)
    kinds = [alternative.plain for alternative in alternatives(hint) if alternative.is_group]
    if SelectorNode in kinds:
        return _NOT_HERE
    if kinds:  # also where a field of it follows another option, so that it has no default itself
        return node_of(kinds[0])
    return "???" if entry.default_factory is MISSING else to_plain(entry.default_factory())


@functools.cache
def configuration_groups() -> frozenset[str]:
    """Return the groups of which a command line chooses configurations: GROUP=NAME."""
    folders = [path.name for path in resources.files("siftclip.configs").iterdir() if path.is_dir()]
    of_files = (folder for folder in folders if not folder.startswith("_"))
    return frozenset({*of_files, *(each.group for each in STORED if each.group is not None)})


def configuration_names(group: str) -> list[str]:
    """Return the names that the command line has for a group."""
    folder = resources.files("siftclip.configs").joinpath(group)
    of_files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    stored = [each.name for each in STORED if each.group == group]
    return sorted({*stored, *(name.removesuffix(".yaml") for name in of_files)})


@contextmanager
def composing() -> Iterator[None]:
    """Let `hydra.compose` compose siftclip's commands as the console script, inside the block."""
    register()
    with hydra.initialize_config_module("siftclip.configs", version_base="1.3"):
        yield


@functools.cache
def register() -> None:
    """Make Hydra find these configurations."""
    for stored in STORED:
        ConfigStore.instance().store(
            group=stored.group,
            name=stored.name,
            node=stored.node(),
            package=stored.package,
            provider="siftclip",
        )
