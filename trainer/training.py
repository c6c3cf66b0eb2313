"""The train stage: select, stream, train, write the model, evaluate; continues where it was."""

from __future__ import annotations

import json
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from siftclip.datamodules.clip_models import save_model_folder
from siftclip.datamodules.files import identity_hash
from siftclip.datamodules.identities import (
    differences,
    kept_identity,
    say_reused,
    say_why_not,
)
from siftclip.datamodules.locks import locked
from siftclip.datamodules.model_options import check_options
from siftclip.datamodules.model_record import model_record
from siftclip.datamodules.order import rank_slice, require_window
from siftclip.datamodules.pool import Pool
from siftclip.datamodules.towers import LockConfig
from siftclip.selectors.errors import InputError, require_int
from siftclip.selectors.ranks import Ranks, of_first_rank
from siftclip.trainer.budget import Budget, budget_from, limit_from
from siftclip.trainer.build.options import options_of, under
from siftclip.trainer.cores import share_cores
from siftclip.trainer.environment import (
    CODE,
    TARS,
    Environment,
    environment,
    environments,
    keep_environment,
)
from siftclip.trainer.evaluation import eval_share, eval_stage, log_records, tasks_from
from siftclip.trainer.launch import check_world_size
from siftclip.trainer.lightning_setup import (
    expected_world_size,
    loader_options,
    make_trainer,
    resolve_precision,
)
from siftclip.trainer.models import activations_of_weights, lock_options, model_files
from siftclip.trainer.objective import LossData, check_loss, open_loss_data
from siftclip.trainer.online.options import check_online, schedule_from
from siftclip.trainer.optim import OptimConfig
from siftclip.trainer.run_dir import IDENTITY_NAME, SUMMARY_NAME, RunDir, is_rank_zero, step_of
from siftclip.trainer.schedules import check_schedule
from siftclip.trainer.stages import SelectOutcome, output_root, plain, select_stage

# What imports Lightning or builds models is imported where it is needed: that takes seconds, in
# which the options have been checked and the selection made.
if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from siftclip.trainer.online.planner import Forecast
    from siftclip.trainer.online.setup import RunParts

log = logging.getLogger(__name__)


_DATA = ("shuffle_window_shards", "resize", "max_image_pixels")  # options that move weights


def run_identity(
    config: DictConfig, selected: SelectOutcome, loss_data: LossData
) -> dict[str, Any]:
    """Everything that the trained weights depend on; devices and workers do not belong to it."""
    from siftclip.trainer.online.setup import online_identity

    return kept_identity(
        "run",
        {
            "selection": selected.selection.digest,
            "pool": selected.pool.fingerprint,
            "members": selected.pool.members_digest,
            "model": {**plain(config.model), "files": model_files(config.model)},
            "activations": activations_of_weights(config),
            "optim": plain(config.optim),
            "loss": plain(config.loss),
            "loss_data": loss_data.identity,
            "scale": plain(config.scale),
            "budget": plain(config.budget),
            "online": online_identity(config, selected.source),
            "data": {key: config.data[key] for key in _DATA},
            "precision": resolve_precision(config.trainer.precision),
            "seed": config.seed,
        },
    )


def run_environment(config: DictConfig, pool: Pool) -> Environment:
    """What this session computes with, and which tars it reads."""
    options = loader_options(config)
    share_cores(options.num_workers)
    computed_with = environment(
        ranks=expected_world_size(config),
        loader_workers=options.num_workers,
        precision=resolve_precision(config.trainer.precision),
    )
    return {**computed_with, TARS: pool.tars_stamp}


def warn_of_other_code(run: RunDir, now: Environment) -> None:
    """Say if a finished run was made with other code than this, or of tars that may be others.

    A copy of a pool has other times, so that these are no reason to train again.
    """
    for before in environments(run.path)[-1:]:
        changed = [
            f"{name} {before.get(name)}, here {now.get(name)}"
            for name in CODE
            if before.get(name) != now.get(name)
        ]
        if changed:
            log.warning(
                "%s was made with other code: %s. reuse=false trains it again.",
                run.path,
                "; ".join(changed),
            )
        if before.get(TARS) not in (None, now[TARS]):
            log.warning(
                "%s was trained on tars that have been written or copied since. If their images or "
                "captions are others now, train again with reuse=false.",
                run.path,
            )


