"""How many GPUs a loader can feed, by what they can compute at best and what runs reach of that."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Dense products in bfloat16, as NVIDIA's data sheets give them
PEAK_FLOPS: Mapping[str, float] = MappingProxyType(
    {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "RTX 4090": 165e12}
)
REACHED = 0.35  # of the peak: assumed, since nothing was measured; docs/scaling.md compares
_SHOWN = ("A100", "H100", "RTX 4090")


def gpu_rate(flops: float, peak_flops: float) -> float:
    """Return samples per second of a GPU that trains, of so many FLOPs each."""
    return REACHED * peak_flops / flops


def describe_feeding(samples_per_second: float, flops: float) -> str:
    """Say what GPUs take, and how many of them this rate feeds.

    Args:
        samples_per_second: of the loader.
        flops: of training on a sample.
    """
    parts = []
    for name in _SHOWN:
        rate = gpu_rate(flops, PEAK_FLOPS[name])
        parts.append(f"{samples_per_second / rate:.2g} {name} ({rate:,.0f} samples/s)")
    return f"{', '.join(parts)}, at {REACHED:.0%} of their peak, which is assumed"
