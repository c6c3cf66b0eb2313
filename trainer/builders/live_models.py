"""The models that score every super-batch: the learner, a reference, a small scorer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import InputError
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.builders.needs import LEARNER, REFERENCE, SCORER, Needs
from siftclip.trainer.builders.objective import same_tokens
from siftclip.trainer.builders.online_identity import check_cached, reference_aliases
from siftclip.trainer.builders.online_options import (
    reference_logits,
)
from siftclip.trainer.builders.run_parts import RunParts
from siftclip.trainer.online.controller import Learner
from siftclip.trainer.online.sample_flops import Judge
from siftclip.trainer.online.scorer import OnlineScorer
from siftclip.trainer.online.scoring_config import ScoringConfig
from siftclip.trainer.online.scoring_models import CachedModel, LiveFeatures, ScoredModel
from siftclip.trainer.settings.model import ScorerModel
from siftclip.trainer.settings.online import EveryStepSettings, ScoringSettings


@dataclass(slots=True, kw_only=True)
class LiveModels:
    """The models that a super-batch is scored by, and what this costs."""

    features: list[LiveFeatures] = field(default_factory=list)
    judges: list[Judge] = field(default_factory=list)
    small: ClipModel | None = None  # the scorer's
    scorer: OnlineScorer | None = None

    def not_theirs(self, keys: Iterable[str]) -> set[str]:
        """Return those of the features' keys that none of the models gives: the pool's."""
        theirs = {f"{model.name}_{kind}" for model in self.features for kind in ("img", "txt")}
        return set(keys) - theirs

    def cached_keys(self, keys: Iterable[str]) -> set[str]:
        """Return the features that batches bring: a cached reference's and those no model gives."""
        cached = [model for model in self.features if isinstance(model, CachedModel)]
        return {key for model in cached for key in model.keys} | self.not_theirs(keys)


def live_models(
    parts: RunParts,
    online: EveryStepSettings,
    needs: Needs,
    learner: Learner,
    scoring: ScoringConfig,
) -> LiveModels:
    """Return the models whose features a selector needs of every super-batch."""
    live = LiveModels()
    if needs.of_model(LEARNER):
        live.features.append(ScoredModel(name=LEARNER, model=learner, config=scoring))
        live.judges.append(Judge(parts.clip, scoring))
    if needs.of_model(REFERENCE):
        reference, judge = _reference(parts, online, scoring)
        live.features.append(reference)
        live.judges += [] if judge is None else [judge]
    if needs.of_model(SCORER):
        live.scorer, live.small, features = _scorer(parts, online.scorer)
        live.features.append(features)
        live.judges.append(Judge(live.small, features.config))
    return live


def scoring_config(scoring: ScoringSettings) -> ScoringConfig:
    """Build what the scoring pass takes from its settings."""
    return ScoringConfig(
        image_size=scoring.image_size,
        patch_dropout=scoring.patch_dropout,
        precision=scoring.precision,
        mode=scoring.mode,
    )


def _reference(
    parts: RunParts, online: EveryStepSettings, scoring: ScoringConfig
) -> tuple[LiveFeatures, Judge | None]:
    """Build the reference, and its model where it is not cached."""
    live = online.reference.model
    if live.name is None:
        aliases = reference_aliases(online)
        keys = (aliases[f"{REFERENCE}_img"], aliases[f"{REFERENCE}_txt"])
        check_cached(parts.source, aliases)
        logits = reference_logits(online.reference.features)
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
    """Build the small scorer, its model, and its features."""
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
    """Check that another model sees the learner's images, resized, and its tokens.

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