def run_dir_for(config: DictConfig, selected: SelectOutcome, identity: dict[str, Any]) -> RunDir:
    """The run's directory: `run_dir`, or one whose name stands for what the run depends on.

    Args:
        config: of the command.
        selected: what is trained on.
        identity: of the run.

    Raises:
        InputError: `run_dir` holds another run.
    """
    name = selected.selection.manifest["selector"]
    if config.online.cadence != "once":
        name += f"+{config.online.selector.name}"
    if config.run_dir is None:
        root = output_root(config) / "train"
        run = RunDir(path=root / f"{name}-s{config.seed}-{identity_hash(identity)[:8]}")
        if is_rank_zero() and not run.path.exists():
            kept = root.glob(f"{name}-s{config.seed}-*/{IDENTITY_NAME}")
            say_why_not("the run", identity, kept, like="scale")
        return run
    run = RunDir(path=Path(config.run_dir))
    # through JSON, which has no tuples
    if run.has_started and run.identity() != json.loads(json.dumps(identity, default=str)):
        reasons = "; ".join(differences(run.identity() or {}, identity))
        raise InputError(
            f"run_dir={config.run_dir!r} holds a run with another selection, model, budget or "
            f"seed, or of other code or files. Different: {reasons}. Name another run_dir, or "
            "delete that one."
        )
    return run


def train_stage(config: DictConfig, *, wait: bool = False) -> RunDir:
    """Train one model on one selection, and evaluate it if `eval.root` is set.

    A finished run is returned as it is; an interrupted one continues from its last checkpoint.
    With `reuse=false` either is set aside, under another name, and the run begins anew.

    Args:
        config: of the command.
        wait: for another process that trains this very run, instead of raising.

    Raises:
        HeldError: another process trains this run.
        InputError: an option or a file is wrong; found before the first step where possible.
    """
    _check_options(config)
    if is_rank_zero():
        _say_what_begins(config)
    selected = select_stage(config)
    loss_data = open_loss_data(config, selected)
    identity = run_identity(config, selected, loss_data)
    run, ranks = run_dir_for(config, selected, identity), selected.source.ranks
    if not of_first_rank(ranks, config.reuse and run.summary is not None):
        with _alone(run, ranks, wait=wait):
            run_dir_for(config, selected, identity)  # again: another may have begun it since
            if not of_first_rank(ranks, config.reuse and run.summary is not None):
                _train(config, run, selected, loss_data, identity)
                return run
    if ranks.rank == 0:
        say_reused("the finished run", run.path / SUMMARY_NAME)
        warn_of_other_code(run, run_environment(config, selected.pool))
    if config.eval.root is not None:
        share = eval_share(config, may_launch=False)
        eval_stage(config, run.path, results_path=run.results, share=share, wait=True)
    return run


def _alone(run: RunDir, ranks: Ranks, *, wait: bool) -> AbstractContextManager[None]:
    """Keep other commands from the run."""
    if ranks.size == 1 and not is_rank_zero():
        return nullcontext()  # Lightning has started this process; the first one holds the lock
    return locked(run.lock, owner=f"The run {run.path}", ranks=ranks, wait=wait)


def _train(
    config: DictConfig,
    run: RunDir,
    selected: SelectOutcome,
    loss_data: LossData,
    identity: dict[str, Any],
) -> None:
    """All that a run is, from where it is."""
    from siftclip.trainer.loggers import finish, make_loggers

    now = run_environment(config, selected.pool)
    if is_rank_zero():
        if not config.reuse and run.has_started:
            log.info("reuse=false: the run of before is now %s", run.set_aside())
        checkpoint = run.latest_checkpoint()
        run.start(config, selected.selection, identity)
        step = 0 if checkpoint is None else step_of(checkpoint)
        changed = keep_environment(run.path, now, step=step)
        if changed:
            log.warning(
                "the run continues at step %d on something else: %s. From here on it differs from "
                "an uninterrupted run as another seed does (docs/training.md).",
                step,
                "; ".join(changed),
            )
    selected.source.ranks.barrier()  # none looks at the run before the first has begun it
    loggers = make_loggers(
        run.path,
        name=run.path.name,
        wandb_enabled=config.logger.wandb,
        mode=config.logger.mode,
        project=config.logger.project,
        config=plain(config),
    )
    # without reuse, other ranks may look before the first has set the old run aside
    if not config.reuse or not run.has_model:
        _fit(config, run, selected, loss_data, loggers)
    _evaluate(config, run, loggers)
    if is_rank_zero():
        _conclude(config, run, selected, loggers)
    finish(loggers)


