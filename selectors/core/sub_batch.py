"""Drawing a sub-batch from a super-batch: exactly so many samples, equally many of each group.

Every rank must train on equally many samples, and no image should travel. So a super-batch is cut
into groups of consecutive samples, each of which a single rank holds, and every group is trained on
equally many samples: those that a selector chooses, and those that are drawn uniformly. A share of
all of them is not always a whole number of each group, so that quotas of a selector may differ by
one. Scores may look at all groups. An answer depends on the number of groups, not on how many
ranks share them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from siftclip.errors import InputError
from siftclip.hashing import uniform_score
from siftclip.purposes import HashPurpose
from siftclip.selectors.core.noise import bounded_logits, gumbel, noise_state
from siftclip.selectors.core.rules import can_be_kept, keep_top


@dataclass(frozen=True, slots=True, kw_only=True)
class SubBatch:
    """What is asked of a selector that is used at every step.

    Attributes:
        samples: of each group, or one less.
        groups: of consecutive samples, all equally long, in the order of the source's rows.
        temperature: of random draws; None: the method's own, 0: the best.
        seed: of the draws; uids of a super-batch differ from step to step.
        one_less: the groups, from 0, of which one sample less is asked for.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import Chunk, MemorySource, SubBatch, Uniform, draw
        >>> uids = np.array([[0, number] for number in range(6)], dtype=np.uint64)
        >>> source = MemorySource(Chunk(rows=np.arange(6), uids=uids))
        >>> sub_batch = SubBatch(samples=1, groups=2, temperature=0)  # the best of each three
        >>> draw(Uniform(seed=0, fraction=1), source, sub_batch).multiplicities
        array([0, 0, 1, 0, 1, 0])
    """

    samples: int
    groups: int = 1
    temperature: float | None = None
    seed: int = 0
    one_less: tuple[int, ...] = ()

    @property
    def quotas(self) -> np.ndarray:
        """How many samples of each group are asked for, int64 [groups]."""
        quotas = np.full(self.groups, self.samples, dtype=np.int64)
        quotas[list(self.one_less)] -= 1
        return quotas

    @classmethod
    def of_quotas(
        cls, quotas: np.ndarray, *, temperature: float | None = None, seed: int = 0
    ) -> SubBatch:
        """Return the sub-batch with these quotas, int64 [groups], that differ by at most one."""
        less = np.flatnonzero(quotas < quotas.max())
        return cls(
            samples=int(quotas.max()),
            groups=len(quotas),
            temperature=temperature,
            seed=seed,
            one_less=tuple(less.tolist()),
        )

    def group_slices(self, candidates: int) -> list[slice]:
        """Return where the samples of each group stand among so many candidates.

        Raises:
            ValueError: they cannot be cut into equal groups, or a group is too small.
        """
        size, rest = divmod(candidates, self.groups)
        if rest or size < self.samples:
            raise ValueError(
                f"{candidates} candidates cannot be cut into {self.groups} equal groups of at "
                f"least {self.samples}"
            )
        return [slice(start, start + size) for start in range(0, candidates, size)]


def draw_by_score(scores: np.ndarray, uids: np.ndarray, sub_batch: SubBatch) -> np.ndarray:
    """Keep the best scores of each group, or random ones: int64 [n] of 0 and 1.

    Without a temperature, or with 0, the largest scores. With one, samples are drawn without
    replacement from softmax(scores / temperature), as the largest scores / temperature plus Gumbel
    noise (arXiv 1903.06059). A sub-batch has its size in any case: where a group has too few scores
    above -inf, samples without a score (NaN) fill it up, and those of -inf come last of all.

    Args:
        scores: float [n].
        uids: uint64 [n, 2], which decide between equal scores and about the noise.
        sub_batch: how many of how many groups.
    """
    keys = scores.astype(np.float64)
    if sub_batch.temperature:
        able = can_be_kept(keys)
        noise = gumbel(noise_state(uids[able], sub_batch.seed), 0)
        keys[able] = bounded_logits(keys[able] / sub_batch.temperature) + noise
    kept = np.zeros(len(keys), dtype=np.int64)
    groups = sub_batch.group_slices(len(keys))
    for group, quota in zip(groups, sub_batch.quotas.tolist(), strict=True):
        of_group = keys[group]
        kept[group] = keep_top(of_group, uids[group], quota)
        for is_next in (np.isnan, np.isneginf):
            missing = quota - int(kept[group].sum())
            if not missing:
                break
            kept[group] += keep_top(np.where(is_next(of_group), 0.0, np.nan), uids[group], missing)
    return kept


def share_over_groups(total: int, groups: int, turn: int = 0) -> np.ndarray:
    """Split `total` samples into shares of equal groups: int64 [groups].

    The shares differ by at most one, and the larger ones lie evenly among the groups. Over `groups`
    consecutive turns every group has the same sum.
    """
    share, rest = divmod(total, groups)
    larger = (np.arange(groups) + turn) * rest % groups < rest
    return share + larger.astype(np.int64)


def add_uniform(
    kept: np.ndarray,
    uids: np.ndarray,
    uniform_samples: np.ndarray,
    *,
    seed: int,
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """Add uniformly random samples of each group to a sub-batch, of those not kept yet.

    Args:
        kept: int64 [n] of 0 and 1.
        uids: uint64 [n, 2].
        uniform_samples: int64 [groups], how many of each group; see `share_over_groups`.
        seed: of the sub-batch.
        scores: float [n]; what has NaN or -inf there comes last here, too.
    """
    draws = uniform_score(uids, seed ^ HashPurpose.UNIFORM_PART).astype(np.float64)
    if scores is not None:
        draws = np.where(
            can_be_kept(scores), draws, np.where(np.isnan(scores), -1.0, -2.0) + draws / 2
        )
    quotas = SubBatch.of_quotas(uniform_samples)
    more: np.ndarray = kept + draw_by_score(np.where(kept > 0, np.nan, draws), uids, quotas)
    return more


def check_draw(owner: str, kept: np.ndarray, sub_batch: SubBatch) -> np.ndarray:
    """Return multiplicities, int64 [n], if they are a sub-batch.

    Raises:
        InputError: a group has another number of samples than asked for, or a sample twice.
    """
    counts = kept.reshape(sub_batch.groups, -1).sum(1)
    quotas = sub_batch.quotas
    if (counts != quotas).any() or kept.max(initial=0) > 1 or kept.min(initial=0) < 0:
        asked = quotas.tolist() if sub_batch.one_less else sub_batch.samples
        raise InputError(
            f"{owner} must choose {asked} different samples of each of the "
            f"{sub_batch.groups} groups of a super-batch. Got {counts.tolist()}."
            + (
                " The quotas of groups differ (`sub_batch.quotas`), because "
                "the uniform part of the sub-batch is no whole number of samples of each."
                if sub_batch.one_less
                else ""
            )
        )
    return kept
