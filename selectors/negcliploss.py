"""negCLIPLoss: the CLIP score less what a caption and an image share with everybody else.

Wang et al., "CLIPLoss and Norm-Based Data Selection Methods for Multimodal Contrastive Learning",
arXiv 2405.19547.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siftclip.selectors.base import Choice, Requirements, ScoreSelector, Source, Task
from siftclip.selectors.clip_score import clip_score
from siftclip.selectors.errors import InputError, require_choice, require_finite, require_int
from siftclip.selectors.pair_log_sums import pair_log_sums, screened_log_sums
from siftclip.selectors.ranks import sum_arrays
from siftclip.selectors.rules import Threshold, TopFraction
from siftclip.selectors.source import TASK_SAMPLES, Memo
from siftclip.selectors.uniform import mix64

_PURPOSE = 0x6E65676C6F7373  # keeps the blocks apart from other uses of the same seed
_DIRECTIONS = ("row", "column")
_MARGIN = 1.1  # in errors: the cut moves a little as the samples at it become exact


def negcliploss(image: Tensor, text: Tensor, temperature: float) -> Tensor:
    """The score of each pair of a block, float32 [b]: its CLIP score less two normalisers.

    c_i - tau/2 log sum_j exp(<v_i, t_j> / tau) - tau/2 log sum_j exp(<v_j, t_i> / tau), j over the
    block with i itself: -tau times the pair's symmetric InfoNCE loss (arXiv 2405.19547, section 3;
    released code: `vas2.cs_new_helper`). The sums are sums, not means, so that a smaller block
    scores higher, as released. At most 0, up to rounding. Unlike the released code it does not
    overflow and holds no b x b matrix.

    Args:
        image: float [b, d] of unit norm, finite; not normalised again.
        text: float [b, d] of unit norm, finite.
        temperature: above 0.
    """
    row, column = pair_log_sums(image, text, temperature)
    return clip_score(image, text) - temperature / 2 * (row + column)


def block_order(uids: np.ndarray, seed: int, pass_number: int) -> np.ndarray:
    """The order in which a pass cuts samples into blocks: int64 [n], uniformly random.

    A pure function of the set of uids, uint64 [n, 2], of the seed and of the pass: samples are
    sorted by a hash. The released code draws `torch.randperm` without a seed.
    """
    state = mix64(np.asarray([seed % 2**64 ^ _PURPOSE], dtype=np.uint64))
    state = mix64(state ^ np.uint64(pass_number))
    keys = mix64(mix64(uids[:, 0] ^ state) ^ uids[:, 1])
    return np.lexsort((uids[:, 1], uids[:, 0], keys))


def undecided(
    scores: np.ndarray,
    errors: np.ndarray,
    *,
    count: int | None = None,
    threshold: float | None = None,
) -> tuple[np.ndarray, float]:
    """Whether the errors of scores leave open what a rule keeps, bool [n], and about where it cuts.

    The rule keeps the `count` best, or those of at least `threshold`. Samples of which it is False
    are kept or dropped whatever the true scores are, and stand on that side of all others.

    Args:
        scores: float64 [n], NaN where there is none.
        errors: float64 [n], at least 0; the true score is not farther away.
    """
    lower, upper = scores - errors, scores + errors
    if threshold is not None:
        return (lower <= threshold) & (upper >= threshold), threshold
    judged = ~np.isnan(scores)
    position = int(judged.sum()) - (count or 0)
    if count == 0 or position <= 0:  # nothing or everything is kept
        return np.zeros(len(scores), dtype=bool), np.nan
    lowest, cut, highest = (
        np.partition(values[judged], position)[position] for values in (lower, scores, upper)
    )
    return (upper >= lowest) & (lower <= highest), float(cut)  # False for NaN


class NegCLIPLoss(ScoreSelector):
    """Keep the pairs with the smallest contrastive loss among random others.

    With precision "screened", `select` multiplies 8-bit integers first, and then computes in
    float32 those samples alone that the bound of the error leaves undecided. It keeps what
    "float32" keeps, up to ties within float32 rounding (about 1e-6). `Choice.scores` are then
    within the bound (about 0.01) for decided samples; `scores` are float32 always.
    """

    def __init__(
        self,
        *,
        features: str,
        temperature: float = 0.01,
        batch_size: int = 32768,
        passes: int = 10,
        partition: str = "file",
        precision: str = "screened",
        seed: int = 0,
        **rule: Any,
    ) -> None:
        """Set the parameters.

        Args:
            features: name of a feature set, such as `l14` for the keys `l14_img` and `l14_txt`.
            temperature: of the CLIP model whose features these are.
            batch_size: samples of a block; their features are in memory at once. The last block
                of a partition is short, as released.
            passes: partitions whose normalisers are averaged; K in the paper.
            partition: cut each "file" into blocks by itself, as released, or the "global" pool.
            precision: "screened" or "float32", see the class. A GPU computes float32 always.
            seed: of the partitions.
            **rule: `fraction`, `threshold` or `rule`, see `ScoreSelector`.
        """
        super().__init__(**rule)
        self.features = features
        self.temperature = require_finite("selector.temperature", temperature)
        if self.temperature <= 0:
            raise InputError(f"selector.temperature must be above 0. Got {temperature!r}.")
        self.batch_size = require_int("selector.batch_size", batch_size, minimum=1)
        self.passes = require_int("selector.passes", passes, minimum=1)
        self.partition = require_choice("selector.partition", partition, ("file", "global"))
        self.precision = require_choice("selector.precision", precision, ("screened", "float32"))
        self.seed = require_int("selector.seed", seed, minimum=0)
        self._recomputed = 0

    @property
    def requires(self) -> Requirements:
        return Requirements(features=(f"{self.features}_img", f"{self.features}_txt"))

    @property
    def recomputed_samples(self) -> int:
        """How many samples the last screened `select` computed again in float32."""
        return self._recomputed

    def tasks(self, source: Source, pass_number: int) -> Sequence[Task]:
        """Runs of whole blocks of one partition."""
        parts = {part.name: part.rows for part in source.parts(self.requires)}
        if self.partition == "global":
            parts = {"pool": np.concatenate([*parts.values(), np.empty(0, dtype=np.int64)])}
        step = max(1, TASK_SAMPLES // self.batch_size) * self.batch_size
        tasks = []
        for name, rows in parts.items():
            order = block_order(source.uids[source.index_of(rows)], self.seed, pass_number)
            rows = rows[order]
            for start in range(0, len(rows), step):
                label = f"pass{pass_number}-{name}-{start}"
                tasks.append(Task(name=label, rows=rows[start : start + step]))
        return tasks

    def score_task(self, source: Source, task: Task) -> Tensor:
        """The scores of a run of blocks in float32."""
        values = torch.full((len(task.rows),), torch.nan)
        for at, image, text in self._blocks(source, task):
            values[at] = negcliploss(image, text, self.temperature).cpu()
        return values

    @torch.no_grad()
    def select(self, source: Source) -> Choice:
        """Score the samples as precisely as the rule needs, and apply it."""
        on_gpu = source.device.type == "cuda"
        if self.precision == "float32" or on_gpu or type(self.rule) not in (TopFraction, Threshold):
            return super().select(source)
        memo = source.memo(self)
        passes = [self.tasks(source, number) for number in range(self.passes)]
        scores, errors = self._screened_scores(source, memo, passes)
        if not np.isfinite(errors).all():
            return super().select(source)
        steps = list(itertools.product(passes, _DIRECTIONS))
        done = np.zeros(len(source), dtype=np.int32)  # steps whose sums are float32
        for round_number in itertools.count():
            is_open, cut = self._undecided(source, scores, errors)
            is_open &= done < len(steps)
            if not is_open.any():
                break
            # Samples at the cut come first: once they are exact, so is the cut, and it decides
            # about most others. Those that a better cut brings in catch up step by step.
            near = is_open & (np.abs(scores - cut) <= _MARGIN * errors)
            chosen = near if near.any() else is_open
            step = int(done[chosen].min())
            chosen &= done == step
            changes = self._changes(source, memo, round_number, *steps[step], chosen)
            scores += changes[0] / self.passes
            errors += changes[1] / self.passes
            done[chosen] += 1
        self._recomputed = int((done > 0).sum())
        values = scores.astype(np.float32)
        kept = self.rule(values, source.uids, len(source.whole))
        return Choice(multiplicities=kept, scores=values)

    def _undecided(
        self, source: Source, scores: np.ndarray, errors: np.ndarray
    ) -> tuple[np.ndarray, float]:
        if isinstance(self.rule, Threshold):
            return undecided(scores, errors, threshold=float(self.rule.threshold))
        assert isinstance(self.rule, TopFraction)
        samples = len(source.whole if self.rule.of == "pool" else source)
        return undecided(scores, errors, count=int(samples * self.rule.fraction))

    def _blocks(
        self, source: Source, task: Task, usable: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """The usable samples of each block: where they stand in the task, and their features.

        `usable` is bool [m] where it is known already.
        """
        for start in range(0, len(task.rows), self.batch_size):
            rows = task.rows[start : start + self.batch_size]
            if usable is not None:
                at = start + np.flatnonzero(usable[start : start + self.batch_size])
                chunk = source.take(task.rows[at], self.requires)
                image, text = (chunk.features[key] for key in self.requires.features)
            else:
                chunk = source.take(rows, self.requires)
                mask = chunk.usable()
                at = start + mask.nonzero()[:, 0].cpu().numpy()
                image, text = (chunk.features[key] for key in self.requires.features)
                if len(at) < len(rows):
                    image, text = image[mask], text[mask]
            if len(at):
                yield at, image, text

    def _screened_scores(
        self, source: Source, memo: Memo, passes: Sequence[Sequence[Task]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores by 8-bit integers, and bounds of their errors: float64 [n] each."""
        todo = [task for tasks in passes for task in source.mine(tasks)]
        todo = [task for task in todo if memo.get(f"screened-{task.name}") is None]
        with source.bar(sum(len(task.rows) for task in todo), type(self).__name__) as bar:
            for task in todo:
                memo.put(f"screened-{task.name}", **self._screened_task(source, task))
                bar.update(len(task.rows))
        totals = np.zeros((2, len(source)))
        for tasks in passes:
            gathered = np.zeros_like(totals)
            for task in source.mine(tasks):
                known = _kept(memo, f"screened-{task.name}")
                at = source.index_of(task.rows)
                gathered[0, at] = known["score"]
                gathered[1, at] = known["row_error"].astype(np.float64) + known["column_error"]
            totals += sum_arrays(source.ranks, gathered) / self.passes
        unseen = np.ones(len(source), dtype=bool)
        for task in passes[0]:
            unseen[source.index_of(task.rows)] = False
        totals[0, unseen] = np.nan
        return totals[0], totals[1]

    def _screened_task(self, source: Source, task: Task) -> dict[str, np.ndarray]:
        """Of each sample: score, normalisers and bounds of their errors, float32 [m] each."""
        names = ("row", "column", "row_error", "column_error")
        arrays = {name: np.zeros(len(task.rows), dtype=np.float32) for name in names}
        scores = np.full(len(task.rows), np.nan, dtype=np.float32)
        for at, image, text in self._blocks(source, task):
            sums = screened_log_sums(image, text, self.temperature)
            for name, values in arrays.items():
                values[at] = self.temperature / 2 * getattr(sums, name).numpy()
            scores[at] = clip_score(image, text).numpy() - arrays["row"][at] - arrays["column"][at]
        return {"score": scores, **arrays}

    def _changes(
        self,
        source: Source,
        memo: Memo,
        round_number: int,
        tasks: Sequence[Task],
        direction: str,
        wanted: np.ndarray,
    ) -> np.ndarray:
        """What float32 normalisers of a pass change of scores and of errors: float64 [2, n]."""
        changes = np.zeros((2, len(source)))
        mine = [task for task in source.mine(tasks) if wanted[source.index_of(task.rows)].any()]
        label = f"{type(self).__name__}, undecided"
        with source.bar(sum(len(task.rows) for task in mine), label) as bar:
            for task in mine:
                chosen = wanted[source.index_of(task.rows)]
                known = _kept(memo, f"screened-{task.name}")
                name = f"round{round_number}-{direction}-{task.name}"
                if memo.get(name) is None:
                    usable = ~np.isnan(known["score"])
                    exact = self._exact_task(source, task, direction, chosen, usable)
                    memo.put(name, normaliser=exact)
                old, error = (known[key][chosen] for key in (direction, f"{direction}_error"))
                at = source.index_of(task.rows[chosen])
                changes[0, at] = old.astype(np.float64) - _kept(memo, name)["normaliser"]
                changes[1, at] = -error
                bar.update(len(task.rows))
        return sum_arrays(source.ranks, changes)

    def _exact_task(
        self,
        source: Source,
        task: Task,
        direction: str,
        chosen: np.ndarray,
        usable: np.ndarray,
    ) -> np.ndarray:
        """The float32 normalisers of the chosen samples of a task in one direction."""
        exact = np.zeros(len(task.rows), dtype=np.float32)
        for at, image, text in self._blocks(source, task, usable):
            own, other = (image, text) if direction == "row" else (text, image)
            sums, _ = pair_log_sums(own[torch.from_numpy(chosen[at])], other, self.temperature)
            exact[at[chosen[at]]] = self.temperature / 2 * sums.numpy()
        return exact[chosen]


def _kept(memo: Memo, name: str) -> dict[str, np.ndarray]:
    arrays = memo.get(name)
    if arrays is None:
        raise RuntimeError(f"the values of {name} were put, and are gone")
    return arrays
