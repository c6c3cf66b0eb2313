"""What a contrastive loss charges to each of many pairs, whose negatives come piece by piece.

`SoftmaxLosses` and `SigmoidLosses` hold some pairs of one model and what is known of their
negatives so far. Logits exist one tile at a time: O((m + n) d) memory for m pairs and n negatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor
from torch.nn import functional

from siftclip.selectors.core.source import Logits
from siftclip.selectors.kernels.blocks import require_same_width
from siftclip.selectors.kernels.pair_log_sums import CPU_TILE, GPU_TILE, LOG2_E

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Beyond it softplus(x) is x: exp(-40) is below the rounding of float64, and exp(40) fits float32.
_LINEAR = 40.0


class Which(TypedDict, total=False):
    """Which of n others count, for each of m pairs: all, unless it says less."""

    skip: int | None  # all but j = i + skip, the partner of pair i
    present: Tensor | None  # bool [n], those that there are; the absent ones must be finite


def pair_logits(image: Tensor, text: Tensor, logits: Logits) -> Tensor:
    """Compute scale * <v_i, t_i> + bias of each pair, float64 [m]; both are float [m, d]."""
    image, text = _operand(image), _operand(text)
    products: Tensor = torch.linalg.vecdot(image.to(_wide(image)), text.to(_wide(text)))
    return products.double() * logits.scale + logits.bias


def row_log_sums(
    left: Tensor, right: Tensor, scale: float | Tensor, **which: Unpack[Which]
) -> Tensor:
    """Compute log sum_j exp(scale * <l_i, r_j>) of each row i: float64 [m], -inf without any j.

    Products are float32, of float64 vectors float64; of equal 16-bit types a GPU multiplies what is
    stored and adds in float32. Every row of a tile has its own largest exponent taken off, so that
    nothing overflows or vanishes at any scale, and nothing waits for a GPU.

    Args:
        left: float [m, d], finite.
        right: float [n, d], finite.
        scale: finite.
        **which: of the columns, for row i.
    """
    sums = left.new_full((len(left),), -torch.inf, dtype=torch.float64)
    for rows, terms in _tiles(left, right, Logits(scale=scale * LOG2_E), **which):
        # A row may be skipped as a whole, where the tile has a single column.
        top = terms.amax(1).clamp_min_(torch.finfo(terms.dtype).min)
        terms.sub_(top[:, None]).exp2_()
        added = terms.sum(1).double().log2_() + top
        sums[rows] = torch.logaddexp(sums[rows], added / LOG2_E)
    return sums


def row_softplus_sums(
    left: Tensor, right: Tensor, logits: Logits, **which: Unpack[Which]
) -> Tensor:
    """Compute sum_j log(1 + exp(scale * <l_i, r_j> + bias)) of each row i: float64 [m].

    These are the losses -log sigmoid(-logit) of negatives (arXiv 2303.15343). Arguments and
    precision are those of `row_log_sums`.
    """
    sums = left.new_zeros((len(left),), dtype=torch.float64)
    for rows, terms in _tiles(left, right, logits, **which):
        sums[rows] += functional.softplus(terms, threshold=_LINEAR).sum(1)
    return sums


class PairLosses(ABC):
    """The losses of m pairs of one model against the negatives that were added so far.

    All answers are float64 [m]. A row that is not finite spoils its own answer alone; what is added
    must be finite.
    """

    def __init__(self, image: Tensor, text: Tensor, logits: Logits) -> None:
        """Hold pairs, float [m, d] both, without negatives.

        Raises:
            InputError: images and texts are of different widths.
        """
        require_same_width("image features", image, "text features", text)
        self.image, self.text, self.logits = _operand(image), _operand(text), logits
        self.own = pair_logits(self.image, self.text, logits)

    @abstractmethod
    def add(self, image: Tensor, text: Tensor, **which: Unpack[Which]) -> None:
        """Judge against n more pairs.

        Args:
            image: float [n, d], finite.
            text: float [n, d], finite.
            **which: of them.
        """

    @abstractmethod
    def alone(self) -> Tensor:
        """Return what a pair is worth before anything is known of negatives."""

    @abstractmethod
    def losses(self) -> Tensor:
        """Return what the loss charges to each pair."""

    @abstractmethod
    def increases(self) -> Tensor:
        """Return what each pair adds to the loss of a batch of all that was added, if it joins."""


class SigmoidLosses(PairLosses):
    """SigLIP's loss, sum_ij l_ij with l_ij = -log sigmoid(+-(scale * cos_ij + bias)), + for i = j.

    arXiv 2303.15343, equation 1, without its division by the size of the batch.
    """

    def __init__(self, image: Tensor, text: Tensor, logits: Logits) -> None:
        super().__init__(image, text, logits)
        self.negatives = torch.zeros_like(self.own)  # sum_j of l_ij + l_ji

    def add(self, image: Tensor, text: Tensor, **which: Unpack[Which]) -> None:
        for own, others in ((self.image, text), (self.text, image)):
            self.negatives += row_softplus_sums(own, others, self.logits, **which)

    def alone(self) -> Tensor:
        """Return l_ii."""
        return functional.softplus(-self.own, threshold=_LINEAR)

    def losses(self) -> Tensor:
        """Return l_ii + (sum_j l_ij + sum_j l_ji) / 2 over the negatives j.

        A negative pair is charged to its image and its text by halves, so that the sum over all
        samples of a batch is the batch's loss.
        """
        return self.alone() + self.negatives / 2

    def increases(self) -> Tensor:
        """Return l_ii + sum_j l_ij + sum_j l_ji: exactly what the loss of a batch grows by."""
        return self.alone() + self.negatives


class SoftmaxLosses(PairLosses):
    """CLIP's loss: the mean cross entropy of an image among texts and of a text among images.

    A cross entropy is log(1 + exp(margin)), the margin being the log-sum-exp of the negatives less
    the pair's own logit. So it is exact to a relative 1e-5 also where it is 1e-4 and logits are
    100, which the log-sum-exp of all less the own logit is not in float32. A bias has no effect.
    """

    def __init__(self, image: Tensor, text: Tensor, logits: Logits) -> None:
        super().__init__(image, text, Logits(scale=logits.scale))
        self.of_image = torch.full_like(self.own, -torch.inf)
        self.of_text = torch.full_like(self.own, -torch.inf)

    def add(self, image: Tensor, text: Tensor, **which: Unpack[Which]) -> None:
        scale = self.logits.scale
        added = row_log_sums(self.image, text, scale, **which)
        self.of_image = torch.logaddexp(self.of_image, added)
        added = row_log_sums(self.text, image, scale, **which)
        self.of_text = torch.logaddexp(self.of_text, added)

    def alone(self) -> Tensor:
        """Return the negative logit of the pair: without negatives its loss is always 0."""
        return -self.own

    def losses(self) -> Tensor:
        """Return the mean of both directions' cross entropies."""
        of_image, of_text = (
            functional.softplus(sums - self.own, threshold=_LINEAR)
            for sums in (self.of_image, self.of_text)
        )
        return (of_image + of_text) / 2

    def increases(self) -> Tensor:
        """Return the loss of the pair itself.

        Not what the summed loss grows by: the pair is a negative of all others, too, and softmax
        losses do not decompose into pairs.
        """
        return self.losses()


