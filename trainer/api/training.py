"""Training on a selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from siftclip.errors import InputError, ParameterError, require_path
from siftclip.selectors.core.base import Selector
from siftclip.trainer.api.nodes import node_of_selector
from siftclip.trainer.api.sections import (
    LoadingArguments,
    Options,
    PathLike,
    common_settings,
    data_settings,
    model_place,
    named_preset,
    recorded,
    require_known,
    require_type,
    trainer_settings,
    whole_model,
)
from siftclip.trainer.builders.selection import PoolSelection
from siftclip.trainer.losses.base import ContrastiveLoss
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.commands import SelectSections, TrainCommand
from siftclip.trainer.settings.data import BudgetSettings, ScaleSettings
from siftclip.trainer.settings.evaluation import EvalSettings
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.given import given_group, named_group
from siftclip.trainer.settings.logger import LoggerSettings
from siftclip.trainer.settings.loss import LossSettings, ObjectLoss
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.settings.online import OnlineSettings
from siftclip.trainer.settings.optim import OptimSettings
from siftclip.trainer.settings.store import configuration_names
from siftclip.trainer.stages.train import plan_stage, train_stage

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from siftclip.trainer.online.cost_profile import Forecast

GLOBAL_BATCH_SIZE = 4096  # DataComp's for its scales small and medium


class TrainArguments(LoadingArguments, total=False):
    """What training takes beside the model and its length.

    Each group is an object of its settings, a mapping of the options that differ from their
    defaults, or a name that the command line has for it, such as loss="siglip"; a loss may also be
    an object, and a `siftclip.trainer.ObjectLoss` if it needs a teacher.

    loss, optim, online, logger, evaluation (options of eval): these groups; in `online` selectors
    are objects. tasks: a folder of tasks that the trained model is evaluated on. budget: the length
    in another unit, such as {"seconds": 3600}. scale: a recipe, such as "datacomp_small", that sets
    length, batch, model and options of the optimiser where they are not given. seed: of weights,
    order and augmentation. run_dir: the folder of the run.
    """

    loss: Options | ContrastiveLoss
    optim: Options
    online: Options
    logger: Options
    evaluation: Options
    tasks: PathLike | None
    budget: Options
    scale: str | None
    seed: int
    run_dir: PathLike | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loop:
    """What a name of selection in the loop sets."""

    online: OnlineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """What a name of a model sets."""

    model: ModelSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """What a scale of the command line sets."""

    scale: ScaleSettings
    optim: OptimSettings
    model: ModelSettings


def train(
    selection: PoolSelection,
    model: str | ModelSettings | Mapping[str, Any] | None = None,
    pretrained: str | None = None,
    *,
    samples_seen: int | None = None,
    global_batch_size: int | None = None,
    **others: Unpack[TrainArguments],
) -> RunDir:
    """Train an open_clip model on a selection, as `siftclip train` does.

    A run that was interrupted continues from its last checkpoint; a finished one is returned.

    Args:
        selection: from `select` with a pool.
        model: its name in open_clip, or a name of the command line such as "vit_tiny"; or all of
            its settings, or those that differ.
        pretrained: an open_clip tag or a checkpoint file to begin with; None: random weights.
        samples_seen: to train on, repetitions counted; rounded up to full batches.
        global_batch_size: samples per step over all devices; None: 4096, DataComp's.
        **others: the groups `loss`, `optim`, `online`, `data`, `trainer`, `logger`, `evaluation`;
            `tasks`, a folder of tasks that the trained model is evaluated on; `budget`, the length
            in another unit; `scale`, the name of a recipe; `seed`, `run_dir`, `output_dir`,
            `progress`, `reuse`. See `siftclip.trainer.TrainArguments`.

    Raises:
        InputError: an option or a file is wrong; found before the first step where possible.
        HeldError: another process trains this run.
    """
    settings = train_settings(
        _sections(selection),
        model,
        pretrained,
        samples_seen=samples_seen,
        global_batch_size=global_batch_size,
        others=others,
    )
    return train_stage(settings, selected=selection)


def plan(
    selection: PoolSelection,
    model: str | ModelSettings | Mapping[str, Any] | None = None,
    pretrained: str | None = None,
    *,
    samples_seen: int | None = None,
    global_batch_size: int | None = None,
    **others: Unpack[TrainArguments],
) -> Forecast:
    """Forecast what `train` with these arguments will cost, from a few measured steps.

    Nothing is kept. Raises as `train`.
    """
    settings = train_settings(
        _sections(selection),
        model,
        pretrained,
        samples_seen=samples_seen,
        global_batch_size=global_batch_size,
        others=others,
    )
    return plan_stage(settings, selected=selection)


def _sections(selection: Any) -> SelectSections:
    """Return the options by which a selection was made."""
    way_out = "siftclip.select(pool, features, selector) makes one."
    return require_type("train", "selection", selection, PoolSelection, way_out).settings


def train_settings(
    selected: SelectSections,
    model: str | ModelSettings | Mapping[str, Any] | None,
    pretrained: str | None,
    *,
    samples_seen: int | None,
    global_batch_size: int | None,
    others: Mapping[str, Any],
) -> TrainCommand:
    """Return the options of a training; see `train` for the arguments."""
    require_known(train, others, TrainArguments)
    scale = others.get("scale")
    recipe = None if scale is None else named_preset(_Recipe, "train", "scale", scale)
    loss = _loss(others.get("loss"))
    trained = _model(model, pretrained, loss_name=loss.name, recipe=recipe)
    if samples_seen is None and others.get("budget") is None and recipe is None:
        raise ParameterError(
            "must be given, or budget, or scale: how long the run is",
            owner="train",
            parameter="samples_seen",
            value=None,
        )
    common = common_settings(
        {"output_dir": selected.common.output_dir, **others},
        seed=others.get("seed", 0),
        run_dir=others.get("run_dir"),
    )
    sections: dict[str, Any] = {
        "common": common,
        "pool": selected.pool,
        "features": selected.features,
        "selector": selected.selector,
        "trainer": trainer_settings(others) if "trainer" in others else selected.trainer,
        "data": data_settings(others),
        "model": trained,
        "loss": loss,
        "optim": _optim(others.get("optim"), recipe),
        "online": _online(others.get("online"), selected.features.name),
        "eval": _evaluation(others),
        "logger": given_group(LoggerSettings, "logger", others.get("logger")),
        "scale": _scale(samples_seen, global_batch_size, recipe),
        "budget": given_group(BudgetSettings, "budget", others.get("budget")),
    }
    return TrainCommand(**sections, composed=recorded(**sections))


def _scale(
    samples_seen: int | None, global_batch_size: int | None, recipe: _Recipe | None
) -> ScaleSettings:
    batch = GLOBAL_BATCH_SIZE if recipe is None else recipe.scale.global_batch_size
    batch = batch if global_batch_size is None else global_batch_size
    length = batch if recipe is None else recipe.scale.samples_seen  # another unit decides
    return ScaleSettings(
        samples_seen=length if samples_seen is None else samples_seen, global_batch_size=batch
    )


def _model(
    model: str | ModelSettings | Mapping[str, Any] | None,
    pretrained: str | None,
    *,
    loss_name: str,
    recipe: _Recipe | None,
) -> ModelSettings:
    if isinstance(model, ModelSettings):
        return whole_model(model, pretrained)
    beside = _beside(loss_name)
    if isinstance(model, Mapping):
        given = {**beside, **model}
    elif isinstance(model, str):
        given = {**_named_model(model), **beside}
    elif recipe is not None:
        given = {**to_plain(recipe.model), **beside}
    else:
        raise ParameterError(
            'must be given, such as "ViT-B-32"', owner="train", parameter="model", value=None
        )
    if pretrained is not None:
        given["pretrained"] = pretrained
    settings: ModelSettings = given_group(ModelSettings, "model", given)
    return settings


def _named_model(name: str) -> dict[str, Any]:
    """Return the options of a name of open_clip, or of one that the command line has."""
    if name not in configuration_names("model"):
        return {"name": model_place(name)}
    options: dict[str, Any] = to_plain(named_preset(_Named, "train", "model", name).model)
    return options


def _beside(loss_name: str) -> Mapping[str, Any]:
    """Return what a loss sets of the model, such as SigLIP's initial scale and bias."""
    beside: Mapping[str, Any] = named_group("loss", loss_name).beside.get("model", {})
    return beside


