"""What `online` in the configuration says, checked before any file is read."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from siftclip.selectors.base import Selector
from siftclip.selectors.description import nested
from siftclip.selectors.errors import (
    InputError,
    require_choice,
    require_finite,
    require_fraction,
    require_int,
    require_positive,
)
from siftclip.selectors.source import TRAINING_LOSS, ExternalColumn, FeatureFile, Logits
from siftclip.trainer.objective import check_weighing
from siftclip.trainer.online.pool_embedding import require_whole_weights
from siftclip.trainer.online.schedule import Schedule
from siftclip.trainer.online.scoring_config import ScoringConfig
from siftclip.trainer.stages import BuiltSelector, plain, selector_from

CADENCES = ("once", "every_step", "every_n_steps", "every_epoch")
LEARNER, REFERENCE, SCORER = "learner", "reference", "scorer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a selector and the members of a composition read."""

    features: frozenset[str]
    files: tuple[FeatureFile, ...]
    columns: frozenset[ExternalColumn]
    learns: bool  # it, or a member, has a state that training changes

    @classmethod
    def of(cls, selector: Selector) -> Needs:
        """Of a selector."""
        members = list(nested(selector, Selector))  # type: ignore[type-abstract]  # mypy 4717
        requires = [member.requires for member in members]
        columns = [column for need in requires for column in (need.column, need.lists)]
        return cls(
            features=frozenset(key for need in requires for key in need.features),
            files=tuple(file for need in requires for file in need.files),
            columns=frozenset(column for column in columns if column is not None),
            learns=any(_learns(member) for member in members),
        )

    def of_model(self, name: str) -> tuple[str, ...]:
        """The arrays of a model that are needed."""
        return tuple(sorted(self.features & {f"{name}_img", f"{name}_txt"}))

    @property
    def training_loss(self) -> bool:
        return TRAINING_LOSS in self.columns


def _learns(selector: Selector) -> bool:
    return type(selector).state_dict is not Selector.state_dict


