"""Selection at every step for anybody's loop: features of a super-batch in, indices out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from siftclip.errors import InputError, ParameterError, require_int
from siftclip.ranks import OneRank, ProcessGroup, Ranks
from siftclip.selectors.core.base import Requirements, Selector, draw
from siftclip.selectors.core.conversion import as_tensor, kind_of
from siftclip.selectors.core.description import nested
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk, Logits
from siftclip.selectors.core.sub_batch import SubBatch
from siftclip.trainer.losses.collectives import gather_features
from siftclip.trainer.online.super_batch import step_uids

_OWNER = "choose_sub_batch"


@torch.no_grad()
def choose_sub_batch(
    selector: Selector,
    features: Mapping[str, tuple[Tensor, Tensor]],
    *,
    keep: int,
    step: int,
    seed: int = 0,
    temperature: float | None = None,
    logits: Mapping[str, Logits] | None = None,
    groups: int | None = None,
) -> Tensor:
    """Choose what to train on of a super-batch: its indices on this rank, int64 [keep], ascending.

    Where `torch.distributed` is initialised, all ranks call it with equally many samples. Features
    of all are gathered, every rank makes the same choice, and each gets the indices of its own
    part, so that no image travels.

    Args:
        selector: with scores, such as `ClipScore`, or `JEST`. One that learns has a `state_dict`,
            which belongs into checkpoints.
        features: image and text features, float [n, d] each, of this rank's part of the
            super-batch, by the names that the selector calls them by. They are normalised here.
        keep: samples for this rank to train on.
        step: of the run; random draws and ties are decided by (seed, step, place in the batch).
        seed: of random draws.
        temperature: of random draws; None: the selector's own way, 0: the best.
        logits: how features become logits, by the same names, for selectors that compute losses.
        groups: into which the super-batch of all ranks is cut, with equal shares of each; None: one
            for each rank. The answer depends on them, and not on the ranks that share them.

    Raises:
        InputError: an argument is not what it must be, or the selector needs something else.
    """
    arrays = _arrays(features)
    ranks = _ranks(next((each.device for each in arrays.values()), torch.device("cpu")))
    _check_selector(selector, arrays)
    of_rank = _samples(arrays)
    require_int("step", step, minimum=0, owner=_OWNER)
    groups = _check_shares(keep, of_rank, groups, ranks.size)
    gathered = {
        key: gather_features(values, rank=ranks.rank, world_size=ranks.size)
        for key, values in arrays.items()
    }
    rows = np.arange(of_rank * ranks.size)
    places = np.stack([rows, np.zeros_like(rows)], axis=1).astype(np.uint64)
    source = MemorySource(
        Chunk(rows=rows, uids=step_uids(places, step), features=gathered),
        logits=logits,
        part_samples=len(rows) // groups,
        ranks=ranks,
        trusted=True,
    )
    asked = SubBatch(
        samples=keep * ranks.size // groups, groups=groups, temperature=temperature, seed=seed
    )
    device = next(iter(arrays.values())).device
    with torch.autocast(device.type, enabled=False):  # scores are exact, as the losses are
        kept = draw(selector, source, asked).multiplicities
    mine = kept[ranks.rank * of_rank : (ranks.rank + 1) * of_rank]
    return torch.from_numpy(np.flatnonzero(mine)).to(device)


def _ranks(device: torch.device) -> Ranks:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return OneRank()
    return ProcessGroup(device)


def _arrays(features: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the features as selectors call them, float32 [n, d] of unit norm."""
    is_mapping = isinstance(features, Mapping)
    if not is_mapping or not all(_is_pair(pair) for pair in features.values()):
        raise ParameterError(
            'must be a mapping of pairs, such as {"learner": (images, texts)}',
            owner=_OWNER,
            parameter="features",
            got=str({name: kind_of(each) for name, each in features.items()})
            if is_mapping
            else kind_of(features),
        )
    return {
        f"{name}_{kind}": F.normalize(
            as_tensor(values, "features", _OWNER).detach().float(), dim=-1
        )
        for name, pair in features.items()
        for kind, values in zip(("img", "txt"), pair, strict=True)
    }


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _samples(arrays: Mapping[str, Tensor]) -> int:
    """Count the samples of this rank."""
    shapes = {key: list(values.shape) for key, values in arrays.items()}
    counts = {shape[0] for shape in shapes.values() if len(shape) == 2}
    if len(counts) != 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ParameterError(
            "must be pairs of tensors [n, d] of the same n samples",
            owner=_OWNER,
            parameter="features",
            got=str(shapes),
        )
    return counts.pop()


def _check_selector(selector: Selector, arrays: Mapping[str, Tensor]) -> None:
    members = list(nested(selector, Selector))  # type: ignore[type-abstract]  # mypy 4717
    for member in members:
        owner, requires = type(member).__name__, member.requires
        missing = [key for key in requires.features if key not in arrays]
        if missing:
            raise ParameterError(
                f"must have what {owner} reads: {', '.join(requires.features)}",
                owner=_OWNER,
                parameter="features",
                got=", ".join(arrays) or "nothing",
                way_out=f"Features by the name NAME are NAME_img and NAME_txt: {missing[0]} is one "
                "of them.",
            )
        if replace(requires, features=()) != Requirements() or member.weighs:
            raise InputError(
                f"{_OWNER}: {owner} reads more than features, or weighs samples, and this function "
                "gives indices from features alone. Train with siftclip's own command and "
                "online=every_step, or use another selector."
            )


def _check_shares(keep: int, of_rank: int, groups: int | None, ranks: int) -> int:
    """Return the number of groups, checked with what each rank keeps."""
    require_int("keep", keep, minimum=1, owner=_OWNER)
    if keep > of_rank:
        rule = f"must be at most the {of_rank} samples of the super-batch on each rank"
        raise ParameterError(rule, owner=_OWNER, parameter="keep", value=keep)
    groups = ranks if groups is None else require_int("groups", groups, minimum=1, owner=_OWNER)
    each, rest = divmod(groups, ranks)
    if rest or of_rank % each or keep % each:
        raise ParameterError(
            f"must be a multiple of the {ranks} ranks, and each rank's share of them must divide "
            f"its {of_rank} samples and the {keep} that it keeps",
            owner=_OWNER,
            parameter="groups",
            value=groups,
        )
    return groups
