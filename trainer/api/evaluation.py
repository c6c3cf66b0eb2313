"""Evaluation of a run, a checkpoint, or any open_clip model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import ParameterError, require_path
from siftclip.eval.reports.report import Summary
from siftclip.ranks import Ranks
from siftclip.trainer.api.sections import (
    LoadingArguments,
    Options,
    PathLike,
    common_settings,
    data_settings,
    model_place,
    named_preset,
    require_known,
    trainer_settings,
    whole_model,
)
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.runtime.hardware import check_hardware
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.commands import EvalCommand, EvalSections
from siftclip.trainer.settings.evaluation import EvalSettings
from siftclip.trainer.settings.given import given_group
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.stages.evaluation import (
    eval_share,
    eval_stage,
    results_path_for,
    tasks_from,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The results of `siftclip eval`, where they are, and who worked on them."""

    summary: Summary
    results: Path
    ranks: Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class _Suite:
    """What a suite of the command line sets."""

    eval: EvalSettings


def evaluate_settings(settings: EvalCommand) -> Evaluated:
    """Evaluate the model of some settings on their tasks, and keep the results.

    Raises:
        InputError: a model or a task is missing or damaged, or an option is wrong.
    """
    check_hardware(settings.trainer)
    tasks_from(settings.eval)  # before a model is loaded
    results = results_path_for(settings)
    share = eval_share(settings.trainer, may_launch=True)
    clip = clip_model_from(settings.model, trained=True)
    summary = eval_stage(settings, clip, results_path=results, share=share)
    return Evaluated(summary=summary, results=results, ranks=share.ranks)


def evaluate(
    model: RunDir | PathLike | ModelSettings | ClipModel,
    tasks: PathLike,
    pretrained: str | None = None,
    *,
    suite: str | None = None,
    names: list[str] | None = None,
    evaluation: Options = None,
    **common: Unpack[LoadingArguments],
) -> Summary:
    """Evaluate a model on zero-shot tasks, as `siftclip eval` does.

    Results are kept beside a run, or below `output_dir`, and not computed again.

    Args:
        model: what `train` returns, a run directory, a model folder, a name in open_clip, or all
            settings of a model. Results of a `ClipModel` in memory are not kept.
        tasks: a folder of tasks in clip_benchmark's layout, or one task.
        pretrained: an open_clip tag, or a checkpoint of the run.
        suite: what the tasks together are, such as "datacomp", "vtab" or "fast", with its averages.
        names: of the tasks; None: all, or those of the suite.
        evaluation: other options of the evaluation, such as {"resamples": 0}.
        **common: see `LoadingArguments`.

    Raises:
        InputError: a model or a task is missing or damaged, or an option is wrong. Tasks that fail
            are in the results, and others are evaluated nevertheless.
    """
    require_known(evaluate, common, LoadingArguments)
    sections = EvalSections(
        common=common_settings(common),
        eval=_eval_settings(tasks, suite, names, evaluation),
        data=data_settings(common),
        trainer=trainer_settings(common),
    )
    if isinstance(model, ClipModel):
        return eval_stage(sections, model, results_path=None)
    groups = {each.name: getattr(sections, each.name) for each in fields(sections)}
    return evaluate_settings(EvalCommand(**groups, model=_model(model, pretrained))).summary


def _model(model: Any, pretrained: str | None) -> ModelSettings:
    if isinstance(model, ModelSettings):
        return whole_model(model, pretrained)
    return ModelSettings(name=model_place(model), pretrained=pretrained)


def _eval_settings(
    tasks: PathLike, suite: str | None, names: list[str] | None, evaluation: Options
) -> EvalSettings:
    given: dict[str, Any] = {"root": require_path("tasks", tasks, owner="evaluate")}
    if names is not None:
        given["tasks"] = [*names]
    if isinstance(evaluation, Mapping):
        given = {**evaluation, **given}
    elif evaluation is not None:
        raise ParameterError(
            "must be a mapping of options",
            owner="evaluate",
            parameter="evaluation",
            value=evaluation,
        )
    if suite is not None:
        of_suite = named_preset(_Suite, "eval", "eval", suite).eval
        own = {"suite": of_suite.suite, "tasks": of_suite.tasks, "groups": of_suite.groups}
        given = {**own, **given}
    settings: EvalSettings = given_group(EvalSettings, "eval", given)
    return settings
