"""The train stage: select, stream, train, write the model, evaluate; continues where it was."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siftclip.datamodules.identity.identities import (
    differences,
    kept_identity,
    say_reused,
    say_why_not,
)
from siftclip.datamodules.models.load import save_model_folder
from siftclip.datamodules.models.record import model_record
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.streaming.order import rank_slice
from siftclip.errors import InputError
from siftclip.files import identity_hash
from siftclip.locks import locked
from siftclip.ranks import Ranks, of_first_rank
from siftclip.trainer.builders.losses import check_loss_options, known_options
from siftclip.trainer.builders.models import (
    activations_of_weights,
    batch_norm_identity,
    model_files,
    models_of,
)
from siftclip.trainer.builders.objective import LossData, open_loss_data
from siftclip.trainer.builders.online_identity import online_identity
from siftclip.trainer.builders.online_options import check_online, schedule_from
from siftclip.trainer.builders.online_reading import reading_in_words
from siftclip.trainer.builders.selection import PoolSelection, select_stage
from siftclip.trainer.optim.schedules import check_schedule
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.runtime.cores import share_cores
from siftclip.trainer.runtime.environment import (
    CODE,
    TARS,
    Environment,
    environment,
    environments,
)
from siftclip.trainer.runtime.extensions import (
    build_callbacks,
    build_loggers,
    build_profiler,
    check_extensions,
    extensions_identity,
)
from siftclip.trainer.runtime.hardware import check_hardware
from siftclip.trainer.runtime.launch import check_world_size
from siftclip.trainer.runtime.lightning_setup import (
    expected_world_size,
    loader_options,
    local_ranks,
    make_trainer,
    resolve_precision,
)
from siftclip.trainer.runtime.lost_identity import require_same_config
from siftclip.trainer.runtime.memory import require_room_for_batch
from siftclip.trainer.runtime.run_dir import (
    IDENTITY_NAME,
    SUMMARY_NAME,
    RunDir,
    is_rank_zero,
    require_own_folder,
)
from siftclip.trainer.runtime.tracking.packages import check_packages
from siftclip.trainer.settings.budget import Budget, budget_from, limit_from
from siftclip.trainer.settings.commands import EvalSections, TrainCommand
from siftclip.trainer.settings.data import BudgetSettings, DataSettings
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.lightning import TrainerSettings
from siftclip.trainer.settings.online import EveryStepSettings, OnceSettings
from siftclip.trainer.stages.evaluation import eval_share, eval_stage, log_records, tasks_from
from siftclip.trainer.stages.run_summary import conclude_run, online_name
from siftclip.trainer.stages.tracking import begin_tracking, end_tracking

# What imports Lightning or builds models is imported where options are checked: it takes seconds.
if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger

    from siftclip.eval.reports.report import Summary
    from siftclip.trainer.builders.run_parts import RunParts
    from siftclip.trainer.loop.checkpointing import StopOnSignal
    from siftclip.trainer.online.cost_profile import Forecast

log = logging.getLogger(__name__)

_DATA = ("shuffle_window_shards", "resize", "max_image_pixels")  # options that move weights


def run_identity(
    settings: TrainCommand, selected: PoolSelection, loss_data: LossData
) -> dict[str, Any]:
    """Return all that the trained weights depend on; devices and workers do not belong to it."""
    return kept_identity(
        "run",
        {
            "selection": selected.selection.digest,
            "pool": selected.pool.fingerprint,
            "members": selected.pool.members_digest,
            "model": {**to_plain(settings.model), "files": model_files(settings.model)},
            "activations": activations_of_weights(models_of(settings)),
            "optim": to_plain(settings.optim),
            "loss": known_options(settings.loss),
            "loss_data": loss_data.identity,
            "scale": to_plain(settings.scale),
            "budget": to_plain(settings.budget),
            "online": online_identity(
                settings.online,
                selected.source,
                world_size=expected_world_size(settings.trainer),
            ),
            "data": {key: getattr(settings.data, key) for key in _DATA},
            "precision": resolve_precision(settings.trainer.precision),
            **_exchange_identity(settings.trainer),
            "seed": settings.common.seed,
            **batch_norm_identity(settings),
            **extensions_identity(settings.trainer),
            **selected.pool.caption_identity,
        },
    )


def _exchange_identity(trainer: TrainerSettings) -> dict[str, str]:
    """Return the type of averaged gradients where it is coarser than what other strategies have."""
    kind = trainer.fsdp_reduce_dtype
    return {} if kind == "fp32" else {"fsdp_reduce_dtype": kind}


def run_environment(trainer: TrainerSettings, data: DataSettings, pool: Pool) -> Environment:
    """Describe what this session computes with, and which tars it reads."""
    options = loader_options(data, trainer)
    share_cores(options.num_workers, local_ranks(trainer))
    computed_with = environment(
        ranks=expected_world_size(trainer),
        loader_workers=options.num_workers,
        precision=resolve_precision(trainer.precision),
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


def run_dir_for(
    settings: TrainCommand, selected: PoolSelection, identity: dict[str, Any]
) -> RunDir:
    """Find the run's directory: `run_dir`, or one whose name stands for what the run depends on.

    Args:
        settings: of the command.
        selected: what is trained on.
        identity: of the run.

    Raises:
        InputError: `run_dir` holds another run.
    """
    common = settings.common
    if common.run_dir is None:
        root, names = common.output_root / "train", _run_names(settings, selected)
        end = f"s{common.seed}-{identity_hash(identity)[:8]}"
        paths = [root / f"{name}-{end}" for name in names]
        run = RunDir(path=next((path for path in paths if path.exists()), paths[0]))
        if is_rank_zero() and not run.path.exists():
            near = [f"{name}-s{common.seed}-*/{IDENTITY_NAME}" for name in names]
            kept = (path for pattern in near for path in root.glob(pattern))
            say_why_not("the run", identity, kept, like="scale")
        return run
    run = RunDir(path=Path(common.run_dir))
    # through JSON, which has no tuples
    if run.has_started and run.identity() != json.loads(json.dumps(identity, default=str)):
        reasons = "; ".join(differences(run.identity() or {}, identity))
        raise InputError(
            f"run_dir={common.run_dir!r} holds a run with another selection, model, budget or "
            f"seed, or of other code or files. Different: {reasons}. Name another run_dir, or "
            "delete that one."
        )
    if not run.has_started and (run.latest_checkpoint() is not None or run.summary is not None):
        require_same_config(run, settings.composed)
    return run


def _run_names(settings: TrainCommand, selected: PoolSelection) -> list[str]:
    """Return what begins the name of a run's directory: selectors, and a loss that is not CLIP's.

    The last one is that of earlier versions, without the loss.
    """
    name = str(selected.selection.manifest["selector"])
    if not isinstance(settings.online, OnceSettings):
        name += f"+{settings.online.selector.name}"
    loss = settings.loss.short_name
    return [name] if loss == "clip" else [f"{name}+{loss}", name]


def train_stage(
    settings: TrainCommand,
    *,
    wait: bool = False,
    selected: PoolSelection | None = None,
    found: Callable[[RunDir], None] | None = None,
) -> RunDir:
    """Train one model on one selection, and evaluate it if `eval.root` is set.

    A finished run is returned as it is; an interrupted one continues from its last checkpoint.
    With `reuse=false` either is set aside, under another name, and the run begins anew.

    Args:
        settings: of the command.
        wait: for another process that trains this very run, instead of raising.
        selected: what `settings` select, where that is known already.
        found: called with the run's directory before it is worked on.

    Raises:
        HeldError: another process trains this run.
        InputError: an option or a file is wrong; found before the first step where possible.
    """
    check_training(settings)
    if is_rank_zero():
        _say_what_begins(settings)
    selected = select_stage(settings) if selected is None else selected
    loss_data = _loss_data(settings, selected)
    identity = run_identity(settings, selected, loss_data)
    run, ranks = run_dir_for(settings, selected, identity), selected.source.ranks
    if found is not None:
        found(run)
    reuse = settings.common.reuse
    if not of_first_rank(ranks, reuse and run.is_finished):
        with _alone(run, ranks, wait=wait):
            run_dir_for(settings, selected, identity)  # again: another may have begun it since
            if not of_first_rank(ranks, reuse and run.is_finished):
                _train(settings, run, selected, loss_data, identity)
                return run
    if ranks.rank == 0:
        say_reused("the finished run", run.path / SUMMARY_NAME)
        warn_of_other_code(run, run_environment(settings.trainer, settings.data, selected.pool))
    if settings.eval.root is not None:
        _evaluate_run(settings.evaluation, run)
    return run


def _loss_data(settings: TrainCommand, selected: PoolSelection) -> LossData:
    bound = settings.pool.max_bad_fraction
    return open_loss_data(settings.loss, selected, max_bad_fraction=bound)


def _alone(run: RunDir, ranks: Ranks, *, wait: bool) -> AbstractContextManager[None]:
    """Keep other commands from the run."""
    if ranks.size == 1 and not is_rank_zero():
        return nullcontext()  # Lightning has started this process; the first one holds the lock
    return locked(run.lock, owner=f"The run {run.path}", ranks=ranks, wait=wait)


def _train(
    settings: TrainCommand,
    run: RunDir,
    selected: PoolSelection,
    loss_data: LossData,
    identity: dict[str, Any],
) -> None:
    """Do all that a run is, from where it is."""
    from siftclip.trainer.loop.resuming import continue_files, whole_checkpoint
    from siftclip.trainer.runtime.loggers import RunKind, closed_after, make_loggers
    from siftclip.trainer.runtime.tracking.own_loggers import adapted

    now = run_environment(settings.trainer, settings.data, selected.pool)
    reuse, composed, logger = settings.common.reuse, settings.composed, settings.logger
    ranks = selected.source.ranks
    if is_rank_zero():
        if not reuse and run.has_started:
            log.info("reuse=false: the run of before is now %s", run.set_aside())
        run.set_damaged_aside()
        log.info("the run is kept in %s", run.path)
        run.start(composed.to_yaml(), selected.selection, identity)
    ranks.barrier()  # none looks at the run before the first has begun it
    # without reuse, other ranks may look before the first has set the old run aside
    parts = None if reuse and run.has_model else run_parts(settings, selected, loss_data, run.path)
    if parts is not None and reuse:
        checkpoint = whole_checkpoint(run, parts.clip.model, ranks)
    else:
        checkpoint = run.latest_checkpoint()
    if is_rank_zero():
        continue_files(run, checkpoint, now)
    ranks.barrier()  # none reads the log before that
    loggers = make_loggers(
        run.path,
        logger,
        kind=RunKind(name=run.path.name, job_type="train"),
        output_root=settings.common.output_root,
        config=composed.values,
    ) + adapted(build_loggers(settings.trainer), run.records())
    with closed_after(loggers):
        if is_rank_zero():
            limit = settings.data.max_image_pixels
            begin_tracking(loggers, logger, run, selected, max_image_pixels=limit)
        if parts is not None:
            _fit(settings, run, parts, checkpoint, loggers)
        budget = run.budget() or budget_from(settings.scale)
        if settings.eval.root is not None:
            _evaluate(settings.evaluation, run, budget, loggers)
        if is_rank_zero():
            seed, online = settings.common.seed, online_name(settings.online)
            conclude_run(run, selected, budget, loggers, seed=seed, online=online)
            end_tracking(loggers, logger, run)


def plan_stage(settings: TrainCommand, *, selected: PoolSelection | None = None) -> Forecast:
    """Forecast what a run of these settings will cost, from a few measured steps. Nothing is kept.

    Args:
        settings: of the command.
        selected: what `settings` select, where that is known already.

    Raises:
        InputError: an option or a file is wrong.
    """
    check_training(settings)
    selected = select_stage(settings) if selected is None else selected
    workers = loader_options(settings.data, settings.trainer).num_workers
    share_cores(workers, local_ranks(settings.trainer))
    loss_data = _loss_data(settings, selected)
    parts = run_parts(settings, selected, loss_data, settings.common.output_root)
    from siftclip.trainer.stages.planning import forecast

    return forecast(parts, _resolved_budget(parts, settings.budget, budget_from(settings.scale)))


def check_training(settings: TrainCommand) -> None:
    """Check all that can be known to be wrong before any file is read.

    Raises:
        InputError: a selector does not go with the other settings, or a task is missing.
    """
    strategy = settings.trainer.strategy
    if settings.common.run_dir is not None:
        require_own_folder(settings.common.run_dir, settings.pool.root)
    check_hardware(settings.trainer)
    with options_of({"global_batch": "scale.global_batch_size"}):
        world_size = expected_world_size(settings.trainer)
        rank_slice(settings.scale.global_batch_size, rank=0, world_size=world_size)
    if settings.optim.timm is not None:
        from siftclip.trainer.optim.timm_optimizers import check_timm

        check_timm(settings.optim.timm)
        if strategy == "fsdp":
            raise InputError(
                "optim.timm does not go with trainer.strategy=fsdp, whose ranks have parts of the "
                "weights. Leave it out, or use trainer.strategy=ddp."
            )
    check_loss_options(settings.loss)
    check_extensions(settings.trainer)
    check_packages(settings.logger)
    check_online(settings.online, settings.selector, settings.loss, strategy)
    loader_options(settings.data, settings.trainer)
    if limit_from(settings.budget) is None:
        check_schedule(settings.optim, budget_from(settings.scale).total_steps)
    if settings.eval.root is not None:
        tasks_from(settings.eval)


def _say_what_begins(settings: TrainCommand) -> None:
    """Log what the options ask for: known before the pool is opened and large packages imported."""
    limit, budget = limit_from(settings.budget), budget_from(settings.scale)
    length = (
        f"{budget.total_steps:,} steps" if limit is None else "budget.{}={:g}, steps".format(*limit)
    )
    log.info(
        "options checked: selector %s, seed %d, %s of %s samples, precision %s",
        settings.selector.name,
        settings.common.seed,
        length,
        f"{budget.global_batch_size:,}",
        resolve_precision(settings.trainer.precision),
    )
    if not isinstance(settings.online, OnceSettings):
        log.info("%s", reading_in_words(settings.online))


def run_parts(
    settings: TrainCommand, selected: PoolSelection, loss_data: LossData, folder: Path
) -> RunParts:
    """Build what a run in a folder is made of, with a new model."""
    from siftclip.trainer.builders.assembly import new_model
    from siftclip.trainer.builders.micro_batches import micro_batch_size_from
    from siftclip.trainer.builders.run_parts import RunParts
    from siftclip.trainer.online.flops import input_sizes

    common, trainer = settings.common, settings.trainer
    clip = new_model(
        settings.model, seed=common.seed, grad_checkpointing=trainer.grad_checkpointing
    )
    world_size, batch = expected_world_size(trainer), settings.scale.global_batch_size
    require_room_for_batch(batch, world_size=world_size, image_size=input_sizes(clip)["image_size"])
    return RunParts(
        common=common,
        pool=settings.pool,
        data=settings.data,
        model=settings.model,
        loss=settings.loss,
        optim=settings.optim,
        trainer=trainer,
        online=settings.online,
        selector=settings.selector,
        clip=clip,
        selected=selected,
        loss_data=loss_data,
        folder=folder,
        global_batch_size=batch,
        world_size=world_size,
        micro_batch_size=micro_batch_size_from(settings, clip),
    )


def _resolved_budget(parts: RunParts, limits: BudgetSettings, budget: Budget) -> Budget:
    """Return the budget in trained samples, also where something else limits the run."""
    limit = limit_from(limits)
    if limit is None:
        return budget
    from siftclip.trainer.stages.planning import steps_within

    steps = steps_within(limit, parts)
    resolved = Budget(
        samples_seen=steps * budget.global_batch_size, global_batch_size=budget.global_batch_size
    )
    check_schedule(parts.optim, resolved.total_steps)
    log.info("budget.%s=%g lasts for %d steps", *limit, resolved.total_steps)
    return resolved


def _fit(
    settings: TrainCommand,
    run: RunDir,
    parts: RunParts,
    checkpoint: Path | None,
    loggers: list[Logger],
) -> None:
    """Train, and write the model folder."""
    from siftclip.trainer.builders.assembly import data_module_from, training_module
    from siftclip.trainer.builders.online_setup import build_online, warn_of_rounding
    from siftclip.trainer.loop.checkpointing import StopOnSignal
    from siftclip.trainer.models.sharding import whole_state
    from siftclip.trainer.runtime.loggers import finish

    if is_rank_zero():
        run.keep_model(model_record(parts.clip))
    budget = _kept_budget(parts, settings, run)
    if isinstance(parts.online, EveryStepSettings):
        schedule_from(parts.online).check_length(budget.total_steps)
    online = build_online(parts, budget.total_steps)
    if isinstance(parts.online, EveryStepSettings):
        warn_of_rounding(parts, parts.online, online.plan)
    stop = StopOnSignal()
    callbacks = _callbacks(settings, parts, run, stop)
    every = settings.logger.gradients_every_n_steps
    module = training_module(parts, budget, online, log_gradients_every_n_steps=every)
    trainer = make_trainer(
        parts.trainer,
        folder=run.path,
        callbacks=callbacks,
        loggers=loggers,
        profiler=build_profiler(parts.trainer),
        max_steps=budget.total_steps,
        max_epochs=-1,
    )
    _check_ranks(trainer.world_size, parts, budget)
    data = data_module_from(parts, budget, online)
    if checkpoint is not None:
        log.info("continuing from %s", checkpoint)
    with options_of(under("trainer", "max_skipped_fraction")):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if stop.stopped_by is not None:
        finish(loggers, status="stopped")
        trainer.strategy.barrier()  # or the launcher ends rank 0 while it still writes
        stop.raise_if_stopped(trainer.global_step, budget.total_steps)
    if trainer.global_step < budget.total_steps:
        raise InputError(f"{run.path}: training stopped at step {trainer.global_step}.")
    data.counts.say_at_end()
    state = whole_state(module.model if module.ema is None else module.ema.averaged)
    if is_rank_zero():
        save_model_folder(parts.clip, run.model, state)
    trainer.strategy.barrier()  # the others evaluate what it has written


def _kept_budget(parts: RunParts, settings: TrainCommand, run: RunDir) -> Budget:
    """Return the budget in trained samples, as the run keeps it."""
    budget = run.budget()
    if budget is None:  # measuring trains models of its own
        budget = _resolved_budget(parts, settings.budget, budget_from(settings.scale))
    if is_rank_zero():
        run.keep_budget(budget)
    return budget


def _callbacks(
    settings: TrainCommand, parts: RunParts, run: RunDir, stop: StopOnSignal
) -> list[Callback]:
    from lightning.pytorch.callbacks import ProgressBar

    from siftclip.trainer.loop.checkpointing import StepCheckpoint
    from siftclip.trainer.loop.profiling import ProfileSteps
    from siftclip.trainer.loop.progress import TrainingProgress
    from siftclip.trainer.stages.evaluate_during import evaluate_during_from

    options = settings.trainer
    added = build_callbacks(options)
    has_bar = any(isinstance(callback, ProgressBar) for callback in added)
    during = evaluate_during_from(settings.evaluation, parts.clip)
    checkpoint = StepCheckpoint(
        run.checkpoints,
        every_n_steps=options.checkpoint_every_n_steps,
        every_minutes=options.checkpoint_every_minutes,
        keep_last=options.keep_checkpoints,
        keep_every_n_steps=options.keep_every_n_steps,
        background=options.background_checkpoints,
    )
    return [
        checkpoint,  # Lightning calls it last, when all others have seen the step
        stop,
        *([] if during is None else [during]),
        *([] if has_bar else [TrainingProgress(bar=settings.common.progress)]),
        *([ProfileSteps(run.path / "profile")] if options.profile else []),
        *added,
    ]


def _check_ranks(world_size: int, parts: RunParts, budget: Budget) -> None:
    """Check that the ranks are those that were planned, and their shares of a batch can be cut."""
    from siftclip.datamodules.streaming.datamodule import count_micro_batches

    check_world_size(world_size, os.environ)
    if world_size != parts.world_size:
        raise RuntimeError(f"{world_size} ranks train, not {parts.world_size}")
    with options_of(
        under("trainer", "micro_batch_size") | {"global_batch": "scale.global_batch_size"}
    ):
        share = rank_slice(budget.global_batch_size, rank=0, world_size=world_size)
        count_micro_batches(share.stop, parts.micro_batch_size)


def _evaluate_run(settings: EvalSections, run: RunDir) -> Summary:
    share = eval_share(settings.trainer, may_launch=False)
    return eval_stage(settings, run.path, results_path=run.results, share=share, wait=True)


def _evaluate(settings: EvalSections, run: RunDir, budget: Budget, loggers: list[Logger]) -> None:
    """Evaluate the trained model, with all ranks."""
    from siftclip.trainer.runtime.loggers import log_tables

    summary = _evaluate_run(settings, run)
    for logger in loggers:
        logger.log_metrics(summary.metrics(), step=budget.total_steps)
    log_tables(loggers, log_records(summary), step=budget.total_steps)
