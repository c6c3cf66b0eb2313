"""From the settings to what selects while a run trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.selection.columns import read_column
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.streaming.step_plan import StepPlan
from siftclip.errors import InputError
from siftclip.selectors.core.base import ScoreSelector
from siftclip.selectors.core.source import TRAINING_LOSS, Logits
from siftclip.selectors.methods.uniform import Uniform
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.builders.objective import LossData, same_tokens, teacher_model
from siftclip.trainer.builders.online_identity import check_cached, reference_aliases
from siftclip.trainer.builders.online_options import (
    LEARNER,
    REFERENCE,
    SCORER,
    Needs,
    chooses_before_reading,
    loop_selector,
    reference_logits,
    schedule_from,
)
from siftclip.trainer.builders.selection import BuiltSelector, SelectOutcome, selector_from
from siftclip.trainer.online.controller import Learner, Online
from siftclip.trainer.online.cost import CostModel, SampleFlops
from siftclip.trainer.online.diagnostics import Diagnostics, read_kinds
from siftclip.trainer.online.flops import forward_flops, input_sizes
from siftclip.trainer.online.in_loop import CachedFirstStage, InLoopSelection, StepDraw
from siftclip.trainer.online.losses_seen import LossesSeen
from siftclip.trainer.online.pool_embedding import PoolEmbedder
from siftclip.trainer.online.record import RECORD_NAME, ChosenRows
from siftclip.trainer.online.reselection import Reselection
from siftclip.trainer.online.sample_flops import Judge, counted, learner_flops, selecting_flops
from siftclip.trainer.online.schedule import Schedule
from siftclip.trainer.online.scorer import OnlineScorer
from siftclip.trainer.online.scoring import check_scoring, scoring_is_forward
from siftclip.trainer.online.scoring_config import ScoringConfig
from siftclip.trainer.online.scoring_models import (
    CachedModel,
    LiveFeatures,
    ScoredModel,
    model_logits,
)
from siftclip.trainer.online.super_batch import PoolData, read_files
from siftclip.trainer.options.faults import options_of
from siftclip.trainer.runtime.lightning_setup import loader_options
from siftclip.trainer.settings.common import CommonSettings
from siftclip.trainer.settings.data import DataSettings
from siftclip.trainer.settings.lightning import TrainerSettings
from siftclip.trainer.settings.loss import LossSettings
from siftclip.trainer.settings.model import ModelSettings, ScorerModel
from siftclip.trainer.settings.online import (
    DiagnosticsSettings,
    EveryNStepsSettings,
    EveryStepSettings,
    OnceSettings,
    OnlineSettings,
    ScoringSettings,
)
from siftclip.trainer.settings.optim import OptimSettings
from siftclip.trainer.settings.pool import PoolSettings
from siftclip.trainer.settings.selector import SelectorNode

log = logging.getLogger(__name__)

VERSIONS_FOLDER = "selections"
ROUNDED_FRACTION = 0.05  # of the samples that a run draws may come from rounding without a word


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """What a run is made of: the settings of its parts, and what they have been made into."""

    common: CommonSettings
    pool: PoolSettings
    data: DataSettings
    model: ModelSettings
    loss: LossSettings
    optim: OptimSettings
    trainer: TrainerSettings
    online: OnlineSettings
    selector: SelectorNode
    clip: ClipModel
    selected: SelectOutcome
    loss_data: LossData
    folder: Path  # of the run
    global_batch_size: int
    world_size: int

    @property
    def source(self) -> PoolSource:
        return self.selected.source


def build_online(parts: RunParts, total_steps: int) -> Online:
    """What selects while a run of so many steps trains.

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
    """Of the learner and a live teacher."""
    live = teacher_model(parts.loss)
    teacher = None if live is None else clip_model_from(live, trained=True)
    return learner_flops(parts.clip, micro_batches=_cuts_batches(parts), teacher=teacher)


def _cuts_batches(parts: RunParts) -> bool:
    """Whether a rank's batch is several micro-batches."""
    micro_batch = parts.trainer.micro_batch_size
    return micro_batch is not None and micro_batch < parts.global_batch_size // parts.world_size


# ---- every step ----------------------------------------------------------------------------------


