"""The watch stage: a run's checkpoints are evaluated as they come, beside the training."""

from __future__ import annotations

import logging
import re
import reprlib
import time
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.clip_models import ClipModel
from siftclip.datamodules.locks import LOCK_NAME, locked
from siftclip.datamodules.model_weights import require_weights_choice
from siftclip.eval.report import Summary
from siftclip.eval.results import read_results
from siftclip.selectors.errors import InputError, require_finite
from siftclip.trainer.evaluation import eval_stage, log_records, tasks_from
from siftclip.trainer.models import checkpoint_options, clip_model_from
from siftclip.trainer.run_dir import METRICS_NAME, RunDir
from siftclip.trainer.run_records import read_config, read_metrics
from siftclip.trainer.stages import plain

FOLDER = "eval_watch"
_STEP = re.compile(r"step-(\d+)\.ckpt")

log = logging.getLogger(__name__)


def watch_stage(config: DictConfig) -> Iterator[tuple[int, Summary]]:
    """Evaluate each checkpoint of a run, oldest first, until the run is finished.

    Results go to `eval_watch/` in the run directory, those of chosen weights to `eval_watch-raw/`
    or `eval_watch-ema/`: `step-N.jsonl` for each checkpoint, and the log `metrics.jsonl` by step,
    which also goes to wandb as a run of its own. A checkpoint with results of all tasks is passed
    over, and one with some of them gets the others.

    Args:
        config: of the command.

    Yields:
        Steps with their results.

    Raises:
        HeldError: another command watches the run.
        InputError: an option is wrong, or there is no run.
    """
    if OmegaConf.is_missing(config.watch, "run"):
        raise InputError("watch.run must name a run directory: siftclip eval watch RUN.")
    run = RunDir(path=Path(config.watch.run))
    interval = require_finite("watch.interval_seconds", config.watch.interval_seconds)
    if interval <= 0:
        raise InputError(f"watch.interval_seconds must be above 0. Got {interval!r}.")
    require_weights_choice("watch.weights", config.watch.weights)
    if not (run.path / "config.yaml").is_file():
        raise InputError(
            f"watch.run={config.watch.run!r} must be the directory of a run. It has no config.yaml."
        )
    folder = watch_folder(config)
    names = {task.name for task in tasks_from(config).tasks}  # before any waiting
    with locked(folder / LOCK_NAME, owner=str(folder)):
        yield from _watch(config, run, folder, names)


def _watch(
    config: DictConfig, run: RunDir, folder: Path, names: set[str]
) -> Iterator[tuple[int, Summary]]:
    from siftclip.trainer.loggers import finish, log_tables, make_loggers

    logged = {record["step"] for record in read_metrics(folder / METRICS_NAME)}
    done: set[int] = set()  # by this call, with or without success
    loggers = make_loggers(
        folder,
        name=f"{run.path.name}-eval",
        wandb_enabled=config.logger.wandb,
        mode=config.logger.mode,
        project=config.logger.project,
        config=plain(config),
    )
    try:
        while True:
            finished = run.summary is not None  # looked at before the checkpoints: none can follow
            for step, path in _checkpoints(run):
                results = folder / f"step-{step}.jsonl"
                found = {result.key for result in read_results(results)}
                if step in done or (step in logged and names <= found):
                    continue
                done.add(step)
                clip = _load(run, path, str(config.watch.weights))
                if clip is None:
                    continue
                summary = eval_stage(config, clip, results_path=results)
                for logger in loggers:
                    logger.log_metrics(summary.metrics(), step=step)
                log_tables(loggers, log_records(summary))
                yield step, summary
            if finished or config.watch.once:
                return
            time.sleep(config.watch.interval_seconds)
    finally:
        finish(loggers)


def watch_folder(config: DictConfig) -> Path:
    """Where the results are."""
    weights = str(config.watch.weights)
    name = FOLDER if weights == "auto" else f"{FOLDER}-{weights}"
    return Path(config.watch.run) / name


def _checkpoints(run: RunDir) -> list[tuple[int, Path]]:
    found = []
    for path in run.checkpoints.glob("step-*.ckpt"):
        match = _STEP.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def _load(run: RunDir, checkpoint: Path, weights: str) -> ClipModel | None:
    """The model of a checkpoint; None if the training has removed the file in between."""
    path = run.path / "config.yaml"
    settings = read_config(path).get("model")
    if not isinstance(settings, dict) or "name" not in settings or "${" in str(settings):
        raise InputError(  # a run's configuration is written with all references resolved
            f"{path} must hold the model of a run, with a name. Got {reprlib.repr(settings)}."
        )
    node = OmegaConf.create(settings)
    initial = dict.fromkeys(("pretrained_image", "pretrained_text"))  # the checkpoint has both
    changed = {"pretrained": str(checkpoint), "weights": weights, **initial}
    model = OmegaConf.merge(node, changed, {"options": checkpoint_options(node)})
    try:
        return clip_model_from(model, "model", trained=True)
    except InputError:
        if checkpoint.exists():
            raise
        log.warning(
            "%s was removed before it could be evaluated. trainer.keep_every_n_steps keeps more.",
            checkpoint,
        )
        return None
