"""Lists of the nearest samples of target vectors, as sorted numbers that any rank can merge."""

from __future__ import annotations

import torch
from torch import Tensor

from siftclip.selectors.kernels.most_similar import inner_products, rounding_bound

NOTHING = -(2**63)  # an entry of a list that holds no sample


def pack(products: Tensor, places: Tensor) -> Tensor:
    """Pack into numbers int64 [n] that sort like (product, -place).

    Args:
        products: float32 [n], finite.
        places: int64 [n] in [0, 2**32), of samples in the order of their uids.
    """
    bits = products.view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered * 2**32 + (2**32 - 1 - places)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the products, as int64 that sort like them, and the places of `pack`."""
    return packed >> 32, 2**32 - 1 - (packed & (2**32 - 1))


def update_lists(lists: Tensor, targets: Tensor, features: Tensor, places: Tensor) -> Tensor:
    """Update the lists of the m nearest samples of each target with more samples: int64 [t, m].

    Float32 products find the candidates, float64 products decide, so that the lists depend neither
    on how samples are cut into chunks nor on their order.

    Args:
        lists: int64 [t, m], packed, descending, `NOTHING` where there are fewer than m.
        targets: float [t, d].
        features: float [n, d], finite.
        places: int64 [n].
    """
    count = lists.shape[1]
    values, goals = features.float(), targets.float()
    products = goals @ values.T
    scale = goals.norm(dim=1) * values.norm(dim=1).max()
    error = 2 * rounding_bound(goals.shape[1]) * scale
    # The m-th best so far, of the list or of these samples, is reached by all that can be listed.
    full = lists[:, -1] != NOTHING
    least = torch.full_like(scale, -torch.inf)
    ordered = (lists[full, -1] >> 32).to(torch.int32)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    least[full] = bits.view(torch.float32)
    if not bool(full.all()) and count < len(features):
        least[~full] = products[~full].topk(count, dim=1).values[:, -1]
    rows, columns = torch.nonzero(products >= (least - error)[:, None], as_tuple=True)
    if not len(rows):
        return lists
    exact = torch.cat(
        [
            inner_products(goals[r], values[c]).float()
            for r, c in zip(torch.split(rows, 8192), torch.split(columns, 8192), strict=True)
        ]
    )
    touched, position, counts = torch.unique_consecutive(
        rows, return_inverse=True, return_counts=True
    )
    starts = counts.cumsum(0) - counts
    new = lists.new_full((len(touched), int(counts.max())), NOTHING)
    new[position, torch.arange(len(rows), device=rows.device) - starts[position]] = pack(
        exact, places[columns]
    )
    merged = lists.clone()
    merged[touched] = torch.cat([lists[touched], new], dim=1).topk(count, dim=1).values
    return merged


def best_ranks(best: Tensor, lists: Tensor) -> Tensor:
    """Raise each sample's best entry by the lists: int64 [n] that sort like (-rank, product).

    Args:
        best: int64 [n] by place, of earlier lists; `NOTHING` for samples in none.
        lists: int64 [t, m], packed, descending.
    """
    ranks = torch.arange(lists.shape[1], device=lists.device).expand_as(lists)
    listed = lists != NOTHING
    ordered, places = unpack(lists[listed])
    entries = -ranks[listed] * 2**32 + ordered + 2**31
    return best.scatter_reduce(0, places, entries, reduce="amax")