def _loss(given: Any) -> LossSettings:
    if isinstance(given, ContrastiveLoss):
        return ObjectLoss(loss=given)
    settings: LossSettings = given_group(LossSettings, "loss", given)
    return settings


def _optim(given: Any, recipe: _Recipe | None) -> OptimSettings:
    if recipe is not None and (given is None or isinstance(given, Mapping)):
        given = {**to_plain(recipe.optim), **(given or {})}
    settings: OptimSettings = given_group(OptimSettings, "optim", given)
    return settings


def _evaluation(others: Mapping[str, Any]) -> EvalSettings:
    tasks, given = others.get("tasks"), others.get("evaluation")
    if tasks is None:
        settings: EvalSettings = given_group(EvalSettings, "eval", given)
        return settings
    if isinstance(given, EvalSettings):
        rule = "must be given in evaluation, as its root, where that is a whole EvalSettings"
        raise ParameterError(rule, owner="train", parameter="tasks", value=tasks)
    root = require_path("tasks", tasks, owner="train")
    settings = given_group(EvalSettings, "eval", {"root": root, **(given or {})})
    return settings


def _online(given: Any, features: str) -> OnlineSettings:
    if isinstance(given, str):  # with the selector that the command line has for it
        more = f"features.name={features}"
        return named_preset(_Loop, "train", "online", given, more).online
    settings: OnlineSettings = given_group(
        OnlineSettings, "online", _with_nodes(given), follows={"features.name": features}
    )
    return settings


def _with_nodes(online: Any) -> Any:
    """Put nodes in the place of the selectors that select while a run trains."""
    if not isinstance(online, Mapping):
        return online
    features = online.get("features", "learner")
    placed = {**online}
    first = online.get("first_stage")
    if isinstance(first, Mapping) and isinstance(first.get("selector"), Selector):
        place = "online.first_stage.selector"
        node = node_of_selector(first["selector"], place=place, features=features)
        placed["first_stage"] = {**first, "selector": node}
    selector = online.get("selector")
    if isinstance(selector, Selector):
        placed["selector"] = node_of_selector(selector, place="online.selector", features=features)
    elif selector is not None:
        raise InputError(
            "online.selector must be a selector, such as siftclip.selectors.JEST(...). Got "
            f"{type(selector).__name__}."
        )
    return placed
