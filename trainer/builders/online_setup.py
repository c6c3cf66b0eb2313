"""From the settings to what selects while a run trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.selection.columns import read_column
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.streaming.step_plan import StepPlan
from siftclip.errors import InputError
from siftclip.selectors.core.base import ScoreSelector
from siftclip.selectors.core.source import TRAINING_LOSS, Logits
from siftclip.selectors.methods.uniform import Uniform
from siftclip.trainer.builders.live_models import live_models, scoring_config
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.builders.needs import LEARNER, REFERENCE, Needs
from siftclip.trainer.builders.online_identity import check_cached, reference_aliases
from siftclip.trainer.builders.online_options import (
    chooses_before_reading,
    loop_selector,
    reference_logits,
    schedule_from,
)
from siftclip.trainer.builders.run_parts import RunParts
from siftclip.trainer.builders.selection import BuiltSelector, selector_from
from siftclip.trainer.online.controller import Learner, Online
from siftclip.trainer.online.cost import CostModel, SampleFlops
from siftclip.trainer.online.diagnostics import Diagnostics, read_kinds
from siftclip.trainer.online.flops import forward_flops, input_sizes
from siftclip.trainer.online.in_loop import CachedFirstStage, InLoopSelection, StepDraw
from siftclip.trainer.online.losses_seen import LossesSeen
from siftclip.trainer.online.pool_embedding import PoolEmbedder
from siftclip.trainer.online.record import RECORD_NAME, ChosenRows
from siftclip.trainer.online.reselection import Reselection
from siftclip.trainer.online.sample_flops import counted, learner_flops, selecting_flops
from siftclip.trainer.online.schedule import Schedule
from siftclip.trainer.online.scoring import check_scoring, scoring_is_forward
from siftclip.trainer.online.scoring_models import (
    model_logits,
)
from siftclip.trainer.online.super_batch import PoolData, read_files
from siftclip.trainer.options.faults import options_of
from siftclip.trainer.runtime.lightning_setup import (
    autocast_dtype,
    loader_options,
    resolve_precision,
)
from siftclip.trainer.settings.online import (
    DiagnosticsSettings,
    EveryNStepsSettings,
    EveryStepSettings,
    OnceSettings,
)

log = logging.getLogger(__name__)

VERSIONS_FOLDER = "selections"
ROUNDED_FRACTION = 0.05  # of the samples that a run draws may come from rounding without a word


def build_online(parts: RunParts, total_steps: int) -> Online:
    """Build what selects while a run of `total_steps` steps trains.

    Raises:
        InputError: an option is wrong for this model, pool or number of devices.
    """
    online = parts.online
    if isinstance(online, EveryStepSettings):
        return _every_step(parts, online, total_steps)
    plan = StepPlan.plain(parts.global_batch_size, total_steps)
    if isinstance(online, OnceSettings):
        learner = Learner(weights="learner")
        flops = counted(lambda: _learner_flops(parts))
        cost = CostModel(plan=plan, flops=flops, scores_after_reading=False)
        return Online(plan=plan, cost=cost, source=parts.source, learner=learner)
    learner = Learner(weights=online.weights)
    reselection, losses = _reselection(parts, online, plan, learner)
    if reselection.find_first() >= plan.steps and plan.steps > 1:
        log.warning(
            "online=%s: the run ends with step %d, before anything is selected again",
            online.cadence,
            plan.steps,
        )

    def sample_flops() -> SampleFlops:
        embedding = forward_flops(parts.clip.model, **input_sizes(parts.clip))
        return replace(_learner_flops(parts), embedding=embedding)

    cost = CostModel(
        plan=plan,
        flops=counted(sample_flops),
        scores_after_reading=False,
        embedded=reselection.embedded_samples,
    )
    return Online(
        plan=plan,
        cost=cost,
        source=parts.source,
        learner=learner,
        reselection=reselection,
        losses=losses,
    )


def _learner_flops(parts: RunParts) -> SampleFlops:
    """Count the FLOPs of the learner and a live teacher."""
    live = parts.loss.live_teacher
    teacher = None if live is None else clip_model_from(live, trained=True)
    return learner_flops(parts.clip, micro_batches=_cuts_batches(parts), teacher=teacher)


def _cuts_batches(parts: RunParts) -> bool:
    """Return whether a rank's batch is several micro-batches."""
    micro_batch = parts.micro_batch_size
    return micro_batch is not None and micro_batch < parts.global_batch_size // parts.world_size


