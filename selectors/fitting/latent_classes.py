"""Latent classes of a pool: for each sample the nearest class name, or the nearest cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import ParameterError
from siftclip.ranks import sum_arrays
from siftclip.selectors.core.source import Cache, FeatureFile, Requirements, Source, WorkUnit
from siftclip.selectors.fitting.kmeans import UNIT, whole_numbers
from siftclip.selectors.kernels.blocks import joined, usable_rows

_BLOCK_SAMPLES = 1024  # keeps the float64 copy of features small


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentClasses:
    """The class of each sample, and the mean features of each class."""

    of: np.ndarray  # int32 [n], -1 where a sample has no features that can be used
    sizes: np.ndarray  # int64 [c]
    image_means: Tensor  # float32 [c, d], zero for an empty class
    text_means: Tensor  # float32 [c, d]

    def other_means(self) -> tuple[Tensor, Tensor]:
        """Compute the mean image and text over the *other* classes: twice float32 [c, d].

        Every class that is not empty counts once, whatever its size. Zero if there is no other.
        """
        held = torch.from_numpy(self.sizes > 0).to(self.image_means.device)
        others = max(1, int(held.sum()) - 1)

        def others_of(means: Tensor) -> Tensor:
            precise = means.double()
            rest = (precise.sum(0) - precise) / others
            return rest.float() if int(held.sum()) > 1 else torch.zeros_like(means)

        return others_of(self.image_means), others_of(self.text_means)


def read_labels(owner: object, source: Source, file: FeatureFile) -> Tensor:
    """Return the rows of a file of class-name features, the parameter `labels` of `owner`.

    They are float32 [c, d].

    Raises:
        ParameterError: there is none, or one is zero or not finite.
    """
    labels = joined(rows.float() for rows in source.file(file))
    faulty = ~usable_rows(labels)
    if len(labels) == 0 or bool(faulty.any()):
        what = f"row {int(faulty.nonzero()[0])} is zero or not finite" if len(labels) else "no rows"
        raise ParameterError(
            "must be features of class names, one finite row a class",
            owner=owner,
            parameter="labels",
            value=file,
            got=f"{what} in {file.path}",
        )
    return labels


def find_classes(
    source: Source,
    cache: Cache,
    requires: Requirements,
    *,
    classes: int,
    nearest: Callable[[Tensor], Tensor],
) -> LatentClasses:
    """Assign every usable sample to a class and average the features of each, in one pass.

    Args:
        source: whose tasks are shared among the ranks.
        cache: keeps the classes of each task and the means.
        requires: with two feature keys, image and text.
        classes: how many there are.
        nearest: image features float [n, d] -> classes int64 [n].
    """
    tasks = source.tasks(requires, "classes-")
    means = cache.get("means")
    if int(source.ranks.sum(torch.tensor(int(means is not None)))) < source.ranks.size:
        means = None  # all ranks must take the same way
    sums = _ClassSums(classes)
    for task in source.mine(tasks):
        kept = cache.get(task.name)
        if kept is not None and means is not None:
            continue
        pieces, start = [], 0
        for chunk in source.chunks(task.rows, requires):
            image, text = (chunk.features[key] for key in requires.features)
            if kept is None:
                usable = chunk.usable()
                clean = image.masked_fill(~usable[:, None], 0)
                index = nearest(clean).masked_fill(~usable, -1)
            else:
                known = torch.from_numpy(kept["classes"][start : start + len(chunk)])
                index = known.to(image.device)
            index = index.long()
            pieces.append(index.cpu())
            start += len(chunk)
            sums.add(index, image, text)
        if kept is None:
            cache.put(task.name, classes=torch.cat(pieces).numpy().astype(np.int32))
    of = _gather_classes(source, cache, tasks)
    sizes = np.bincount(of[of >= 0], minlength=classes).astype(np.int64)
    if means is None:
        means = {"means": _mean_over_ranks(source, sums.values, sizes)}
        if source.ranks.rank == 0:
            cache.put("means", **means)
    image_means, text_means = torch.from_numpy(means["means"]).to(source.device)
    return LatentClasses(of=of, sizes=sizes, image_means=image_means, text_means=text_means)


class _ClassSums:
    """Sums of the features of each class, exact in any order."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self.values: Tensor | None = None  # int64 [2, c, d], in units of UNIT; None without samples

    def add(self, index: Tensor, image: Tensor, text: Tensor) -> None:
        """Add samples of features float [n, d] whose classes, int64 [n], are not below 0."""
        if self.values is None:
            shape = (2, self._classes, image.shape[1])
            self.values = torch.zeros(shape, dtype=torch.int64, device=image.device)
        at = (index >= 0).nonzero()[:, 0]
        for block in torch.split(at, _BLOCK_SAMPLES):
            for side, values in zip(self.values, (image, text), strict=True):
                side.index_add_(0, index[block], whole_numbers(values[block]))


def _gather_classes(source: Source, cache: Cache, tasks: list[WorkUnit]) -> np.ndarray:
    """Gather the classes of all samples, int32 [n], on every rank; -1 where there is none."""
    above = np.zeros(len(source), dtype=np.int32)  # class + 1: the sum over ranks is exact
    for task in source.mine(tasks):
        kept = cache.get(task.name)
        if kept is None:
            raise RuntimeError(f"the classes of {task.name} were put, and are gone")
        above[source.index_of(task.rows)] = kept["classes"] + 1
    return sum_arrays(source.ranks, above) - 1


def _mean_over_ranks(source: Source, sums: Tensor | None, sizes: np.ndarray) -> np.ndarray:
    """Average over all samples, float32 [2, c, d], from sums of this rank's, int64 [2, c, d]."""
    dims = torch.zeros(source.ranks.size, dtype=torch.int64)
    dims[source.ranks.rank] = 0 if sums is None else sums.shape[2]
    dim = int(source.ranks.sum(dims).max())  # a rank without a task has not seen the features
    if sums is None:
        sums = torch.zeros((2, len(sizes), dim), dtype=torch.int64)
    whole = source.ranks.sum(sums.cpu())
    counts = torch.from_numpy(np.maximum(sizes, 1)).double()
    return (whole.double() * UNIT / counts[None, :, None]).float().numpy()
