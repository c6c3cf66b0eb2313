"""Joint sampling of a sub-batch: samples are drawn in chunks, each given all that came before.

Evans et al., "Data curation via joint example selection further accelerates multimodal learning"
(JEST), arXiv 2406.17711. What a chunk is drawn by is the learnability of `pair_losses`: the loss
of the learner less that of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from siftclip.hashing import uid_order
from siftclip.ranks import OneRank, Ranks, sum_arrays
from siftclip.selectors.core.noise import gumbel, noise_state
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.core.source import Logits
from siftclip.selectors.core.sub_batch import SubBatch
from siftclip.selectors.methods.jest.pair_losses import PairLosses, known_whole


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
    usable: Tensor,
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
    of uids. A single rank waits for its device once, at the end. The public code for CLIP that
    follows the paper (an ablation of arXiv 2505.06699) draws its first chunk with weights S_ii -
    min S_ii, and takes exponentials that can overflow.

    Args:
        judges: learner, reference or both, on one device. Rows that are usable are finite.
        usable: bool [n], on that device.
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
    slices = sub_batch.group_slices(len(uids))
    begin, end = (rank * len(slices) // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    temperature = 1.0 if sub_batch.temperature is None else sub_batch.temperature
    state = noise_state(uids, sub_batch.seed)
    groups = {
        number: _Candidates.of(at, judges, losses, uids=uids[at], state=state[at])
        for number, at in enumerate(slices[begin:end], start=begin)
    }
    logits = {number: group.logits(lambda terms: terms.alone()) for number, group in groups.items()}
    first = usable.new_zeros(len(uids), dtype=torch.float64)
    for number, values in logits.items():
        at = slices[number]
        first[at] = torch.where(usable[at], values, torch.nan)
    # Places count from 1: 0 stands for a sample that a group lacks, and is never able.
    able = torch.cat([usable.new_zeros(1), usable])
    finite = [(_finite(judge.image, usable), _finite(judge.text, usable)) for judge in judges]
    quotas = sub_batch.quotas.tolist()
    sizes = [chunk_sizes(quota, chunks) for quota in quotas]  # of the chunks of each group
    count = max(map(len, sizes))
    for chunk in range(count):
        widths = [of_group[chunk] if chunk < len(of_group) else 0 for of_group in sizes]
        places = usable.new_zeros((len(slices), max(widths)), dtype=torch.int64)
        for number, keys in logits.items():
            group = groups[number]
            if temperature:
                keys = keys / temperature + group.noise(chunk)
            mine = able[1:][group.at]
            places[number, : widths[number]] = group.best(keys, mine, widths[number])
        if ranks.size > 1:
            places = ranks.sum(places)  # a single rank has filled each row
        new = places.flatten()
        able = able.index_fill(0, new, False)
        if chunk + 1 < count:
            _add(groups.values(), finite, new)
            logits = {
                number: group.logits(lambda terms: terms.increases())
                for number, group in groups.items()
            }
    drawn = usable & ~able[1:]
    told, scores = torch.stack([drawn.double(), first]).cpu().numpy()  # the only one that waits
    kept = told.astype(np.int64)
    for at, quota in zip(slices, quotas, strict=True):
        missing = quota - int(kept[at].sum())
        if missing:  # too few are usable
            kept[at] += keep_top(np.where(kept[at], np.nan, 0.0), uids[at], missing)
    return kept, sum_arrays(ranks, scores.astype(np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """The m samples of a group, with what the models say of them."""

    at: slice  # of the super-batch
    terms: Sequence[tuple[float, PairLosses]]  # (sign, losses) of each judge
    state: np.ndarray  # uint64 [m], of the noise
    by_uid: Tensor  # int64 [m], the order of uids, which decides between equal keys

    @classmethod
    def of(
        cls,
        at: slice,
        judges: Sequence[Judge],
        losses: type[PairLosses],
        *,
        uids: np.ndarray,
        state: np.ndarray,
    ) -> _Candidates:
        order = torch.from_numpy(uid_order(uids))
        return cls(
            at=at,
            terms=[
                (judge.sign, losses(judge.image[at], judge.text[at], judge.logits))
                for judge in judges
            ],
            state=state,
            by_uid=order.to(judges[0].image.device, non_blocking=True),
        )

    def logits(self, of: Callable[[PairLosses], Tensor]) -> Tensor:
        """Sum the signed answers of the judges: float64 [m]."""
        return torch.stack([sign * of(terms) for sign, terms in self.terms]).sum(0)

    def noise(self, chunk: int) -> Tensor:
        """Draw Gumbel noise for a chunk: float64 [m]."""
        drawn = torch.from_numpy(gumbel(self.state, chunk))
        return drawn.to(self.by_uid.device, non_blocking=True)

    def best(self, keys: Tensor, able: Tensor, count: int) -> Tensor:
        """Return places + 1 of the `count` largest keys above -inf; 0 where there are fewer.

        Args:
            keys: float64 [m]; NaN is no key.
            able: bool [m], which samples may be drawn.
            count: how many, at most m.
        """
        keys = torch.where(able & (keys > -torch.inf), keys, -torch.inf)[self.by_uid]
        values, order = keys.sort(descending=True, stable=True)
        places = self.by_uid[order[:count]] + (self.at.start + 1)
        return torch.where(values[:count] > -torch.inf, places, 0)


def _finite(values: Tensor, usable: Tensor) -> Tensor:
    """Return vectors, float [n, d], with zeros where one is not usable."""
    return values if known_whole(usable) else torch.where(usable[:, None], values, 0)


def _add(
    groups: Iterable[_Candidates], finite: Sequence[tuple[Tensor, Tensor]], places: Tensor
) -> None:
    """Judge the candidates of groups, by each of the judges, against what was drawn.

    Args:
        groups: of this rank.
        finite: image and text features of each judge, float [n, d].
        places: int64 [m], from 1; 0 is none.
    """
    present, at = places > 0, (places - 1).clamp_min(0)
    for number, (image, text) in enumerate(finite):
        of_image, of_text = image[at], text[at]
        for group in groups:
            group.terms[number][1].add(of_image, of_text, present=present)
