"""Products of stored 16-bit features on a GPU against the CPU, which multiplies them in float32.

These are the paths through `torch.mm(..., out_dtype=torch.float32)`, which torch has on CUDA alone:
inputs have 16 bits, sums 32. The CPU's twin casts first and computes the same.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siftclip.selectors.core.source import Logits
from siftclip.selectors.fitting.covariance import quadratic_form, second_moment
from siftclip.selectors.kernels.largest_product import largest_product, multiply
from siftclip.selectors.kernels.low_similarities import low_similarities
from siftclip.selectors.kernels.most_similar import most_similar
from siftclip.selectors.kernels.pair_log_sums import pair_log_sums
from siftclip.selectors.methods.jest.pair_losses import row_log_sums, row_softplus_sums

LOGITS = Logits(scale=100.0, bias=-10.0)
# On each side more than one tile of a GPU, with a remainder.
ROWS, COLUMNS, DIM = 4100, 4097, 64

Kernel = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
KERNELS: dict[str, Kernel] = {
    "pair_log_sums": lambda image, text: pair_log_sums(image, text, 0.01),
    "multiply": lambda image, text: (multiply(image[:500], text[:300]),),
    "largest_product": lambda image, text: (largest_product(image, text),),
    "row_log_sums": lambda image, text: (row_log_sums(image, text, 100.0, skip=0),),
    "row_softplus_sums": lambda image, text: (row_softplus_sums(image, text, LOGITS, skip=0),),
    "second_moment": lambda image, text: (second_moment(image), second_moment(image, text[:ROWS])),
    "quadratic_form": lambda image, text: (quadratic_form(image, second_moment(text)),),
    "most_similar": lambda image, text: most_similar(image, text[:500]),
    "low_similarities": lambda image, text: (
        low_similarities(image, text, 0.0).image_sums,
        low_similarities(image, text, 0.0).text_low,
    ),
}

pytestmark = pytest.mark.gpu


def unit(samples: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(samples, DIM, generator=generator), dim=1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_computes_as_on_the_cpu(name: str, dtype: torch.dtype, device: torch.device) -> None:
    image, text = unit(ROWS, 1, dtype), unit(ROWS, 2, dtype)
    if name != "second_moment":  # which is of pairs
        text = text[:COLUMNS]
    found = KERNELS[name](image.to(device), text.to(device))
    expected = KERNELS[name](image.float(), text.float())
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == device.type
        if other.is_floating_point():
            torch.testing.assert_close(
                one.cpu(), other, rtol=1e-5, atol=1e-5, check_dtype=name != "second_moment"
            )
        else:
            assert torch.equal(one.cpu(), other)
