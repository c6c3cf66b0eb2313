"""The selection by negCLIPLoss from 8-bit products, and float32 ones where they leave it open."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from siftclip.ranks import sum_arrays
from siftclip.selectors.core.base import Requirements, Source, WorkUnit
from siftclip.selectors.core.rules import Threshold, TopFraction
from siftclip.selectors.core.source import Cache
from siftclip.selectors.kernels.pair_log_sums import pair_log_sums, screened_log_sums
from siftclip.selectors.methods.clip_score import clip_score

_DIRECTIONS = ("row", "column")
_SCORE = ("clip", *_DIRECTIONS)
# Of the first block: what is looked at before all of it is screened, at about 1 % of the work of a
# pass over 50,000 samples. Fewer samples than that many are screened without a look.
PROBE_SAMPLES, PROBE_FROM = 1024, 8192
# Beyond this share of samples float32 products for all take less time: a screened pass takes 0.35
# of one in float32, and the two directions of a sample, one by one, 1.5 of its part of that
OPEN_LIMIT = 0.43
_MARGIN = 1.1  # in errors: the cut moves a little as the samples at it become exact


def undecided(
    scores: np.ndarray,
    errors: np.ndarray,
    *,
    count: int | None = None,
    threshold: float | None = None,
) -> tuple[np.ndarray, float]:
    """Find the scores whose errors leave open what a rule keeps, bool [n], and about where it cuts.

    The rule keeps the `count` best, or those of at least `threshold`. Samples of which it is False
    are kept or dropped whatever the true scores are, and stand on that side of all others.

    Args:
        scores: float64 [n], NaN where there is none.
        errors: float64 [n], at least 0; the true score is not farther away.
        count: of those that are kept.
        threshold: of the score; exactly one of the two is given.
    """
    lower, upper = scores - errors, scores + errors
    if threshold is not None:
        return (lower <= threshold) & (upper >= threshold), threshold
    scored = ~np.isnan(scores)
    position = int(scored.sum()) - (count or 0)
    if count == 0 or position <= 0:  # nothing or everything is kept
        return np.zeros(len(scores), dtype=bool), np.nan
    lowest, cut, highest = (
        np.partition(values[scored], position)[position] for values in (lower, scores, upper)
    )
    return (upper >= lowest) & (lower <= highest), float(cut)  # False for NaN


def _at_cut(is_open: np.ndarray, scores: np.ndarray, errors: np.ndarray, cut: float) -> np.ndarray:
    """Find the undecided samples that may be at the cut itself, bool [n]; see `undecided`."""
    near: np.ndarray = is_open & (np.abs(scores - cut) <= _MARGIN * errors)
    return near


def usable_blocks(
    source: Source,
    requires: Requirements,
    task: WorkUnit,
    batch_size: int,
    usable: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Yield the usable samples of each block of a task, which are compared with each other.

    Args:
        source: the samples.
        requires: two feature keys, of images and texts.
        task: m samples, in runs of blocks.
        batch_size: samples of a block.
        usable: bool [m] where it is known already.

    Yields:
        where they stand in the task, int64 [b], and their images and texts, float [b, d].
    """
    for start in range(0, len(task.rows), batch_size):
        if usable is not None:
            at = start + np.flatnonzero(usable[start : start + batch_size])
            chunk = source.take(task.rows[at], requires)
            image, text = (chunk.features[key] for key in requires.features)
        else:
            chunk = source.take(task.rows[start : start + batch_size], requires)
            mask = chunk.usable()
            at = start + mask.nonzero()[:, 0].cpu().numpy()
            image, text = (chunk.features[key] for key in requires.features)
            if len(at) < len(chunk):
                image, text = image[mask], text[mask]
        if len(at):
            yield at, image, text


