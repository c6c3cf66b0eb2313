"""How many GPUs a loader feeds."""

from __future__ import annotations

import pytest

from siftclip.trainer.bench.feeding import PEAK_FLOPS, REACHED, describe_feeding, gpu_rate


def test_a_gpu_takes_what_it_computes() -> None:
    assert gpu_rate(44.34e9, PEAK_FLOPS["H100"]) == pytest.approx(REACHED * 989e12 / 44.34e9)


def test_a_loader_feeds_a_part_of_a_gpu_or_many() -> None:
    text = describe_feeding(1231.0, 44.34e9)
    assert text.startswith("0.5 A100 (2,463 samples/s), 0.16 H100 (7,807 samples/s), 0.95 RTX 4090")
    assert text.endswith("at 35% of their peak, which is assumed")
    assert describe_feeding(24_630.0, 44.34e9).startswith("10 A100")
