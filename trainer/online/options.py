"""What `online` in the configuration says, checked before any file is read."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from siftclip.selectors.base import Selector
from siftclip.selectors.errors import (
    InputError,
    require_choice,
    require_finite,
    require_fraction,
    require_int,
    require_positive,
)
from siftclip.selectors.source import TRAINING_LOSS, ExternalColumn, FeatureFile, Logits, nested
from siftclip.trainer.online.pool_embedding import require_whole_weights
from siftclip.trainer.online.schedule import Schedule
from siftclip.trainer.online.scoring import ScoringConfig
from siftclip.trainer.stages import plain, selector_from

CADENCES = ("once", "every_step", "every_n_steps", "every_epoch")
LEARNER, REFERENCE, SCORER = "learner", "reference", "scorer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a selector and the members of a composition read."""

    features: frozenset[str]
    files: tuple[FeatureFile, ...]
    columns: frozenset[ExternalColumn]

    @classmethod
    def of(cls, selector: Selector) -> Needs:
        """Of a selector."""
        requires = [member.requires for member in nested(selector, Selector)]  # type: ignore[type-abstract]  # mypy 4717
        return cls(
            features=frozenset(key for need in requires for key in need.features),
            files=tuple(file for need in requires for file in need.files),
            columns=frozenset(need.column for need in requires if need.column is not None),
        )

    def of_model(self, name: str) -> tuple[str, ...]:
        """The arrays of a model that are needed."""
        return tuple(sorted(self.features & {f"{name}_img", f"{name}_txt"}))

    @property
    def training_loss(self) -> bool:
        return TRAINING_LOSS in self.columns


def online_selector(config: DictConfig, node: str = "online.selector") -> tuple[Selector, str]:
    """A selector of the loop, in which `features.name` stands for `online.features`.

    Raises:
        InputError: it cannot be built.
    """
    scoped = copy.deepcopy(config)
    scoped.features.name = config.online.features
    selector, name, _ = selector_from(scoped, node)
    return selector, name


def kept_fraction(config: DictConfig, node: str) -> float:
    """The `fraction` of a selector of the loop.

    Raises:
        InputError: it has none, and no schedule says what takes its place.
    """
    fraction = OmegaConf.select(config, f"{node}.fraction")
    if fraction is None:
        raise InputError(
            f"{node}.fraction must say which part of a super-batch is trained on, such as 0.2; or "
            "set online.schedule.filter_ratio. Got null."
        )
    return require_fraction(f"{node}.fraction", fraction)


def schedule_from(config: DictConfig) -> Schedule:
    """The schedule of `online.schedule`."""
    options = plain(config.online.schedule)
    if options["filter_ratio"] is None:
        options["filter_ratio"] = 1 - kept_fraction(config, "online.selector")
    return Schedule(**options)


def reference_logits(config: DictConfig) -> Logits:
    """Scale and bias of the model that made the cached reference features."""
    node = config.online.reference.features
    owner = "online.reference.features"
    bias = node.logit_bias
    return Logits(
        scale=require_positive(f"{owner}.logit_scale", node.logit_scale),
        bias=0.0 if bias is None else require_finite(f"{owner}.logit_bias", bias),
        has_bias=bias is not None,
    )


def check_online(config: DictConfig) -> None:
    """Check all that can be known without a file or a model.

    Raises:
        InputError: an option of `online` is wrong, or does not go with another.
    """
    online = config.online
    require_choice("online.cadence", online.cadence, CADENCES)
    if online.cadence == "once":
        return
    selector, name = online_selector(config)
    needs = Needs.of(selector)
    reference_logits(config)
    require_choice("online.weights", online.weights, ("learner", "ema"))
    if online.weights == "ema" and config.optim.ema_decay is None:
        raise InputError("online.weights=ema needs an average of the weights: set optim.ema_decay.")
    if needs.training_loss and config.loss.name == "siglip":
        raise InputError(
            f"online.selector={name} needs the loss of each sample, which loss=siglip does not "
            "have: its terms belong to pairs of samples. Use loss=clip."
        )
    if online.cadence == "every_step":
        _check_every_step(config, selector, needs)
        return
    for share in ("start", "stop"):
        if not 0 <= require_finite(f"online.{share}", online[share]) <= 1:
            raise InputError(
                f"online.{share} must be a share of training in [0, 1]. Got {online[share]!r}."
            )
    if online.start >= online.stop:
        raise InputError(
            f"online.start must be below online.stop. Got {online.start!r} and {online.stop!r}."
        )
    require_fraction("online.pool_fraction", online.pool_fraction)
    require_int("online.batch_size", online.batch_size, minimum=1)
    if online.cadence == "every_n_steps":
        require_int("online.every_n_steps", online.every_n_steps, minimum=1)
    if needs.of_model(LEARNER):
        require_whole_weights(str(config.trainer.strategy))


def _check_every_step(config: DictConfig, selector: Selector, needs: Needs) -> None:
    online = config.online
    schedule_from(config)
    scoring = ScoringConfig(**plain(online.scoring))
    if scoring.image_size is not None and config.trainer.strategy == "fsdp":
        raise InputError(
            "online.scoring.image_size does not go with trainer.strategy=fsdp, whose position "
            "embeddings are sharded. Use trainer.strategy=ddp, or set it to null."
        )
    if online.groups != "auto":
        require_int("online.groups", online.groups, minimum=1)
    if type(selector).draw is Selector.draw:
        selector.draw(None, None)  # type: ignore[arg-type]  # it says that it cannot
    if needs.of_model(SCORER) and online.scorer.name is None:
        raise InputError(
            "online.selector reads the features of a scorer: name a small model with "
            "online.scorer.name, such as one of open_clip's."
        )
    if online.first_stage.selector is not None:
        ratio = require_finite("online.first_stage.filter_ratio", online.first_stage.filter_ratio)
        if not 0 <= ratio < 1:
            raise InputError(
                f"online.first_stage.filter_ratio must be in the range [0, 1). Got {ratio!r}."
            )
        first, name = online_selector(config, "online.first_stage.selector")
        found = Needs.of(first)
        live = [key for model in (LEARNER, SCORER) for key in found.of_model(model)]
        if live or found.training_loss:
            raise InputError(
                f"online.first_stage.selector={name} needs {live or 'the losses of training'}, "
                "which nobody has before the samples are read. Use cached features, as with "
                "online.features=NAME."
            )
