"""Whether all ranks have chosen the same samples, where each of them decides alone.

Every rank works out by itself what is selected, which samples a step reads (the order, a version of
the selection, a first stage) and which of them it trains on, so that no rows travel. That is right
as long as all ranks get the same answer. They do not where one sees another file, another version
of a library or another kind of device, and then some samples are trained on twice, others never.
"""

from __future__ import annotations

from collections import Counter

import torch

from siftclip.errors import InputError
from siftclip.ranks import Ranks

# Steps between two comparisons. One sums 16 bytes a step and rank over the ranks, in a single
# collective: 0.4 ms with gloo on one machine, and it waits for the device.
EVERY_N_STEPS = 50


class RankAgreement:
    """Compares over ranks what each step reads and trains on, as digests, every N steps."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._digests: list[int] = []

    def note(self, step: int, *, read: int, trained: int) -> None:
        """Take note of a step.

        Args:
            step: of the run, from 0.
            read: digest of the samples that all ranks together read.
            trained: digest of those that they train on; 0 where that is all of them.
        """
        self._steps.append(step)
        self._digests += [read, trained]

    def is_due(self, step: int, total_steps: int) -> bool:
        """Return whether to compare after a step: the first, every 50th, and the last."""
        return step == 1 or step % EVERY_N_STEPS == 0 or step == total_steps

    def check(self, ranks: Ranks) -> None:
        """Compare what was noted since the last time. Every rank calls it at the same steps.

        Raises:
            InputError: ranks differ; on all of them, with the same message.
        """
        names = [
            f"samples to {what} at step {step} of training (counted from 0)"
            for step in self._steps
            for what in ("read", "train on")
        ]
        digests, self._steps, self._digests = self._digests, [], []
        require_same(ranks, digests, names)


def require_same(ranks: Ranks, digests: list[int], names: list[str]) -> None:
    """Refuse decisions that are not the same on all ranks. Every rank must call it.

    Args:
        ranks: that have decided.
        digests: of the decisions of this rank, int64; equally many on every rank.
        names: of the decisions, such as "samples of the selection", for the message.

    Raises:
        InputError: names the first decision in which ranks differ, and the ranks; on all of them.
    """
    if ranks.size == 1 or not digests:
        return
    everywhere = torch.zeros(ranks.size, len(digests), dtype=torch.int64)
    everywhere[ranks.rank] = torch.tensor(digests)
    everywhere = ranks.sum(everywhere)
    differs = (everywhere != everywhere[:1]).any(0)
    if not differs.any():
        return
    at = int(differs.nonzero()[0])
    values = everywhere[:, at].tolist()
    usual, _ = Counter(values).most_common(1)[0]
    same = ", ".join(str(rank) for rank, value in enumerate(values) if value == usual)
    others = ", ".join(str(rank) for rank, value in enumerate(values) if value != usual)
    raise InputError(
        f"The ranks have chosen different {names[at]}: rank {others} others than rank {same}. Each "
        "rank decides by itself, and all must see the same files (pool, features, output_dir), run "
        "the same versions of all packages, and have the same kind of device. Start a new run when "
        "they do."
    )