def online_selector(config: DictConfig, node: str = "online.selector") -> BuiltSelector:
    """A selector of the loop, in which `features.name` stands for `online.features`.

    Raises:
        InputError: it cannot be built.
    """
    if not OmegaConf.is_dict(OmegaConf.select(config, node)):
        raise InputError(
            f"{node} is a group of options: write selector@{node}=NAME, such as "
            f"selector@{node}=learnability. Got {OmegaConf.select(config, node)!r}."
        )
    scoped = copy.deepcopy(config)
    scoped.features.name = config.online.features
    own = OmegaConf.select(scoped, node)
    if config.online.cadence == "every_step":
        for name in ("rule", "threshold"):
            if own.get(name) is not None:
                raise InputError(
                    f"{node}.{name} has no place at every step, where a fraction of the "
                    f"super-batch is chosen. Set {node}.fraction, and online.schedule.temperature "
                    "to draw at random. Got " + repr(plain(own[name])) + "."
                )
        if (
            "fraction" in own
            and own.fraction is None
            and config.online.schedule.filter_ratio is not None
        ):
            own.fraction = 1.0  # the schedule says it
    return selector_from(scoped, node)


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
    """Check all that can be known without a file or a model; `check_loss` comes before.

    Raises:
        InputError: an option of `online` is wrong, or does not go with another; or the loss cannot
            use the weights of `selector` or `online.selector`.
    """
    online = config.online
    require_choice("online.cadence", online.cadence, CADENCES)
    offline = selector_from(config)
    check_weighing(config, offline.selector, f"selector={offline.name}")
    if online.cadence == "once":
        return
    own = {"every_step": "schedule"}.get(online.cadence, "every_n_steps")
    if own not in online:
        raise InputError(
            f"online.cadence={online.cadence} comes with options of its own: write "
            f"online={online.cadence}."
        )
    built = online_selector(config)
    selector, name = built.selector, built.name
    needs = Needs.of(selector)
    check_weighing(config, selector, f"online.selector={name}")
    logits = reference_logits(config)
    if getattr(selector, "loss", None) == "sigmoid" and needs.of_model(REFERENCE):
        live = OmegaConf.select(config, "online.reference.model.name")
        told = getattr(getattr(selector, "reference", None), "logit_bias", None)
        if live is None and told is None and not logits.has_bias:
            raise InputError(
                "online.selector.loss=sigmoid needs the logit bias of the reference: set "
                "online.reference.features.logit_bias and .logit_scale to those of the model that "
                "made the features, or use online.selector.loss=softmax."
            )
    require_choice("online.weights", online.weights, ("learner", "ema"))
    if online.weights == "ema" and config.optim.ema_decay is None:
        raise InputError("online.weights=ema needs an average of the weights: set optim.ema_decay.")
    if needs.training_loss and config.loss.name in ("siglip", "drrho"):
        raise InputError(
            f"online.selector={name} needs the loss of each sample, which "
            f"loss={config.loss.name} does not tell. Use loss=clip."
        )
    if needs.learns and not _learns(selector):
        raise InputError(
            f"online.selector={name}: a member of this composition learns while the model trains, "
            "and a composition does not let it. Use that member by itself."
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
    require_draw(selector, "online.selector")
    if chooses_before_reading(config, selector):
        _check_weightless(selector, "online.selector")
    schedule_from(config)
    scoring = ScoringConfig(**plain(online.scoring))
    if scoring.image_size is not None and config.trainer.strategy == "fsdp":
        raise InputError(
            "online.scoring.image_size does not go with trainer.strategy=fsdp, whose position "
            "embeddings are sharded. Use trainer.strategy=ddp, or set it to null."
        )
    if online.groups != "auto":
        require_int("online.groups", online.groups, minimum=1)
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
        early = online_selector(config, "online.first_stage.selector")
        first, name = early.selector, early.name
        require_draw(first, "online.first_stage.selector")
        _check_weightless(first, "online.first_stage.selector")
        found = Needs.of(first)
        if chooses_before_reading(config, selector):
            raise InputError(
                f"online.first_stage.selector={name} has no effect: online.selector itself chooses "
                "before anything is read. Set it to null."
            )
        live = [key for model in (LEARNER, SCORER) for key in found.of_model(model)]
        if live or found.training_loss or found.learns:
            what = live or "what training has shown"
            raise InputError(
                f"online.first_stage.selector={name} needs {what}, which nobody has before the "
                "samples are read. Use cached features, as with online.features=NAME."
            )


def _check_weightless(selector: Selector, option: str) -> None:
    """Refuse a selector that weighs where it chooses before anything is read.

    Its choice is a list of rows, which brings no weights to the step.
    """
    if selector.weighs:
        raise InputError(
            f"{option}: {type(selector).__name__} weighs the samples that it keeps, and chooses "
            "before they are read, where no weight can go with them. Select with it once "
            "(selector=...), every epoch or every N steps (online=every_epoch, "
            "online=every_n_steps), or use a selector that does not weigh."
        )


def require_draw(selector: Selector, option: str) -> None:
    """Check that a selector can choose a sub-batch.

    Args:
        selector: of the loop.
        option: the part of the configuration that it was built from.

    Raises:
        InputError: it cannot.
    """
    if type(selector).draw is Selector.draw:
        raise InputError(
            f"{option}: {type(selector).__name__} decides by itself how many samples it keeps, and "
            "cannot be used at every step. Use a selector with scores, or jest; or this one with "
            "online=every_epoch or online=every_n_steps."
        )


def chooses_before_reading(config: DictConfig, selector: Selector) -> bool:
    """Whether the selector of every step needs nothing that only the step itself knows."""
    needs = Needs.of(selector)
    live = [LEARNER, SCORER]
    if config.online.reference.model.name is not None:
        live.append(REFERENCE)
    # A state would run ahead of the step with the loader, and be lost with it.
    return not (any(map(needs.of_model, live)) or needs.training_loss or needs.learns)
