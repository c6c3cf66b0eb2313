"""How ranks share the shards that are embedded anew, and in which precision they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftclip.trainer.online import pool_embedding
from siftclip.trainer.online.pool_embedding import share_of
from siftclip.trainer.stages.train import train_stage


@given(sizes=st.lists(st.integers(1, 50), max_size=30), ranks=st.integers(1, 5))
def test_ranks_share_shards_by_their_samples(sizes: list[int], ranks: int) -> None:
    ends = np.cumsum(sizes)
    parts = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    shares = [share_of(parts, rank=rank, world_size=ranks) for rank in range(ranks)]
    everything = [row for share in shares for part in share for row in part.tolist()]
    assert sorted(everything) == list(range(sum(sizes)))
    for share in shares:
        assert [part[0] for part in share] == sorted(part[0] for part in share)
    loads = [sum(map(len, share)) for share in shares]
    # a rank got its last part when no other had fewer samples
    smallest = min((len(part) for part in shares[int(np.argmax(loads))]), default=0)
    assert max(loads) - min(loads) <= smallest


@pytest.mark.parametrize(("precision", "expected"), [("bf16-mixed", True), ("32-true", False)])
def test_the_learner_embeds_as_it_is_trained(
    precision: str,
    expected: bool,
    base: list[str],
    compose: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []

    def embed(*arguments: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return embed_batch(*arguments)

    embed_batch = pool_embedding.embed_batch
    monkeypatch.setattr(pool_embedding, "embed_batch", embed)
    words = ["online=every_n_steps", "online.every_n_steps=3", f"trainer.precision={precision}"]
    words += ["selector=random", "selector.fraction=1", "selector@online.selector=clip_score"]
    words += ["online.selector.features=learner", "online.selector.fraction=0.5"]
    train_stage(compose("train", [*base, *words]))
    assert seen
    assert set(seen) == {expected}