LossName = Literal["sigmoid", "softmax"]
LOSSES: dict[LossName, type[PairLosses]] = {"sigmoid": SigmoidLosses, "softmax": SoftmaxLosses}


def _operand(values: Tensor) -> Tensor:
    """Cast for products: 16 bits as stored on a GPU, float64 unchanged, else float32."""
    if values.dtype == torch.float64 or (values.is_cuda and values.element_size() == 2):
        return values
    return values.float()


def _wide(values: Tensor) -> torch.dtype:
    """Return the type of sums of products."""
    return torch.promote_types(values.dtype, torch.float32)


def _tiles(
    left: Tensor,
    right: Tensor,
    logits: Logits,
    *,
    skip: int | None = None,
    present: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield tiles of logits of left @ right.T, with their rows; -inf where skipped or absent.

    They depend on the shapes alone. Wider where there are few columns, so that a product is large.
    Nothing waits for a GPU.
    """
    left, right = _operand(left), _operand(right)
    if left.dtype != right.dtype:
        both = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(both), right.to(both)
    if not len(left) or not len(right):
        return
    tile = GPU_TILE if left.is_cuda else CPU_TILE
    height, width = max(tile, tile * tile // len(right)), max(tile, tile * tile // len(left))
    offset = _offset(left, logits.bias)
    if present is not None and known_whole(present):
        present = None
    if present is not None:
        offset = torch.where(present, offset, -torch.inf)
    for i in range(0, len(left), height):
        for j in range(0, len(right), width):
            rows, columns = left[i : i + height], right[j : j + width]
            if left.element_size() == 2:
                terms = torch.mm(rows, columns.T, out_dtype=torch.float32)
            else:
                terms = rows @ columns.T
            of_columns = offset if present is None else offset[j : j + width]
            if isinstance(logits.scale, Tensor):
                torch.addcmul(of_columns, terms, logits.scale.to(terms.dtype), out=terms)
            else:
                torch.add(of_columns, terms, alpha=logits.scale, out=terms)
            if skip is not None:
                # out of the tile's range it is empty
                terms.diagonal(i + skip - j).fill_(-torch.inf)
            yield slice(i, i + height), terms


def known_whole(mask: Tensor) -> bool:
    """Return whether a mask, bool [n], is true everywhere; a GPU is not asked, which would wait."""
    return mask.is_cpu and bool(mask.all())


def _offset(like: Tensor, bias: float | Tensor) -> Tensor:
    """Return the bias as a scalar of the type of sums of products, on the device of `like`."""
    if isinstance(bias, Tensor):
        return bias.to(_wide(like))
    return torch.full((), bias, dtype=_wide(like), device=like.device)