# ---- every step ----------------------------------------------------------------------------------


def step_plan(parts: RunParts, total_steps: int) -> StepPlan:
    """Plan how many samples the steps of a run draw, read and train on. Reads no file."""
    return step_planner(parts)(total_steps, range(total_steps))


def step_planner(parts: RunParts) -> Callable[[int, range], StepPlan]:
    """Return a function that plans some consecutive steps of a run, in memory for these alone.

    So that runs of any length can be reckoned with in little memory.
    """
    online, batch = parts.online, parts.global_batch_size
    if not isinstance(online, EveryStepSettings):
        return lambda total_steps, steps: StepPlan.plain(batch, len(steps))
    groups, schedule = _groups(parts, online), schedule_from(online)
    unread = chooses_before_reading(online, loop_selector(online).selector)
    keep = 1.0
    if online.first_stage.selector is not None:
        keep -= float(online.first_stage.filter_ratio)

    def plan(total_steps: int, steps: range) -> StepPlan:
        sizes = schedule.super_batch_samples(total_steps, batch, groups, steps)
        if unread:
            return StepPlan(trained=batch, drawn=sizes, read=np.full_like(sizes, batch))
        drawn = np.where(sizes > batch, np.round(sizes / keep / groups) * groups, sizes)
        return StepPlan(trained=batch, drawn=np.maximum(drawn, sizes).astype(np.int64), read=sizes)

    return plan


def warn_of_rounding(parts: RunParts, online: EveryStepSettings, plan: StepPlan) -> None:
    """Say so where whole samples and equal groups are far from what the schedule asks for."""
    batch = parts.global_batch_size
    schedule, groups = schedule_from(online), _groups(parts, online)
    if (plan.drawn == plan.trained).all() and plan.steps > 1:
        log.warning(
            "online.schedule.filter_ratio=%s: every step trains on all that it loads, so that "
            "online.selector has no effect. It is 1 - online.selector.fraction where it is null",
            schedule.filter_ratio,
        )
        return
    fraction = schedule.largest_uniform_fraction()
    if fraction and round(fraction * batch) == 0:
        log.warning(
            "online.schedule.uniform_fraction=%g of %d samples is less than half a sample: none is "
            "drawn uniformly. Raise it, or set it to 0",
            fraction,
            batch,
        )
    exact = schedule.exact_super_batches(plan.steps, batch)
    if online.first_stage.selector is not None:
        exact[exact > batch] /= 1 - float(online.first_stage.filter_ratio)
    drawn, wanted = float(plan.drawn.mean()), float(exact.mean())
    if abs(drawn / wanted - 1) > ROUNDED_FRACTION:
        log.warning(
            "a step draws %.1f samples on average, where online.schedule.filter_ratio asks for "
            "%.1f: super-batches are multiples of online.groups=%d. Fewer groups, or a larger "
            "scale.global_batch_size, come closer",
            drawn,
            wanted,
            groups,
        )