def step_plan(parts: RunParts, total_steps: int) -> StepPlan:
    """How many samples the steps of a run draw, read and train on. Reads no file."""
    return step_planner(parts)(total_steps, range(total_steps))


def step_planner(parts: RunParts) -> Callable[[int, range], StepPlan]:
    """The plan of some consecutive steps of a run of so many: as long as these, whatever the run.

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


def _every_step(parts: RunParts, online: EveryStepSettings, total_steps: int) -> Online:
    source, model = parts.source, parts.clip.model
    schedule, groups = schedule_from(online), _groups(parts, online)
    plan = step_plan(parts, total_steps)
    built = loop_selector(online)
    selector = built.selector
    needs = Needs.of(selector)
    losses = _losses_seen(source, needs)
    ratio = schedule.filter_ratio
    if ratio != 0 and (plan.drawn == plan.trained).all() and total_steps > 1:
        raise InputError(
            f"online.schedule.filter_ratio={ratio} is so small that a super-batch has no more than "
            f"the {plan.trained} samples of scale.global_batch_size. Raise it, or set it to 0."
        )

    def step_draw(chosen: BuiltSelector, schedule: Schedule) -> StepDraw:
        return StepDraw(
            selector=chosen.selector,
            objects=chosen.objects,
            schedule=schedule,
            total_steps=total_steps,
            groups=groups,
            seed=parts.common.seed,
        )

    def pool_data(of: Needs) -> PoolData:
        return PoolData(source=source, files=read_files(source, of.files))

    aliases = reference_aliases(online)
    logits_of = {REFERENCE: reference_logits(online.reference.features)}

    def first_stage(chosen: BuiltSelector, of: Needs, schedule: Schedule) -> CachedFirstStage:
        keys = {key: aliases.get(key, key) for key in sorted(of.features)}
        check_cached(source, keys)
        return CachedFirstStage(
            draw=step_draw(chosen, schedule),
            data=pool_data(of),
            keys=keys,
            features=_row_features(parts, set(keys.values())),
            logits=logits_of,
        )

    learner = Learner(weights=online.weights)
    diagnostics, record = _diagnostics(parts, online.diagnostics), None
    if online.diagnostics.record_chosen:
        record = ChosenRows(
            parts.folder / RECORD_NAME, steps=total_steps, samples=parts.global_batch_size
        )
    if chooses_before_reading(online, selector):
        return Online(
            plan=plan,
            cost=CostModel(
                plan=plan,
                flops=counted(lambda: _learner_flops(parts)),
                scores_after_reading=False,
            ),
            source=source,
            learner=learner,
            first_stage=first_stage(built, needs, schedule),
            diagnostics=diagnostics,
            record=record,
        )
    scoring = _scoring_config(online.scoring)
    check_scoring(model, scoring)
    live: list[LiveFeatures] = []
    judges: list[Judge] = []
    small: ClipModel | None = None
    scorer: OnlineScorer | None = None
    carried = needs.features
    if needs.of_model(LEARNER):
        live.append(ScoredModel(name=LEARNER, model=learner, config=scoring))
        judges.append(Judge(parts.clip, scoring))
    if needs.of_model(REFERENCE):
        reference, judge = _reference(parts, online, scoring, logits_of[REFERENCE])
        live.append(reference)
        judges += [] if judge is None else [judge]
    if needs.of_model(SCORER):
        scorer, small, features = _scorer(parts, online.scorer)
        live.append(features)
        judges.append(Judge(small, features.config))
    carried = carried - {f"{m.name}_{kind}" for m in live for kind in ("img", "txt")}
    cached = {key for m in live if isinstance(m, CachedModel) for key in m.keys} | carried
    first = None
    if online.first_stage.selector is not None:
        early = loop_selector(online, online.first_stage.selector)
        course = Schedule(filter_ratio=0.0)
        first = first_stage(early, Needs.of(early.selector), course)
    reuses_forward = (
        needs.of_model(LEARNER) != ()
        and online.weights == "learner"
        and parts.trainer.micro_batch_size is not None
        and scoring_is_forward(model, scoring)
    )

    def sample_flops() -> SampleFlops:
        cuts = _cuts_batches(parts)
        return selecting_flops(_learner_flops(parts), judges, scorer=small, micro_batches=cuts)

    in_loop = InLoopSelection(
        draw=step_draw(built, schedule),
        plan=plan,
        live=live,
        carried=tuple(sorted(carried)),
        data=pool_data(needs),
        reuses_forward=reuses_forward,
        micro_batch=parts.trainer.micro_batch_size,
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
        references=_carried_features(parts, cached),
        in_loop=in_loop,
        first_stage=first,
        losses=losses,
        diagnostics=diagnostics,
        record=record,
        scorer=scorer,
    )


def _losses_seen(source: PoolSource, needs: Needs) -> LossesSeen | None:
    """The losses of training, where a selector reads them: a column of the pool that changes."""
    if not needs.training_loss:
        return None
    losses = LossesSeen(len(source))
    source.provide(TRAINING_LOSS, losses.values)
    return losses


def _scoring_config(scoring: ScoringSettings) -> ScoringConfig:
    return ScoringConfig(
        image_size=scoring.image_size,
        patch_dropout=scoring.patch_dropout,
        precision=scoring.precision,
        mode=scoring.mode,
    )


def _reference(
    parts: RunParts, online: EveryStepSettings, scoring: ScoringConfig, logits: Logits
) -> tuple[LiveFeatures, Judge | None]:
    """The reference, and its model where it is not cached."""
    live = online.reference.model
    if live.name is None:
        aliases = reference_aliases(online)
        keys = (aliases[f"{REFERENCE}_img"], aliases[f"{REFERENCE}_txt"])
        check_cached(parts.source, aliases)
        return CachedModel(name=REFERENCE, keys=keys, known_logits=logits), None
    clip = clip_model_from(live, trained=True)
    _check_inputs(parts.clip, clip, live.PLACE)
    frozen = clip.model.eval().requires_grad_(False)
    plain_scoring = ScoringConfig(precision=scoring.precision)
    return (
        ScoredModel(
            name=REFERENCE,
            model=lambda: frozen.to(parts.source.device),
            config=plain_scoring,
            image_size=_image_size(clip),
        ),
        Judge(clip, plain_scoring),
    )


def _scorer(parts: RunParts, settings: ScorerModel) -> tuple[OnlineScorer, ClipModel, ScoredModel]:
    """The small scorer, its model, and its features."""
    with torch.random.fork_rng():
        torch.manual_seed(parts.common.seed)
        clip = clip_model_from(settings)
    _check_inputs(parts.clip, clip, settings.PLACE)
    size = _image_size(clip)
    scorer = OnlineScorer(clip.model, parts.optim, image_size=size)
    features = ScoredModel(
        name=SCORER,
        model=lambda: scorer.on_device(parts.source.device),
        config=ScoringConfig(),
        image_size=size,
    )
    return scorer, clip, features


def _image_size(clip: ClipModel) -> int:
    size = clip.config["preprocess_cfg"]["size"]
    return int(size if isinstance(size, int) else size[0])


def _check_inputs(learner: ClipModel, other: ClipModel, option: str) -> None:
    """Another model sees the learner's images, resized, and its tokens.

    Raises:
        InputError: its images are normalised otherwise, or it has another tokenizer.
    """
    for key in ("mean", "std"):
        ours, theirs = (tuple(clip.config["preprocess_cfg"][key]) for clip in (learner, other))
        if ours != theirs:
            raise InputError(
                f"{option} must take images with the model's {key}, {ours}. It wants {theirs}. Use "
                "cached features instead."
            )
    if not same_tokens(learner, other):
        raise InputError(
            f"{option} must have the tokenizer and context length of the model: for a small model "
            "of your own set its architecture."
        )


def _carried_features(parts: RunParts, keys: set[str]) -> list[RowFeatures]:
    """Cached features that batches bring for the selector, beside those of the loss."""
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
    """Arrays of the pool by row, whichever feature set they are in."""
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
        loader=loader_options(parts.data),
        batch_size=online.batch_size,
        max_image_pixels=parts.data.max_image_pixels,
        max_bad_fraction=parts.pool.max_bad_fraction,
        progress=progress,
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
