"""Evaluation in the middle of training: every N steps, by all ranks."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import InputError
from siftclip.eval.evaluate import EvalOptions, Evaluation, evaluate_tasks
from siftclip.eval.results.aggregates import result_averages
from siftclip.eval.tasks.preparation import PreparedTasks, prepare_tasks
from siftclip.ranks import OneRank, ProcessGroup, Ranks
from siftclip.trainer.loop.module import ClipTraining
from siftclip.trainer.models.sharding import whole_state
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.runtime.lightning_setup import local_ranks
from siftclip.trainer.runtime.step_clock import device_seconds
from siftclip.trainer.settings.commands import EvalSections
from siftclip.trainer.stages.evaluation import eval_options, tasks_from

PREFIX = "eval_during/"

log = logging.getLogger(__name__)


class EvaluateDuring(Callback):
    """Evaluates what would be written as the model: the average of the weights if there is one.

    Its seconds are no part of those of training. Lightning calls checkpoint callbacks last, so a
    run that is killed in an evaluation continues before it.
    """

    def __init__(
        self,
        clip: ClipModel,
        tasks: PreparedTasks,
        *,
        every_n_steps: int,
        options: EvalOptions,
        groups: Mapping[str, Sequence[str]],
        whole: nn.Module | None = None,
    ) -> None:
        """Set what is evaluated, and when.

        Args:
            clip: the model that is trained, before it is wrapped or sharded.
            tasks: indexed, so that faults are found before training.
            every_n_steps: optimizer steps between two evaluations.
            options: how.
            groups: averages to log. Those whose tasks are not all there are left out.
            whole: a copy of the model that takes in sharded weights; None where none are sharded.
        """
        self.clip = clip
        self.tasks = tasks
        self.every_n_steps = every_n_steps
        self.options = replace(options, resamples=0)
        self.groups = groups
        self.whole = whole

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, module: ClipTraining) -> None:
        start = device_seconds(module.device)  # what is queued belongs to training
        ranks: Ranks = ProcessGroup(module.device) if trainer.world_size > 1 else OneRank()
        evaluation = evaluate_tasks(
            self._evaluated(module),
            self.tasks,
            device=module.device,
            options=self.options,
            ranks=ranks,
        )
        module.evaluated = self._metrics(evaluation)
        seconds = time.perf_counter() - start
        for logger in trainer.loggers:
            logger.log_metrics(
                {**module.evaluated, f"{PREFIX}seconds": seconds}, step=trainer.global_step
            )
        module.meter.pause(time.perf_counter() - start)

    def _evaluated(self, module: ClipTraining) -> ClipModel:
        model = module.model if module.ema is None else module.ema.averaged
        if self.whole is None:
            return replace(self.clip, model=model)
        self.whole.load_state_dict(whole_state(model))
        return replace(self.clip, model=self.whole)

    def _metrics(self, evaluation: Evaluation) -> dict[str, float]:
        values = {f"{PREFIX}{result.key}": result.main_metric for result in evaluation.results}
        with options_of(under("eval", "groups")):
            averages = result_averages(evaluation.results, self.groups)
        for name, average in averages.items():
            if average.complete:
                values[f"{PREFIX}average/{name}"] = average.value
        return {name: value for name, value in values.items() if value is not None}


def evaluate_during_from(settings: EvalSections, clip: ClipModel) -> EvaluateDuring | None:
    """Build the callback that the settings ask for, if any. Before the model is wrapped.

    Raises:
        InputError: a task is missing or damaged.
    """
    during = settings.eval.during
    if during.every_n_steps is None:
        return None
    known = tasks_from(settings.eval, during=True)
    if known.missing:
        log.warning("eval.during: there is no folder of %s", ", ".join(known.missing))
    for message in known.damaged.values():
        raise InputError(f"eval.during: {message}")
    tasks = prepare_tasks(known.tasks, max_samples=during.max_samples)
    for failure in tasks.failures:
        raise InputError(f"eval.during: {failure.key}: {failure.message}")
    options = replace(eval_options(settings, ranks=local_ranks(settings.trainer)), cache=None)
    return EvaluateDuring(
        clip,
        tasks,
        every_n_steps=during.every_n_steps,
        options=options,
        groups=settings.eval.groups,
        whole=copy.deepcopy(clip.model) if settings.trainer.strategy == "fsdp" else None,
    )