def plan_stage(config: DictConfig) -> Forecast:
    """What a run of this configuration will cost, from a few measured steps. Nothing is kept.

    Raises:
        InputError: an option or a file is wrong.
    """
    _check_options(config)
    selected = select_stage(config)
    loss_data = open_loss_data(config, selected)
    share_cores(loader_options(config).num_workers)
    parts = _run_parts(config, selected, loss_data, output_root(config))
    from siftclip.trainer.planning import forecast

    return forecast(parts, _resolved_budget(parts))


def _check_options(config: DictConfig) -> None:
    """All that can be known to be wrong before any file is read."""
    check_loss(config)
    check_online(config)
    limit = limit_from(config)
    loader_options(config)
    with options_of({"window_shards": "data.shuffle_window_shards"}):
        require_window(config.data.shuffle_window_shards)
    require_int("seed", config.seed, minimum=0)
    with options_of(lock_options("model")):
        LockConfig(**(plain(config.model.get("lock")) or {}))
    with options_of(under("model", "options")):
        check_options(plain(config.model.get("options")) or {})
    budget = budget_from(config)
    if limit is None:
        check_schedule(OptimConfig(**plain(config.optim)), budget.total_steps)
    require_int("trainer.log_every_n_steps", config.trainer.log_every_n_steps, minimum=1)
    resolve_precision(config.trainer.precision)
    if config.eval.root is not None:
        tasks_from(config)


def _say_what_begins(config: DictConfig) -> None:
    """Log what the options ask for: known before the pool is opened and large packages imported."""
    limit, budget = limit_from(config), budget_from(config)
    length = (
        f"{budget.total_steps:,} steps" if limit is None else "budget.{}={:g}, steps".format(*limit)
    )
    log.info(
        "options checked: selector %s, seed %d, %s of %s samples, precision %s",
        config.selector.name,
        config.seed,
        length,
        f"{budget.global_batch_size:,}",
        resolve_precision(config.trainer.precision),
    )


def _run_parts(
    config: DictConfig, selected: SelectOutcome, loss_data: LossData, folder: Path
) -> RunParts:
    from siftclip.trainer.assembly import new_model
    from siftclip.trainer.online.setup import RunParts

    return RunParts(
        config=config,
        clip=new_model(config),
        selected=selected,
        loss_data=loss_data,
        folder=folder,
        global_batch_size=budget_from(config).global_batch_size,
        world_size=expected_world_size(config),
    )


def _resolved_budget(parts: RunParts) -> Budget:
    """The budget in trained samples, also where something else limits the run."""
    config = parts.config
    budget, limit = budget_from(config), limit_from(config)
    if limit is None:
        return budget
    from siftclip.trainer.planning import steps_within

    steps = steps_within(limit, parts)
    resolved = Budget(
        samples_seen=steps * budget.global_batch_size, global_batch_size=budget.global_batch_size
    )
    check_schedule(OptimConfig(**plain(config.optim)), resolved.total_steps)
    log.info("budget.%s=%g lasts for %d steps", *limit, resolved.total_steps)
    return resolved


