"""What the settings of `online` say, checked against selectors before any file is read."""

from __future__ import annotations

import logging
import os

from siftclip.errors import InputError, require_fraction
from siftclip.first_rank import is_first_rank
from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.plugins import takes_fraction
from siftclip.selectors.core.source import Logits
from siftclip.trainer.builders.losses import check_gives_sample_losses, check_weighing
from siftclip.trainer.builders.needs import (
    LEARNER,
    REFERENCE,
    SCORER,
    Needs,
    learns,
    require_no_training_loss,
)
from siftclip.trainer.builders.selection import BuiltSelector, selector_from
from siftclip.trainer.online.pool_embedding import require_whole_weights
from siftclip.trainer.online.schedule import Schedule
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.lightning import Strategy
from siftclip.trainer.settings.loss import LossSettings
from siftclip.trainer.settings.online import (
    CachedReference,
    EveryStepSettings,
    LoopSettings,
    OnceSettings,
    OnlineSettings,
)
from siftclip.trainer.settings.selector import SelectorNode, is_plugin

log = logging.getLogger(__name__)


def loop_selector(online: LoopSettings, node: SelectorNode | None = None) -> BuiltSelector:
    """Build a selector of the loop: `online.selector`, or the one of the first stage.

    Raises:
        InputError: it cannot be built.
    """
    node = online.selector if node is None else node
    if isinstance(online, EveryStepSettings):
        for name in ("rule", "threshold"):
            if node.parameters.get(name) is not None:
                raise InputError(
                    f"{node.place}.{name} has no place at every step, where a fraction of the "
                    f"super-batch is chosen. Set {node.place}.fraction, and "
                    "online.schedule.temperature to draw at random. Got "
                    f"{node.parameters[name]!r}."
                )
        schedule_says = online.schedule.filter_ratio is not None
        if "fraction" in node.parameters and node.fraction is None and schedule_says:
            node = node.with_parameters(fraction=1.0)
        if is_plugin(node.parameters):
            with options_of(under(node.place, "plugin")):
                is_taken = takes_fraction(node.parameters["plugin"])
            # else it is that of the super-batch alone
            node = node if is_taken else node.without_fraction()
    return selector_from(node)


def kept_fraction(node: SelectorNode) -> float:
    """Return the `fraction` of a selector of the loop.

    Raises:
        InputError: it has none, and no schedule says what takes its place.
    """
    if node.fraction is None:
        raise InputError(
            f"{node.place}.fraction is not set. It must say which part of a super-batch is trained "
            "on, such as 0.2; or set online.schedule.filter_ratio."
        )
    return require_fraction(f"{node.place}.fraction", node.fraction)


def schedule_from(online: EveryStepSettings) -> Schedule:
    """Build the schedule of `online.schedule`."""
    options = to_plain(online.schedule)
    if options["filter_ratio"] is None:
        options["filter_ratio"] = 1 - kept_fraction(online.selector)
    return Schedule(**options)


def reference_logits(features: CachedReference) -> Logits:
    """Return scale and bias of the model that made the cached reference features."""
    bias = features.logit_bias
    return Logits(
        scale=float(features.logit_scale),
        bias=0.0 if bias is None else float(bias),
        has_bias=bias is not None,
    )


def check_online(
    online: OnlineSettings, offline: SelectorNode, loss: LossSettings, strategy: Strategy
) -> None:
    """Check all that can be known without a file or a model.

    Raises:
        InputError: an option of `online` does not go with its selector; or the loss cannot use the
            weights of `selector` or `online.selector`.
    """
    before = selector_from(offline).selector
    require_no_training_loss(before, offline.name)
    check_weighing(loss, before, f"selector={offline.name}")
    if isinstance(online, OnceSettings):
        return
    selector, name = loop_selector(online).selector, online.selector.name
    needs = Needs.of(selector)
    check_weighing(loss, selector, f"online.selector={name}")
    if getattr(selector, "loss", None) == "sigmoid" and needs.of_model(REFERENCE):
        bias = getattr(getattr(selector, "reference", None), "logit_bias", None)
        has_bias = reference_logits(online.reference.features).has_bias
        if not has_live_reference(online) and bias is None and not has_bias:
            raise InputError(
                "online.selector.loss=sigmoid needs the logit bias of the reference: set "
                "online.reference.features.logit_bias and .logit_scale to those of the model that "
                "made the features, or use online.selector.loss=softmax."
            )
    if needs.training_loss:
        check_gives_sample_losses(loss, f"online.selector={name}")
    if needs.learns and not learns(selector):
        raise InputError(
            f"online.selector={name}: a member of this composition learns while the model trains, "
            "and a composition does not let it. Use that member by itself."
        )
    if isinstance(online, EveryStepSettings):
        _check_every_step(online, selector, needs)
    elif needs.of_model(LEARNER):
        require_whole_weights(strategy)


def has_live_reference(online: LoopSettings) -> bool:
    """Return whether the reference is a model, in place of cached features."""
    return isinstance(online, EveryStepSettings) and online.reference.model.name is not None


def _check_every_step(online: EveryStepSettings, selector: Selector, needs: Needs) -> None:
    require_draw(selector, online.selector.place)
    if chooses_before_reading(online, selector):
        _check_weightless(selector, "online.selector")
    schedule_from(online)
    if needs.of_model(SCORER) and online.scorer.name is None:
        raise InputError(
            "online.selector reads the features of a scorer: name a small model with "
            "online.scorer.name, such as one of open_clip's."
        )
    if online.first_stage.selector is not None:
        _check_first_stage(online, online.first_stage.selector, selector)
    named = {SCORER: online.scorer.name, REFERENCE: online.reference.model.name}
    for model, name in named.items():
        if name is not None and not needs.of_model(model) and is_first_rank(os.environ):
            log.warning(
                "the %s %r changes nothing: online.selector=%s does not read its features",
                model,
                name,
                online.selector.name,
            )


def _check_first_stage(online: EveryStepSettings, node: SelectorNode, selector: Selector) -> None:
    first = loop_selector(online, node).selector
    require_draw(first, node.place)
    _check_weightless(first, node.place)
    needs = Needs.of(first)
    if chooses_before_reading(online, selector):
        raise InputError(
            f"{node.place}={node.name} has no effect: online.selector itself chooses before "
            "anything is read. Set it to null."
        )
    live = [key for model in (LEARNER, SCORER) for key in needs.of_model(model)]
    if live or needs.training_loss or needs.learns:
        what = live or "what training has shown"
        raise InputError(
            f"{node.place}={node.name} needs {what}, which nobody has before the samples are "
            "read. Use cached features, as with online.features=NAME."
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


def chooses_before_reading(online: EveryStepSettings, selector: Selector) -> bool:
    """Return whether the selector of every step needs nothing that only the step itself knows."""
    needs = Needs.of(selector)
    live = [LEARNER, SCORER]
    if has_live_reference(online):
        live.append(REFERENCE)
    # A state would run ahead of the step with the loader, and be lost with it.
    return not (any(map(needs.of_model, live)) or needs.training_loss or needs.learns)
