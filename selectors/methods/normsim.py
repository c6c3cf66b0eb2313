"""NormSim (arXiv 2405.19547): how similar an image is to the images of a target, as a p-norm.

With p = 2 it ranks samples as `vas` does, and costs as little whatever the size of the target. With
p = inf only the most similar target counts, and every one has to be looked at.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from siftclip.errors import InputError, ParameterError
from siftclip.selectors.core.base import (
    Chunk,
    FeatureFile,
    Requirements,
    RuleOptions,
    ScoreSelector,
    Source,
)
from siftclip.selectors.core.source import IMAGE, ReadsFeatures
from siftclip.selectors.fitting.covariance import (
    UNIT,
    file_moment,
    kept_moment,
    quadratic_form,
)
from siftclip.selectors.kernels.blocks import joined, require_same_width, usable_rows
from siftclip.selectors.kernels.hardware import int8_is_fast
from siftclip.selectors.kernels.largest_product import (
    Int8Targets,
    largest_product,
    multiply,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BLOCK = 1 << 12  # targets whose products are held at a time
_WORTH_INT8 = 1024  # targets; for fewer, rounding and looking at the answers costs too much


def normsim(features: Tensor, targets: Tensor, p: float) -> Tensor:
    """Compute the p-norm of the inner products with all targets: float32 [n] (arXiv 2405.19547).

    (sum_j |<x, g_j>|^p)^(1/p), or the largest |<x, g_j>|. Not divided by the number of targets.

    Args:
        features: float [n, d], the x, of unit norm; not normalised again.
        targets: float [m, d], the g, m at least 1.
        p: at least 1, or inf. The released code takes 100 and more for inf; here it is itself.
    """
    if p == math.inf:
        return largest_product(features, targets)
    if p == 2:
        return normsim_2(features, (targets.double().T @ targets.double()).float())
    norms = []
    for block in torch.split(targets, _BLOCK):
        products = multiply(features, block).abs_()
        largest = products.amax(1, keepdim=True).clamp_min(1e-30)
        # divided by the largest, so that no power is too small for float32
        power = products.div_(largest).pow_(p).sum(1)
        norms.append(largest[:, 0] * power.pow_(1 / p))
    stacked = torch.stack(norms)
    largest = stacked.amax(0).clamp_min(1e-30)
    return largest * (stacked / largest).pow_(p).sum(0).pow_(1 / p)


def normsim_2(features: Tensor, moment: Tensor) -> Tensor:
    """Compute the 2-norm from the targets' second moment, sqrt(x^T G x): float32 [n].

    Args:
        features: float [n, d] of unit norm.
        moment: float [d, d], the G, the sum of g g^T over the targets.
    """
    return quadratic_form(features, moment).clamp_min_(0).sqrt_()


class NormSim(ReadsFeatures, ScoreSelector):
    """Keep the images that are similar to the images of a target.

    Example:
        >>> import torch
        >>> from siftclip.selectors import FeatureFile, NormSim
        >>> target = FeatureFile(path="target.npy")
        >>> of_target = torch.tensor([[0.0, 1.0], [0.6, 0.8]])
        >>> images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> selector = NormSim(target=target, p="inf", fraction=0.5)
        >>> selector.scores(images, files={target: of_target})
        array([0.6, 1. ], dtype=float32)
    """

    def __init__(
        self,
        *,
        features: str | None = None,
        target: FeatureFile,
        p: float | Literal["inf"] = 2,
        **rule: Unpack[RuleOptions],
    ) -> None:
        """Choose features, target and norm.

        Args:
            features: name of a feature set, of which the image features are used: `l14_img`;
                None: the one that it is used with.
            target: features of the target's images. With p other than 2, all of
                it is held in memory, as stored and in eight bits.
            p: at least 1; `inf` (also as a string) for the largest similarity.
            **rule: `fraction`, `threshold` or `rule`, see `ScoreSelector`.
        """
        super().__init__(**rule)
        self.features = features
        self.target = target
        number = math.inf if p == "inf" else p
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not number >= 1:
            must = "must be a number of at least 1, or inf"
            raise ParameterError(must, owner=self, parameter="p", value=p)
        self.p = float(number)

    @property
    def requires(self) -> Requirements:
        return Requirements(features=self.feature_keys(IMAGE), files=(self.target,))

    def fit(self, source: Source) -> None:
        if self.p == 2:
            sums, count = kept_moment(
                source,
                source.cache(self),
                "moment",
                lambda: file_moment("NormSim", source, (self.target,)),
            )
            self._targets, self._search = (sums.double() * UNIT**2).float(), None
        else:
            blocks = (block[usable_rows(block)] for block in source.file(self.target))
            self._targets = joined(blocks)
            count, self._search = len(self._targets), None
            fast = source.device.type == "cpu" and count >= _WORTH_INT8 and int8_is_fast()
            if self.p == math.inf and fast:
                self._search = Int8Targets(self._targets)
        if count == 0:
            raise InputError(f"NormSim: {self.target.path} has no rows that are finite and not 0.")

    def score(self, chunk: Chunk) -> Tensor:
        features = chunk.features[self.requires.features[0]]
        require_same_width(
            "NormSim: the features of the pool", features, self.target.path, self._targets
        )
        if self.p == 2:
            return normsim_2(features, self._targets)
        if self._search is not None:
            return self._search.search(features)
        samples = 1 << 13  # whose products with a block of targets are held at a time
        return torch.cat(
            [normsim(x, self._targets, self.p) for x in torch.split(features, samples)]
        )
