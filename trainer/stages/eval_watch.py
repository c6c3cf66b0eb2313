"""The watch stage: a run's checkpoints are evaluated when they appear, beside the training."""

from __future__ import annotations

import logging
import reprlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import InputError
from siftclip.eval.reports.report import Summary
from siftclip.eval.results.files import read_results
from siftclip.locks import LOCK_NAME, locked
from siftclip.trainer.builders.models import checkpoint_options, clip_model_from
from siftclip.trainer.runtime.run_dir import METRICS_NAME, RunDir, checkpoints_in
from siftclip.trainer.runtime.run_records import read_config, read_metrics
from siftclip.trainer.runtime.tracking.packages import check_packages
from siftclip.trainer.settings.commands import WatchCommand
from siftclip.trainer.settings.fields.reader import read, read_kept
from siftclip.trainer.settings.fields.section import Weights
from siftclip.trainer.settings.model import ModelOptions, ModelSettings
from siftclip.trainer.settings.tools import WatchSettings
from siftclip.trainer.stages.evaluation import eval_stage, log_records, tasks_from

FOLDER = "eval_watch"

log = logging.getLogger(__name__)


def watch_stage(settings: WatchCommand) -> Iterator[tuple[int, Summary]]:
    """Evaluate each checkpoint of a run, oldest first, until the run is finished.

    Results go to `eval_watch/` in the run directory, those of chosen weights to `eval_watch-raw/`
    or `eval_watch-ema/`: `step-N.jsonl` for each checkpoint, and the log `metrics.jsonl` by step,
    which also goes to wandb as a run of its own. A checkpoint with results of all tasks is passed
    over, and one with some of them gets the others.

    Args:
        settings: of the command.

    Yields:
        Steps with their results.

    Raises:
        HeldError: another command watches the run.
        InputError: an option is wrong, or there is no run.
    """
    watch = settings.watch
    run = RunDir(path=Path(watch.run))
    if not run.config.is_file():
        raise InputError(
            f"watch.run={watch.run!r} must be the directory of a run. It has no config.yaml."
        )
    check_packages(settings.logger)
    folder = watch_folder(watch)
    names = {task.name for task in tasks_from(settings.eval).tasks}  # before any waiting
    with locked(folder / LOCK_NAME, owner=str(folder)):
        yield from _watch(settings, run, folder, names)


def _watch(
    settings: WatchCommand, run: RunDir, folder: Path, names: set[str]
) -> Iterator[tuple[int, Summary]]:
    from siftclip.trainer.runtime.loggers import (
        RunKind,
        catch_up,
        finish,
        log_summary,
        log_tables,
        make_loggers,
    )

    watch = settings.watch
    logged = {record["step"] for record in read_metrics(folder / METRICS_NAME)}
    done: set[int] = set()  # by this call, with or without success
    faults: list[InputError] = []  # of checkpoints that cannot be loaded
    loggers = make_loggers(
        folder,
        settings.logger,
        kind=RunKind(name=f"{run.path.name}-eval", job_type="eval"),
        output_root=settings.common.output_root,
        config=settings.composed.values,
    )
    catch_up(loggers, read_metrics(folder / METRICS_NAME))
    try:
        while True:
            finished = run.summary is not None  # looked at before the checkpoints: none can follow
            for step, path in checkpoints_in(run.checkpoints).items():
                results = folder / f"step-{step}.jsonl"
                evaluated = {result.key for result in read_results(results)}
                if step in done or (step in logged and names <= evaluated):
                    continue
                done.add(step)
                try:
                    clip = _load(run, path, watch.weights)
                except InputError as error:  # the others can be evaluated all the same
                    faults.append(error)
                    continue
                if clip is None:
                    continue
                summary = eval_stage(settings, clip, results_path=results)
                for each in loggers:
                    each.log_metrics(summary.metrics(), step=step)
                log_tables(loggers, log_records(summary), step=step)
                yield step, summary
            if finished or watch.once:
                log_summary(loggers, read_metrics(folder / METRICS_NAME))
                if faults:
                    raise faults[0]
                return
            time.sleep(watch.interval_seconds)
    finally:
        finish(loggers)


def watch_folder(watch: WatchSettings) -> Path:
    """Return where the results are."""
    name = FOLDER if watch.weights == "auto" else f"{FOLDER}-{watch.weights}"
    return Path(watch.run) / name


def _load(run: RunDir, checkpoint: Path, weights: Weights) -> ClipModel | None:
    """Load the model of a checkpoint; None if the training has removed the file in between."""
    path = run.config
    kept = read_config(path).get("model")
    if not isinstance(kept, dict) or "name" not in kept or "${" in str(kept):
        raise InputError(  # a run's configuration is written with all references resolved
            f"{path} must hold the model of a run, with a name. Got {reprlib.repr(kept)}."
        )
    trained = read_kept(ModelSettings, kept, "model")
    model = replace(
        trained,
        pretrained=str(checkpoint),
        weights=weights,
        pretrained_image=None,  # the checkpoint has both
        pretrained_text=None,
        options=read(ModelOptions, checkpoint_options(trained), "model.options"),
    )
    try:
        return clip_model_from(model, trained=True)
    except InputError:
        if checkpoint.exists():
            raise
        log.warning(
            "%s was removed before it could be evaluated. trainer.keep_every_n_steps keeps more.",
            checkpoint,
        )
        return None
