"""negCLIPLoss: the CLIP score less what a caption and an image share with everybody else.

Wang et al., "CLIPLoss and Norm-Based Data Selection Methods for Multimodal Contrastive Learning",
arXiv 2405.19547.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import require_choice, require_int, require_positive
from siftclip.hashing import mix64, seed_state, uid_hashes
from siftclip.purposes import HashPurpose
from siftclip.selectors.core.base import (
    Choice,
    Requirements,
    RuleOptions,
    ScoreSelector,
    Source,
    WorkUnit,
)
from siftclip.selectors.core.rules import Threshold, TopFraction
from siftclip.selectors.core.source import IMAGE, TASK_SAMPLES, TEXT, ReadsFeatures
from siftclip.selectors.kernels.hardware import int8_is_fast
from siftclip.selectors.kernels.pair_log_sums import pair_log_sums
from siftclip.selectors.methods.clip_score import clip_score, require_pairs
from siftclip.selectors.methods.negcliploss.screening import OPEN_LIMIT, Screening, usable_blocks

if TYPE_CHECKING:
    from typing_extensions import Unpack

MOST_PASSES = 10_000  # ten in the paper; each is as long as all of the first
log = logging.getLogger(__name__)


def negcliploss(image: Tensor, text: Tensor, temperature: float) -> Tensor:
    """Score each pair of a block, float32 [b]: its CLIP score less two normalisers.

    c_i - tau/2 log sum_j exp(<v_i, t_j> / tau) - tau/2 log sum_j exp(<v_j, t_i> / tau), j over the
    block with i itself: -tau times the pair's symmetric InfoNCE loss (arXiv 2405.19547, section 3;
    released code: `vas2.cs_new_helper`). The sums are sums, not means, so that a smaller block
    scores higher, as released. At most 0, up to rounding. Unlike the released code it does not
    overflow and holds no b x b matrix.

    Args:
        image: float [b, d] of unit norm, finite; not normalised again.
        text: float [b, d] of unit norm, finite.
        temperature: above 0.

    Example:
        >>> import torch
        >>> from siftclip.selectors.methods.negcliploss.negcliploss import negcliploss
        >>> images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> negcliploss(images, images, temperature=1.0)  # of each pair, among both
        tensor([-0.3133, -0.3133])
    """
    require_pairs(image, text)
    row, column = pair_log_sums(image, text, temperature)
    return clip_score(image, text) - temperature / 2 * (row + column)


def block_order(uids: np.ndarray, seed: int, pass_number: int) -> np.ndarray:
    """Draw the order in which a pass cuts samples into blocks: int64 [n], uniformly random.

    A pure function of the set of uids, uint64 [n, 2], of the seed and of the pass: samples are
    sorted by a hash. The released code draws `torch.randperm` without a seed.
    """
    state = mix64(seed_state(seed ^ HashPurpose.NEGCLIPLOSS_BLOCKS) ^ np.uint64(pass_number))
    keys = uid_hashes(uids, state)
    return np.lexsort((uids[:, 1], uids[:, 0], keys))


class NegCLIPLoss(ReadsFeatures, ScoreSelector):
    """Keep the pairs with the smallest contrastive loss among random others.

    With precision "screened", `select` multiplies 8-bit integers first, and then computes in
    float32 those samples alone that the bound of the error leaves undecided. It keeps what
    "float32" keeps, up to ties within float32 rounding (about 1e-6). `Choice.scores` are then
    within the bound (about 0.01) for decided samples; `scores` are float32 always.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import NegCLIPLoss
        >>> images = np.array([[1, 0], [0, 1], [0.8, 0.6]], dtype=np.float32)
        >>> texts = np.array([[1, 0], [0.6, 0.8], [0.6, 0.8]], dtype=np.float32)
        >>> NegCLIPLoss(temperature=0.5, passes=1, fraction=0.3).scores(images, texts).round(3)
        array([-0.308, -0.476, -0.449], dtype=float32)
    """

    def __init__(
        self,
        *,
        features: str | None = None,
        temperature: float = 0.01,
        batch_size: int = 32768,
        passes: int = 10,
        partition: Literal["file", "global"] = "file",
        precision: Literal["screened", "float32"] = "screened",
        seed: int = 0,
        **rule: Unpack[RuleOptions],
    ) -> None:
        """Set the parameters.

        Args:
            features: name of a feature set, such as `l14` for the keys `l14_img` and `l14_txt`;
                None: the one that it is used with.
            temperature: of the CLIP model whose features these are.
            batch_size: samples of a block; their features are in memory at once. The last block
                of a partition is short, as released.
            passes: partitions whose normalisers are averaged; K in the paper.
            partition: cut each "file" into blocks by itself, as released, or the "global" pool.
            precision: "screened" or "float32", see the class. A GPU, a CPU without int8
                instructions, and features of which 8 bits would leave most samples open, compute
                float32 always.
            seed: of the partitions.
            **rule: `fraction`, `threshold` or `rule`, see `ScoreSelector`.
        """
        super().__init__(**rule)
        self.features = features
        self.temperature = require_positive("temperature", temperature, owner=self)
        self.batch_size = require_int("batch_size", batch_size, minimum=1, owner=self)
        self.passes = require_int("passes", passes, minimum=1, maximum=MOST_PASSES, owner=self)
        self.partition = require_choice("partition", partition, ("file", "global"), owner=self)
        self.precision = require_choice("precision", precision, ("screened", "float32"), owner=self)
        self.seed = require_int("seed", seed, minimum=0, owner=self)
        self._recomputed = 0

    @property
    def requires(self) -> Requirements:
        return Requirements(features=self.feature_keys(IMAGE, TEXT))

    @property
    def recomputed_samples(self) -> int:
        """How many samples the last screened `select` computed again in float32."""
        return self._recomputed

    def tasks(self, source: Source, pass_number: int) -> Sequence[WorkUnit]:
        """Split a pass into runs of whole blocks of one partition."""
        parts = {part.name: part.rows for part in source.parts(self.requires)}
        if self.partition == "global":
            parts = {"pool": np.concatenate([*parts.values(), np.empty(0, dtype=np.int64)])}
        if pass_number == 1 and max(map(len, parts.values()), default=0) <= self.batch_size:
            source.warn(
                f"NegCLIPLoss: batch_size={self.batch_size} holds every file whole, so that all "
                f"{self.passes} passes compare the same pairs. One pass (the parameter passes) "
                "gives the same scores for less"
            )
        step = max(1, TASK_SAMPLES // self.batch_size) * self.batch_size
        tasks = []
        for name, rows in parts.items():
            order = block_order(source.uids[source.index_of(rows)], self.seed, pass_number)
            rows = rows[order]
            for start in range(0, len(rows), step):
                label = f"pass{pass_number}-{name}-{start}"
                tasks.append(WorkUnit(name=label, rows=rows[start : start + step]))
        return tasks

    def score_task(self, source: Source, task: WorkUnit) -> Tensor:
        """Score a run of blocks in float32."""
        values = torch.full((len(task.rows),), torch.nan)
        for at, image, text in usable_blocks(source, self.requires, task, self.batch_size):
            values[at] = negcliploss(image, text, self.temperature).cpu()
        return values

    @torch.no_grad()
    def select(self, source: Source) -> Choice:
        """Score the samples as precisely as the rule needs, and apply it."""
        rule, screens = self.rule, self.precision == "screened" and int8_is_fast()
        # what other rules need to know of a score is not known here
        if not screens or source.device.type != "cpu" or type(rule) not in (TopFraction, Threshold):
            return super().select(source)
        assert isinstance(rule, (TopFraction, Threshold))
        screening = Screening(
            source,
            source.cache(self),
            self.requires,
            rule=rule,
            temperature=self.temperature,
            batch_size=self.batch_size,
            passes=self.passes,
            tasks=lambda number: self.tasks(source, number),
        )
        self._recomputed = 0
        share = screening.open_share()
        if share > OPEN_LIMIT:
            if source.ranks.rank == 0:
                log.info(
                    "NegCLIPLoss: float32 for all samples, since 8-bit products would leave about "
                    "%.0f %% of them open",
                    100 * share,
                )
            return super().select(source)
        scores = screening.scores()
        if scores is None:
            return super().select(source)
        self._recomputed = screening.recomputed
        if source.ranks.rank == 0:
            log.info(
                "NegCLIPLoss: %d of %d samples were computed again in float32",
                self._recomputed,
                len(source),
            )
        values = scores.astype(np.float32)
        kept = rule(values, source.uids, len(source.whole))
        return Choice(multiplicities=kept, scores=values)