def _groups(parts: RunParts, online: EveryStepSettings) -> int:
    groups = parts.world_size if online.groups == "auto" else online.groups
    if groups % parts.world_size or parts.global_batch_size % groups:
        raise InputError(
            "online.groups must be a multiple of the devices and divide scale.global_batch_size, "
            f"so that all get equally many samples. Got {groups}, with {parts.world_size} devices "
            f"and {parts.global_batch_size} samples a step."
        )
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stages:
    """Makes the stages of a selection every step, of one run and one kind of super-batch."""

    parts: RunParts
    online: EveryStepSettings
    total_steps: int
    groups: int

    def draw(self, built: BuiltSelector, schedule: Schedule) -> StepDraw:
        return StepDraw(
            selector=built.selector,
            objects=built.objects,
            schedule=schedule,
            total_steps=self.total_steps,
            groups=self.groups,
            seed=self.parts.common.seed,
        )

    def pool_data(self, needs: Needs) -> PoolData:
        source = self.parts.source
        return PoolData(source=source, files=read_files(source, needs.files))

    def first(self, built: BuiltSelector, needs: Needs, schedule: Schedule) -> CachedFirstStage:
        """Make a stage that chooses by cached features, before samples are read."""
        aliases = reference_aliases(self.online)
        keys = {key: aliases.get(key, key) for key in sorted(needs.features)}
        check_cached(self.parts.source, keys)
        return CachedFirstStage(
            draw=self.draw(built, schedule),
            data=self.pool_data(needs),
            keys=keys,
            features=_row_features(self.parts, set(keys.values())),
            logits={REFERENCE: reference_logits(self.online.reference.features)},
        )

    def early(self) -> CachedFirstStage | None:
        """Make the stage before the one that scores live, where there is one."""
        if self.online.first_stage.selector is None:
            return None
        built = loop_selector(self.online, self.online.first_stage.selector)
        return self.first(built, Needs.of(built.selector), Schedule(filter_ratio=0.0))


def _every_step(parts: RunParts, online: EveryStepSettings, total_steps: int) -> Online:
    source, model = parts.source, parts.clip.model
    schedule, groups = schedule_from(online), _groups(parts, online)
    plan = step_plan(parts, total_steps)
    built = loop_selector(online)
    needs = Needs.of(built.selector)
    losses = _losses_seen(source, needs)
    ratio = schedule.filter_ratio
    if ratio != 0 and (plan.drawn == plan.trained).all() and total_steps > 1:
        raise InputError(
            f"online.schedule.filter_ratio={ratio} is so small that a super-batch has no more than "
            f"the {plan.trained} samples of scale.global_batch_size. Raise it, or set it to 0."
        )
    stages = _Stages(parts=parts, online=online, total_steps=total_steps, groups=groups)
    learner = Learner(weights=online.weights)
    diagnostics, record = _diagnostics(parts, online.diagnostics), None
    if online.diagnostics.record_chosen:
        record = ChosenRows(
            parts.folder / RECORD_NAME, steps=total_steps, samples=parts.global_batch_size
        )
    if chooses_before_reading(online, built.selector):
        return Online(
            plan=plan,
            cost=CostModel(
                plan=plan,
                flops=counted(lambda: _learner_flops(parts)),
                scores_after_reading=False,
            ),
            source=source,
            learner=learner,
            first_stage=stages.first(built, needs, schedule),
            diagnostics=diagnostics,
            record=record,
        )
    scoring = scoring_config(online.scoring)
    check_scoring(model, scoring)
    live = live_models(parts, online, needs, learner, scoring)
    first = stages.early()
    reuses_forward = (
        needs.of_model(LEARNER) != ()
        and online.weights == "learner"
        and parts.micro_batch_size is not None
        and scoring_is_forward(model, scoring)
    )

    def sample_flops() -> SampleFlops:
        cuts = _cuts_batches(parts)
        learning = _learner_flops(parts)
        return selecting_flops(learning, live.judges, scorer=live.small, micro_batches=cuts)

    in_loop = InLoopSelection(
        draw=stages.draw(built, schedule),
        plan=plan,
        live=live.features,
        carried=tuple(sorted(live.not_theirs(needs.features))),
        data=stages.pool_data(needs),
        reuses_forward=reuses_forward,
        micro_batch=parts.micro_batch_size,
    )
    return Online(
        plan=plan,
        cost=CostModel(
            plan=plan,
            flops=counted(sample_flops),
            scores_after_reading=True,
            reuses_forward=reuses_forward,
        ),
        source=source,
        learner=learner,
        references=_carried_features(parts, live.cached_keys(needs.features)),
        in_loop=in_loop,
        first_stage=first,
        losses=losses,
        diagnostics=diagnostics,
        record=record,
        scorer=live.scorer,
    )


def _losses_seen(source: PoolSource, needs: Needs) -> LossesSeen | None:
    """Build the losses of training if a selector reads them: a column of the pool that changes."""
    if not needs.training_loss:
        return None
    losses = LossesSeen(len(source))
    source.provide(TRAINING_LOSS, losses.values)
    return losses


