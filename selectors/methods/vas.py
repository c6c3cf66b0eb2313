"""Variance alignment score (VAS, arXiv 2402.02055): how far a sample points where a target varies.

With two modalities it is NormSim_2 without the root and the number of targets, see `normsim`; it
costs one quadratic form a sample, however large the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from siftclip.errors import InputError, ParameterError, require_choice
from siftclip.selectors.core.base import (
    Chunk,
    FeatureFile,
    Requirements,
    RuleOptions,
    ScoreSelector,
    Source,
)
from siftclip.selectors.core.source import IMAGE, TEXT, ReadsFeatures
from siftclip.selectors.fitting.covariance import (
    bilinear_form,
    file_moment,
    kept_moment,
    mean_moment,
    pool_moment,
    quadratic_form,
    rows_of,
)
from siftclip.selectors.kernels.blocks import joined

if TYPE_CHECKING:
    from typing_extensions import Unpack

Modality = Literal["image", "text", "cross"]
_SUFFIXES: dict[Modality, tuple[str, ...]] = {
    "image": (IMAGE,),
    "text": (TEXT,),
    "cross": (IMAGE, TEXT),
}


def vas(features: Tensor, covariance: Tensor) -> Tensor:
    """Compute v^T S v of each sample: float32 [n], at least 0 for a covariance (arXiv 2402.02055).

    Args:
        features: float [n, d] of unit norm; not normalised again, as in the released code.
        covariance: float [d, d], the mean of g g^T over a target, not centred.
    """
    return quadratic_form(features, covariance)


def cross_vas(image_features: Tensor, text_features: Tensor, covariance: Tensor) -> Tensor:
    """Compute v^T S t of each pair: float32 [n]; the cross-covariance form of the paper.

    Args:
        image_features: float [n, d] of unit norm, the v.
        text_features: float [n, e] of unit norm, the t.
        covariance: float [d, e], the mean of g_image g_text^T over a target, not centred.
            The released code has no such score.
    """
    return bilinear_form(image_features, text_features, covariance)


class Vas(ReadsFeatures, ScoreSelector):
    """Keep the samples that lie in the directions in which a target varies.

    Example:
        >>> import torch
        >>> from siftclip.selectors import FeatureFile, Vas
        >>> target = FeatureFile(path="target.npy")
        >>> of_target = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> Vas(target=target, fraction=0.5).scores(images, files={target: of_target})
        array([0.75, 0.25], dtype=float32)
    """

    def __init__(
        self,
        *,
        features: str | None = None,
        modality: Modality = "image",
        target: FeatureFile | str | None = None,
        text_target: FeatureFile | None = None,
        covariance: FeatureFile | None = None,
        **rule: Unpack[RuleOptions],
    ) -> None:
        """Choose features and target.

        Args:
            features: name of a feature set, such as `l14` for the keys `l14_img` and `l14_txt`;
                None: the one that it is used with.
            modality: `image`, `text`, or `cross`, the cross-covariance of both.
            target: features of the target, of the images unless the modality is `text`; or
                "pool": the whole pool.
            text_target: for `cross`, features of the target's captions, row by row.
            covariance: instead of a target, the matrix S itself, as the authors publish it.
            **rule: `fraction`, `threshold` or `rule`, see `ScoreSelector`.
        """
        super().__init__(**rule)
        self.features = features
        self.modality = require_choice("modality", modality, tuple(_SUFFIXES), owner=self)
        if (target is None) == (covariance is None):
            raise ParameterError(
                "needs exactly one of target and covariance",
                owner=self,
                value={"target": target, "covariance": covariance},
                got=f"{target!r} and {covariance!r}",
            )
        if isinstance(target, str) and target != "pool":
            must = "must be a FeatureFile or pool"
            raise ParameterError(must, owner=self, parameter="target", value=target)
        needs_text = modality == "cross" and isinstance(target, FeatureFile)
        if needs_text != (text_target is not None):
            raise ParameterError(
                "must be given, as the target's captions, where modality is cross and target a "
                "file, and not otherwise",
                owner=self,
                parameter="text_target",
                value=text_target,
                got=f"{text_target!r}, {modality} and {target!r}",
            )
        self.target, self.text_target, self.covariance = target, text_target, covariance

    @property
    def _files(self) -> tuple[FeatureFile, ...]:
        sources = (self.target, self.text_target, self.covariance)
        return tuple(file for file in sources if isinstance(file, FeatureFile))

    @property
    def requires(self) -> Requirements:
        keys = self.feature_keys(*_SUFFIXES[self.modality])
        return Requirements(features=keys, files=self._files)

    def _names(self) -> str:
        return f", of {' and '.join(file.path for file in self._files)}," if self._files else ""

    def fit(self, source: Source) -> None:
        if self.covariance is not None:
            # the rows of a matrix are stored as the rows of any other array
            self._matrix = joined(piece.float() for piece in source.file(self.covariance))
            if not bool(self._matrix.isfinite().all()):
                raise InputError(f"Vas: the covariance in {self.covariance.path} must be finite.")
            return

        def moment() -> tuple[Tensor, int]:
            if self._files:
                return file_moment("Vas", source, self._files)
            pool = source.whole
            return pool_moment("Vas", pool, rows_of(pool, self.requires), self.requires)

        sums, count = kept_moment(source, source.cache(self), "covariance", moment)
        if count == 0 and self._files:
            names = " and ".join(file.path for file in self._files)
            raise InputError(f"Vas: {names} has no rows that are finite and not 0.")
        self._matrix = mean_moment(sums, count).float()

    def score(self, chunk: Chunk) -> Tensor:
        features = [chunk.features[key] for key in self.requires.features]
        shape = (features[0].shape[1], features[-1].shape[1])
        if self._matrix.shape != shape:
            raise InputError(
                f"Vas: the {' x '.join(map(str, shape))} features of the pool need a covariance of "
                f"that shape. The target's{self._names()} is "
                f"{' x '.join(map(str, self._matrix.shape))}: it belongs to another model."
            )
        if len(features) == 2:
            return cross_vas(features[0], features[1], self._matrix)
        return vas(features[0], self._matrix)
