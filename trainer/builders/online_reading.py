"""Says what a selector of the loop reads, which decides when it can choose and what that costs."""

from __future__ import annotations

from siftclip.trainer.builders.needs import LEARNER, REFERENCE, SCORER, Needs
from siftclip.trainer.builders.online_identity import reference_aliases
from siftclip.trainer.builders.online_options import (
    chooses_before_reading,
    has_live_reference,
    loop_selector,
)
from siftclip.trainer.settings.online import EveryStepSettings, LoopSettings


def reading_in_words(online: LoopSettings) -> str:
    """Say in a line what `online.selector` reads, and so when it chooses."""
    selector = loop_selector(online).selector
    needs = Needs.of(selector)
    models = [LEARNER, SCORER, *([REFERENCE] if has_live_reference(online) else [])]
    live = sorted(key for model in models for key in needs.of_model(model))
    aliases = reference_aliases(online)
    cached = sorted(aliases.get(key, key) for key in needs.features - {*live})
    parts = [
        ", ".join(live),
        f"{', '.join(cached)} of the pool" if cached else "",
        "the losses of training" if needs.training_loss else "",
    ]
    what = " and ".join(part for part in parts if part) or "no features"
    before = isinstance(online, EveryStepSettings) and chooses_before_reading(online, selector)
    return f"online.selector: {type(selector).__name__} reads {what}: {_when(online, before, live)}"


def _when(online: LoopSettings, before: bool, live: list[str]) -> str:
    if before:
        return "it chooses before samples are read"
    if isinstance(online, EveryStepSettings):
        return "super-batches are read and scored"
    how = "the model in training embeds" if live else "nothing is embedded of"
    return f"{how} the samples to choose from"