def _carried_features(parts: RunParts, keys: set[str]) -> list[RowFeatures]:
    """Find cached features that batches bring for the selector, beside those of the loss."""
    of_loss = parts.loss_data.references
    wanted = set(keys)
    for key in sorted(keys):
        store = parts.source.store((key,))
        if of_loss is not None and key in of_loss.keys:
            wanted.remove(key)
            if parts.loss_data.identity.get("features") != store.fingerprint:
                raise InputError(
                    f"loss.teacher.features and online read different arrays {key!r}. Give one of "
                    "the feature sets another name."
                )
    return _row_features(parts, wanted)


def _row_features(parts: RunParts, keys: set[str]) -> list[RowFeatures]:
    """Find arrays of the pool by row, whichever feature set they are in."""
    by_store: dict[str, tuple[Any, list[str]]] = {}
    for key in sorted(keys):
        store = parts.source.store((key,))
        by_store.setdefault(store.fingerprint, (store, []))[1].append(key)
    samples = len(parts.selected.pool)
    return [RowFeatures.build(store, tuple(names), samples) for store, names in by_store.values()]


def _diagnostics(parts: RunParts, settings: DiagnosticsSettings) -> Diagnostics:
    pool = parts.selected.pool
    offline = clusters = kinds = None
    names: tuple[str, ...] = ()
    if settings.offline is not None:
        with options_of({"path": "online.diagnostics.offline"}):
            offline = read_column(pool, Path(settings.offline), "score").astype(np.float32)
    else:
        built = selector_from(parts.selector)
        selector = built.selector
        if isinstance(selector, ScoreSelector) and not isinstance(selector, Uniform):
            with built.objects.told_as_options():
                offline = selector.scores(parts.source)  # kept by the select stage
    if settings.clusters is not None:
        with options_of({"path": "online.diagnostics.clusters"}):
            from_file = read_column(pool, Path(settings.clusters), "cluster")
        clusters = np.where(np.isfinite(from_file), from_file, -1).astype(np.int64)
    if settings.truth is not None:
        kinds, names = read_kinds(pool, Path(settings.truth))
    return Diagnostics(len(pool), offline=offline, clusters=clusters, kinds=kinds, kind_names=names)


# ---- every N steps -------------------------------------------------------------------------------


def _reselection(
    parts: RunParts, online: EveryNStepsSettings, plan: StepPlan, learner: Learner
) -> tuple[Reselection, LossesSeen | None]:
    source, progress = parts.source, parts.common.progress
    of_reference = reference_logits(online.reference.features)
    built = loop_selector(online)
    needs = Needs.of(built.selector)
    losses = _losses_seen(source, needs)
    live_keys = needs.of_model(LEARNER)
    aliases = reference_aliases(online)
    check_cached(source, {key: aliases.get(key, key) for key in needs.features - {*live_keys}})
    embedder = PoolEmbedder(
        clip=parts.clip,
        model=learner,
        pool=parts.selected.pool,
        loader=loader_options(parts.data, parts.trainer),
        batch_size=online.batch_size,
        max_image_pixels=parts.data.max_image_pixels,
        max_bad_fraction=parts.pool.max_bad_fraction,
        progress=progress,
        autocast_to=autocast_dtype(resolve_precision(parts.trainer.precision)),
    )
    reselection = Reselection(
        selector=built.selector,
        objects=built.objects,
        source=source,
        rows=parts.selected.rows,
        folder=parts.folder / VERSIONS_FOLDER,
        every_n_steps=online.every_n_steps,
        plan=plan,
        window=(round(online.start * plan.steps), round(online.stop * plan.steps)),
        pool_fraction=float(online.pool_fraction),
        live_keys=live_keys,
        aliases=aliases,
        embed=embedder if live_keys else None,
        logits=lambda: {REFERENCE: of_reference, **_learner_logits(learner, live_keys)},
        weights=parts.loss_data.weights,
        seed=parts.common.seed,
    )
    return reselection, losses


def _learner_logits(learner: Learner, keys: tuple[str, ...]) -> dict[str, Logits]:
    return {LEARNER: model_logits(learner())} if keys else {}
