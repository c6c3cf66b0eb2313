"""Learnability of single pairs: what a learner still gets wrong and a reference gets right.

Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet
Learnt" (RHO-LOSS), arXiv 2206.07137, with contrastive losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import (
    ParameterError,
    require_choice,
    require_finite,
    require_positive,
)
from siftclip.selectors.core.base import Requirements, RuleOptions, ScoreSelector, Source, WorkUnit
from siftclip.selectors.core.source import Logits
from siftclip.selectors.methods.jest.pair_losses import LOSSES, PairLosses, pair_logits

if TYPE_CHECKING:
    from typing_extensions import Unpack

Loss = Literal["softmax", "sigmoid", "pair"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFeatures:
    """Features of a model under the keys `name`_img and `name`_txt, and how they become logits.

    Scale and bias that are None are those that the samples' source knows: of models that train, or
    that it runs itself. Cached features come without.
    """

    name: str  # "learner", "reference", or a cached feature set such as "l14"
    logit_scale: float | None = None
    logit_bias: float | None = None  # softmax losses do without

    def __post_init__(self) -> None:
        if self.logit_scale is not None:
            require_positive("logit_scale", self.logit_scale, owner=self)
        if self.logit_bias is not None:
            require_finite("logit_bias", self.logit_bias, owner=self)

    @property
    def keys(self) -> tuple[str, str]:
        """The keys of image and text features."""
        return f"{self.name}_img", f"{self.name}_txt"

    def logits(self, source: Source, *, biased: bool) -> Logits:
        """Return scale and bias; a bias of 0 where it has no effect and is not set.

        Raises:
            InputError: the source does not know them, and they are not set; or a bias is needed
                and the model has none.
        """
        scale: float | Tensor | None = self.logit_scale
        bias: float | Tensor | None = self.logit_bias
        if bias is None and not biased:
            bias = 0.0
        if scale is None or bias is None:
            known = source.logits(self.name)
            scale = known.scale if scale is None else scale
            if biased and bias is None and not known.has_bias:
                raise ParameterError(
                    f"of {self.name!r} must be given for the sigmoid loss: none is known, since "
                    "the model was not trained with that loss",
                    owner=self,
                    parameter="logit_bias",
                    got="null",
                    way_out="Use the softmax loss, or set it.",
                )
            bias = known.bias if bias is None else bias
        return Logits(scale=scale, bias=bias)


def signed_models(
    owner: object, learner: ModelFeatures | None, reference: ModelFeatures | None
) -> list[tuple[float, ModelFeatures]]:
    """Return the models of a learnability with the sign of their loss: +1 learner, -1 reference.

    Raises:
        InputError: there is neither.
    """
    if learner is None and reference is None:
        raise ParameterError(
            "needs learner, reference or both",
            owner=owner,
            got="neither",
            way_out="With the learner alone it prefers hard samples, with the reference alone "
            "easy ones.",
        )
    signed = ((1.0, learner), (-1.0, reference))
    return [(sign, model) for sign, model in signed if model is not None]


def required_features(models: list[tuple[float, ModelFeatures]]) -> Requirements:
    """Return the features of models, each key once."""
    return Requirements(features=tuple(dict.fromkeys(k for _, model in models for k in model.keys)))


class Learnability(ScoreSelector):
    """Score a pair by the loss of the learner less the loss of the reference.

    Without a reference it is the hard-sample baseline, without a learner the easy-reference one.
    The negatives of a pair are all other usable samples of the source, of all ranks: a super-batch,
    where released code for classification (RHO-LOSS) needs none. The work is a product of all
    samples with all others, shared by parts, so that it does not suit a large pool, save with
    `loss` "pair".
    """

    def __init__(
        self,
        *,
        learner: ModelFeatures | None,
        reference: ModelFeatures | None,
        loss: Loss = "softmax",
        **rule: Unpack[RuleOptions],
    ) -> None:
        """Set the parameters.

        Args:
            learner: whose large losses are wanted; None: do not care.
            reference: whose small losses are wanted; None: do not care.
            loss: "softmax", the mean of both directions' cross entropies; "sigmoid", l_ii +
                (sum_j l_ij + sum_j l_ji) / 2, a half of each negative pair; or "pair", minus the
                pair's logit without its bias, which all have (ActiveCLIP, arXiv 2312.05328).
            **rule: `fraction`, `threshold` or `rule`, see `ScoreSelector`.
        """
        super().__init__(**rule)
        self.learner, self.reference = learner, reference
        self.loss: Loss = require_choice("loss", loss, get_args(Loss), owner=self)
        signed_models(self, learner, reference)

    @property
    def _models(self) -> list[tuple[float, ModelFeatures]]:
        return signed_models(self, self.learner, self.reference)

    @property
    def requires(self) -> Requirements:
        return required_features(self._models)

    def score_task(self, source: Source, task: WorkUnit) -> Tensor:
        """Score a task's samples among all samples of the source: float64 [m]."""
        requires, models = self.requires, self._models
        chunks = list(source.chunks(task.rows, requires))
        usable = torch.cat([chunk.usable() for chunk in chunks])
        judged, alone = [], []
        for _, model in models:
            image, text = (
                torch.cat([chunk.features[key] for chunk in chunks]) for key in model.keys
            )
            logits = model.logits(source, biased=self.loss == "sigmoid")
            if self.loss == "pair":
                alone.append(-pair_logits(image, text, logits))
            else:
                judged.append(LOSSES[self.loss](image, text, logits))
        if judged:
            self._add_negatives(source, judged, task.rows)
        losses = alone or [terms.losses() for terms in judged]
        signed = [sign * x for (sign, _), x in zip(models, losses, strict=True)]
        return torch.where(usable, torch.stack(signed).sum(0), torch.nan)

    def _add_negatives(
        self, source: Source, judged: list[PairLosses], own_rows: np.ndarray
    ) -> None:
        """Judge consecutive pairs, int64 [m], against all others that are usable.

        What is not usable is absent, and not left out: how many there are, a GPU would have to be
        asked.
        """
        rows = np.concatenate([part.rows for part in source.parts(self.requires)])
        for chunk in source.chunks(rows, self.requires):
            usable, keys = chunk.usable(), chunk.rows
            # Own rows are a run of all rows, which a chunk may have cut: the partner of own row i
            # is row i + skip of the chunk, if it is in there.
            both = np.flatnonzero(np.isin(keys, own_rows))
            skip = None
            if len(both):
                skip = int(both[0] - np.flatnonzero(own_rows == keys[both[0]])[0])
            for terms, (_, model) in zip(judged, self._models, strict=True):
                image, text = (
                    torch.where(usable[:, None], chunk.features[key], 0) for key in model.keys
                )
                terms.add(image, text, skip=skip, present=usable)