def _fit(
    config: DictConfig,
    run: RunDir,
    selected: SelectOutcome,
    loss_data: LossData,
    loggers: list[Logger],
) -> None:
    """Train, and write the model folder."""
    from siftclip.datamodules.streaming import count_micro_batches
    from siftclip.trainer.assembly import data_module_from, training_module
    from siftclip.trainer.checkpointing import StepCheckpoint, StopOnSignal
    from siftclip.trainer.evaluate_during import evaluate_during_from
    from siftclip.trainer.loggers import finish
    from siftclip.trainer.online.setup import build_online, warn_of_rounding
    from siftclip.trainer.progress import TrainingBar
    from siftclip.trainer.sharding import whole_state

    share_cores(loader_options(config).num_workers)
    parts = _run_parts(config, selected, loss_data, run.path)
    if is_rank_zero():
        run.keep_model(model_record(parts.clip))
    budget = run.budget() or _resolved_budget(parts)  # measuring trains models of its own
    if is_rank_zero():
        run.keep_budget(budget)
    if config.online.cadence == "every_step":
        schedule_from(config).check_length(budget.total_steps)
    clip, online = parts.clip, build_online(parts, budget.total_steps)
    if config.online.cadence == "every_step":
        warn_of_rounding(parts, online.plan)
    during = evaluate_during_from(config, clip)
    module = training_module(config, clip, selected, loss_data, budget, online)
    stop = StopOnSignal()
    trainer = make_trainer(
        config,
        folder=run.path,
        callbacks=[
            StepCheckpoint(
                run.checkpoints,
                every_n_steps=config.trainer.checkpoint_every_n_steps,
                keep_last=config.trainer.keep_checkpoints,
                keep_every_n_steps=config.trainer.keep_every_n_steps,
            ),
            stop,
            *([] if during is None else [during]),
            *([TrainingBar()] if config.progress else []),
        ],
        loggers=loggers,
        max_steps=budget.total_steps,
        max_epochs=-1,
    )
    check_world_size(trainer.world_size, os.environ)
    if trainer.world_size != parts.world_size:
        raise RuntimeError(f"{trainer.world_size} ranks train, not {parts.world_size}")
    with options_of(
        under("trainer", "micro_batch_size") | {"global_batch": "scale.global_batch_size"}
    ):
        share = rank_slice(budget.global_batch_size, rank=0, world_size=trainer.world_size)
        count_micro_batches(share.stop, config.trainer.micro_batch_size)
    data = data_module_from(config, clip, selected, loss_data, budget, online)
    resume = run.latest_checkpoint() if config.reuse else None
    if resume is not None:
        log.info("continuing from %s", resume)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    if stop.stopped_by is not None:
        finish(loggers)
        trainer.strategy.barrier()  # or the launcher ends rank 0 while it still writes
        stop.raise_if_stopped(trainer.global_step, budget.total_steps)
    if trainer.global_step < budget.total_steps:
        raise InputError(f"{run.path}: training stopped at step {trainer.global_step}.")
    if data.faults.samples:
        log.warning(
            "training replaced %d bad samples: %s", data.faults.samples, data.faults.summary()
        )
    state = whole_state(module.model if module.ema is None else module.ema.averaged)
    if is_rank_zero():
        save_model_folder(clip, run.model, state)
    trainer.strategy.barrier()  # the others evaluate what it has written


def _evaluate(config: DictConfig, run: RunDir, loggers: list[Logger]) -> None:
    """Evaluate the trained model, with all ranks."""
    from siftclip.trainer.loggers import log_tables

    if config.eval.root is None:
        return
    steps = (run.budget() or budget_from(config)).total_steps
    share = eval_share(config, may_launch=False)
    summary = eval_stage(config, run.path, results_path=run.results, share=share, wait=True)
    for logger in loggers:
        logger.log_metrics(summary.metrics(), step=steps)
    log_tables(loggers, log_records(summary))


def _conclude(
    config: DictConfig,
    run: RunDir,
    selected: SelectOutcome,
    loggers: list[Logger],
) -> None:
    """Log statistics of the selection, and mark the run as finished."""
    manifest = selected.selection.manifest
    budget = run.budget() or budget_from(config)
    drawn = run.costs().get("drawn_samples", budget.trained_samples)
    statistics = {
        "selection/samples": len(selected.selection),
        "selection/distinct": len(selected.selection.uids),
        "selection/fraction": manifest["kept_fraction"],
        "selection/coverage": selected.coverage.fraction,
        "train/passes": drawn / len(selected.rows),
    }
    for name, value in manifest["score_quantiles_kept"].items():
        statistics[f"selection/score_{name}"] = value
    for logger in loggers:
        logger.log_metrics(statistics, step=budget.total_steps)
    run.finish(
        {
            "selector": manifest["selector"],
            "seed": config.seed,
            "selection": selected.selection.digest,
            "pool": selected.pool.fingerprint,
            "steps": budget.total_steps,
            "trained_samples": budget.trained_samples,
            "requested_samples": budget.samples_seen,
            "online": online_name(config),
            **run.costs(),
            "passes": drawn / len(selected.rows),
            "selected_samples": len(selected.selection),
            "coverage": selected.coverage.fraction,
            "copies_fraction": run.copies_fraction(),
            "offline_selection_seconds": round(manifest["cost"]["seconds"], 3),
            **{name: round(value, 3) for name, value in run.seconds().items()},
        }
    )


def online_name(config: DictConfig) -> str:
    """What selects in the loop, in a few words."""
    if config.online.cadence == "once":
        return "once"
    return f"{config.online.cadence} {config.online.selector.name}"
