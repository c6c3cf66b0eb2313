"""Joint sampling of a sub-batch: samples are drawn in chunks, each given all that came before.

Evans et al., "Data curation via joint example selection further accelerates multimodal learning"
(JEST), arXiv 2406.17711. What a chunk is drawn by is the learnability of `pair_losses`: the loss
of the learner less that of the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from siftclip.ranks import OneRank, Ranks, sum_arrays
from siftclip.selectors.core.noise import gumbel, noise_state
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.core.source import Logits
from siftclip.selectors.core.sub_batch import SubBatch
from siftclip.selectors.methods.jest.pair_losses import PairLosses


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A model's view of all candidates."""

    image: Tensor  # float [n, d]
    text: Tensor  # float [n, d]
    logits: Logits
    sign: float  # of its losses in the learnability: 1 for the learner, -1 for the reference


def chunk_sizes(samples: int, chunks: int) -> list[int]:
    """Split a group into chunk sizes: as equal as possible, the larger ones first.

    Fewer chunks where there are fewer samples than chunks.
    """
    size, rest = divmod(samples, chunks)
    sizes = [size + (number < rest) for number in range(chunks)]
    return [size for size in sizes if size]


def joint_sample(
    judges: Sequence[Judge],
    usable: np.ndarray,
    uids: np.ndarray,
    sub_batch: SubBatch,
    *,
    losses: type[PairLosses],
    chunks: int,
    ranks: Ranks | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a sub-batch whose samples are learnable together (arXiv 2406.17711, algorithm 1).

    With K the samples of all groups that are drawn already, each group draws its share of the next
    chunk among its own others, without replacement and with probabilities softmax(logit_i /
    temperature), as the largest logit_i / temperature plus Gumbel noise (arXiv 1903.06059).
    logit_i is what the learnability of K grows by when i joins it. With the sigmoid loss that is
    S_ii + sum_{k in K} (S_ik + S_ki), exactly; with the softmax loss it is the learnability of i
    itself among K, to which it is close. The first chunk is drawn by what a pair is worth alone:
    S_ii with the sigmoid loss, and the difference of the pair's logits, reference less learner,
    with the softmax loss, whose diagonal says nothing without negatives.

    Noise is fresh for every chunk and a pure function of (seed, uid, chunk). No matrix of all pairs
    exists: a chunk costs two products of a rank's candidates with the chunk's samples per model.
    Products are made group by group, so that the answer does not depend on the number of ranks. A
    sample that is not usable is no candidate, but fills up a group that lacks others, in the order
    of uids. The public code for CLIP that follows the paper (an ablation of arXiv 2505.06699) draws
    its first chunk with weights S_ii - min S_ii, and takes exponentials that can overflow.

    Args:
        judges: learner, reference or both, on one device. Rows that are usable are finite.
        usable: bool [n].
        uids: uint64 [n, 2], which decide about the noise and between equal keys.
        sub_batch: how many of how many groups; the temperature is 1 where it has none.
        losses: whose learnability it is.
        chunks: at least 1. The larger, the closer to drawing one sample after the other.
        ranks: that share the groups: rank r of W draws for those from r G / W to (r + 1) G / W - 1.

    Returns:
        Multiplicities int64 [n] of 0 and 1, and the logits of the first chunk, float32 [n], NaN for
        samples that are not usable.
    """
    ranks = ranks or OneRank()
    groups = sub_batch.group_slices(len(uids))
    begin, end = (rank * len(groups) // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    temperature = 1.0 if sub_batch.temperature is None else sub_batch.temperature
    terms = {
        number: [
            (judge.sign, losses(judge.image[at], judge.text[at], judge.logits)) for judge in judges
        ]
        for number, at in enumerate(groups[begin:end], start=begin)
    }
    logits = {
        number: _signed([(sign, x.alone()) for sign, x in of_judges])
        for number, of_judges in terms.items()
    }
    first = np.zeros(len(uids), dtype=np.float32)
    for number, values in logits.items():
        first[groups[number]] = np.where(usable[groups[number]], values, np.nan)
    able, state = usable.copy(), noise_state(uids, sub_batch.seed)
    quotas = sub_batch.quotas.tolist()
    sizes = [chunk_sizes(quota, chunks) for quota in quotas]  # of the chunks of each group
    count = max(map(len, sizes))
    for chunk in range(count):
        widths = [of_group[chunk] if chunk < len(of_group) else 0 for of_group in sizes]
        # positions + 1; 0 where none is
        chosen = np.zeros((len(groups), max(widths)), dtype=np.int64)
        for number, keys in logits.items():
            at = groups[number]
            if temperature:
                keys = keys / temperature + gumbel(state[at], chunk)
            drawn = np.flatnonzero(
                keep_top(np.where(able[at], keys, np.nan), uids[at], widths[number])
            )
            chosen[number, : len(drawn)] = at.start + drawn + 1
        chosen = sum_arrays(ranks, chosen)  # a single rank has filled each row
        new = chosen[chosen > 0] - 1
        able[new] = False
        if chunk + 1 < count:
            _add(terms.values(), judges, torch.from_numpy(new))
            logits = {
                number: _signed([(sign, x.increases()) for sign, x in of_judges])
                for number, of_judges in terms.items()
            }
    kept = (usable & ~able).astype(np.int64)
    for at, quota in zip(groups, quotas, strict=True):
        missing = quota - int(kept[at].sum())
        if missing:  # too few are usable
            kept[at] += keep_top(np.where(kept[at], np.nan, 0.0), uids[at], missing)
    return kept, sum_arrays(ranks, first)


def _signed(parts: Sequence[tuple[float, Tensor]]) -> np.ndarray:
    """Sum (sign, float64 [m]) into an array."""
    return torch.stack([sign * values for sign, values in parts]).sum(0).cpu().numpy()


def _add(
    groups: Iterable[Sequence[tuple[float, PairLosses]]], judges: Sequence[Judge], new: Tensor
) -> None:
    """Judge the candidates of groups, by each of the judges, against the samples at int64 [m]."""
    for number, judge in enumerate(judges):
        at = new.to(judge.image.device)
        image, text = judge.image[at], judge.text[at]
        for terms in groups:
            terms[number][1].add(image, text)
