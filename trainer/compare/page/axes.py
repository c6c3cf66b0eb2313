"""Axes of charts: where a value lies, in percent of the axis, and round numbers beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

COLOURS = 8  # of arms, in page.css; the baseline has one of its own

_SHORT = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A number beside an axis."""

    at: float  # in percent of the axis
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range of values, and the numbers that are written beside it."""

    low: float
    high: float
    ticks: tuple[Tick, ...]
    is_log: bool = False

    def at(self, value: float) -> float:
        """Return where a value lies, in percent of the axis; what is beyond an end lies there."""
        return _place(self.low, self.high, value, self.is_log)


def short(value: float) -> str:
    """Format a number with a prefix of the SI: 2.5 M."""
    for factor, prefix in _SHORT:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"


def linear_axis(values: Iterable[float], *, spaces: int = 4) -> Axis:
    """Choose an axis with about so many spaces between round numbers; NaN does not count."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    width = high - low or abs(high) or 1.0
    step = _round_step(width / spaces)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    low, high = first * step, last * step
    ticks = [round(number * step, 12) for number in range(first, last + 1)]
    return Axis(
        low=low,
        high=high,
        ticks=tuple(Tick(at=_place(low, high, tick, False), text=short(tick)) for tick in ticks),
    )


def ratio_axis(values: Iterable[float]) -> Axis:
    """Choose a logarithmic axis of ratios around 1, from 1/2 to 2 at least and 1/32 to 32 at most.

    Values of 0 and NaN do not count.
    """
    logs = [abs(math.log2(value)) for value in values if math.isfinite(value) and value > 0]
    power = min(5, max(1, math.ceil(max(logs, default=1.0))))
    low, high = 2.0**-power, 2.0**power
    step = 1 if power <= 3 else 2
    powers = [number for number in range(-power, power + 1) if number % step == 0]
    return Axis(
        low=low,
        high=high,
        ticks=tuple(
            Tick(
                at=_place(low, high, 2.0**each, True),
                text=f"1/{2**-each}" if each < 0 else f"{2**each}",
            )
            for each in powers
        ),
        is_log=True,
    )


def arm_classes(arms: Sequence[str], baseline: str) -> dict[str, str]:
    """Give each arm its class in page.css: `base` for the baseline, c0, c1 ... for the others."""
    others = [arm for arm in arms if arm != baseline]
    return {baseline: "base"} | {arm: f"c{n % COLOURS}" for n, arm in enumerate(others)}


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of 10 that is no smaller."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _place(low: float, high: float, value: float, is_log: bool) -> float:
    if is_log:
        low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
    return round(float(np.clip(100 * (value - low) / (high - low), 0.0, 100.0)), 2)