class Screening:
    """Scores of all samples of a source that are as precise as a rule needs them."""

    def __init__(
        self,
        source: Source,
        cache: Cache,
        requires: Requirements,
        *,
        rule: TopFraction | Threshold,
        temperature: float,
        batch_size: int,
        passes: int,
        tasks: Callable[[int], Sequence[WorkUnit]],
    ) -> None:
        """Set what is scored; `tasks` gives those of a pass, and is asked again each time, because
        they hold all rows."""
        self._source, self._cache, self._requires = source, cache, requires
        self._rule, self._temperature, self._batch_size = rule, temperature, batch_size
        self._passes, self._tasks = passes, tasks
        self.recomputed = 0  # samples that needed a float32 product

    def open_share(self) -> float:
        """Estimate the share of samples that need float32 products, by some of the first.

        The same on all ranks; 0 where the samples are too few to look.
        """
        source = self._source
        if len(source) < PROBE_FROM:
            return 0.0
        share = self._open_share_of_first() if source.ranks.rank == 0 else 0.0
        return float(source.ranks.sum(torch.tensor(share, dtype=torch.float64)))

    def _open_share_of_first(self) -> float:
        tasks = self._tasks(0)
        if not tasks:
            return 0.0
        first = WorkUnit(name="probe", rows=tasks[0].rows[: self._batch_size])
        blocks = usable_blocks(self._source, self._requires, first, self._batch_size)
        block = next(blocks, None)
        if block is None:
            return 0.0
        _, image, text = block
        some = slice(PROBE_SAMPLES)  # blocks are in a random order
        ways = ((image[some], text), (text[some], image))
        sums = [screened_log_sums(*pair, self._temperature) for pair in ways]
        scale = self._temperature / 2
        normalisers = scale * (sums[0].row + sums[1].row).double().numpy()
        errors = scale * (sums[0].row_error + sums[1].row_error).double().numpy()
        scores = clip_score(image[some], text[some]).double().numpy() - normalisers
        if not np.isfinite(errors).all():
            return 1.0
        is_open, cut = self._undecided(scores, errors)
        return float(_at_cut(is_open, scores, errors, cut).mean())

    def scores(self) -> np.ndarray | None:
        """Return scores float64 [n] that serve the rule like float32 ones; None without a bound."""
        scores, errors = self._screened_scores()
        if not np.isfinite(errors).all():
            return None
        steps = list(itertools.product(range(self._passes), _DIRECTIONS))
        done = np.zeros(len(scores), dtype=np.int32)  # steps whose sums are float32
        while True:
            is_open, cut = self._undecided(scores, errors)
            is_open &= done < len(steps)
            if not is_open.any():
                break
            # Samples at the cut come first: once they are exact, so is the cut, and it decides
            # about most others. Those that a better cut brings in catch up step by step.
            near = _at_cut(is_open, scores, errors, cut)
            chosen = near if near.any() else is_open
            step = int(done[chosen].min())
            chosen &= done == step
            changes = self._changes(*steps[step], chosen)
            scores += changes[0] / self._passes
            errors += changes[1] / self._passes
            done[chosen] += 1
        self.recomputed = int((done > 0).sum())
        return scores

    def _undecided(self, scores: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, float]:
        if isinstance(self._rule, Threshold):
            # as the rule compares
            return undecided(scores, errors, threshold=float(np.float32(self._rule.threshold)))
        samples = len(self._source)
        count = self._rule.asked_samples(samples, len(self._source.whole))
        return undecided(scores, errors, count=count * len(scores) // max(1, samples))

    def _screened_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute scores by 8-bit integers, and bounds of their errors: float64 [n] each."""
        source = self._source
        totals = np.zeros((2, len(source)))
        unseen = np.ones(len(source), dtype=bool)
        for number in range(self._passes):
            tasks = self._tasks(number)
            mine = source.mine(tasks)
            gathered = np.zeros_like(totals)
            label = f"NegCLIPLoss {number + 1}/{self._passes}"
            with source.bar(sum(len(task.rows) for task in mine), label) as bar:
                for task in mine:
                    known = self._screened(task)
                    at = source.index_of(task.rows)
                    # in float64, so that nothing is left of a sum that is replaced later
                    clip, row, column = (known[key].astype(np.float64) for key in _SCORE)
                    gathered[0, at] = clip - row - column
                    gathered[1, at] = known["row_error"].astype(np.float64) + known["column_error"]
                    bar.update(len(task.rows))
            totals += sum_arrays(source.ranks, gathered) / self._passes
            for task in tasks:
                unseen[source.index_of(task.rows)] = False
        totals[0, unseen] = np.nan
        return totals[0], totals[1]

    def _screened(self, task: WorkUnit) -> dict[str, np.ndarray]:
        """Compute CLIP score, normalisers and error bounds of each sample, float32 [m] each."""
        kept = self._cache.get(f"screened-{task.name}")
        if kept is not None:
            return kept
        names = ("row", "column", "row_error", "column_error")
        arrays = {name: np.zeros(len(task.rows), dtype=np.float32) for name in names}
        arrays["clip"] = np.full(len(task.rows), np.nan, dtype=np.float32)
        for at, image, text in usable_blocks(self._source, self._requires, task, self._batch_size):
            sums = screened_log_sums(image, text, self._temperature)
            for name in names:
                arrays[name][at] = self._temperature / 2 * getattr(sums, name).numpy()
            arrays["clip"][at] = clip_score(image, text).numpy()
        self._cache.put(f"screened-{task.name}", **arrays)
        return arrays

    def _changes(self, number: int, direction: str, wanted: np.ndarray) -> np.ndarray:
        """Compute how float32 normalisers of a pass change scores and errors: float64 [2, n]."""
        source = self._source
        changes = np.zeros((2, len(source)))
        mine = source.mine(self._tasks(number))
        mine = [task for task in mine if wanted[source.index_of(task.rows)].any()]
        with source.bar(sum(len(task.rows) for task in mine), "NegCLIPLoss, undecided") as bar:
            for task in mine:
                chosen = wanted[source.index_of(task.rows)]
                known = self._screened(task)
                exact = self._exact(task, direction, chosen, ~np.isnan(known["clip"]))
                at = source.index_of(task.rows[chosen])
                changes[0, at] = known[direction][chosen].astype(np.float64) - exact
                changes[1, at] = -known[f"{direction}_error"][chosen]
                bar.update(len(task.rows))
        return sum_arrays(source.ranks, changes)

    def _exact(
        self, task: WorkUnit, direction: str, chosen: np.ndarray, usable: np.ndarray
    ) -> np.ndarray:
        """Compute float32 normalisers of a task's chosen samples in one direction: float32 [c]."""
        # Which samples are chosen follows from the rule, of which a cache of scores knows nothing.
        digest = hashlib.sha256(np.packbits(chosen).tobytes()).hexdigest()[:16]
        name = f"exact-{direction}-{task.name}-{digest}"
        kept = self._cache.get(name)
        if kept is not None:
            return kept["normaliser"]
        exact = np.zeros(len(task.rows), dtype=np.float32)
        blocks = usable_blocks(self._source, self._requires, task, self._batch_size, usable)
        for at, image, text in blocks:
            left, right = (image, text) if direction == "row" else (text, image)
            sums, _ = pair_log_sums(left[torch.from_numpy(chosen[at])], right, self._temperature)
            exact[at[chosen[at]]] = self._temperature / 2 * sums.numpy()
        of_chosen: np.ndarray = exact[chosen]
        self._cache.put(name, normaliser=of_chosen)
        return of_chosen
