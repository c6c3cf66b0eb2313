"""Comparisons in this process, as several test files make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from siftclip.trainer.compare.arms import CompareOutcome, arms_of_overrides, compare_stage
from siftclip.trainer.compare.plan import Plan, plan_comparison


def run_compare(
    compose: Callable[..., Any], options: list[str], *, words: Sequence[str] = ()
) -> CompareOutcome:
    """What `siftclip compare` does with these overrides."""
    settings = compose("compare", options)
    arms = arms_of_overrides(settings, options, lambda own: compose("compare", own))
    return compare_stage(settings, arms, words=words)


def planned(compose: Callable[..., Any], options: list[str]) -> Plan:
    """What these overrides would train."""
    settings = compose("compare", options)
    arms = arms_of_overrides(settings, options, lambda own: compose("compare", own))
    return plan_comparison(settings, arms)
