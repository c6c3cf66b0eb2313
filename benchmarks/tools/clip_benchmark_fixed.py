"""clip_benchmark 1.6.2 with what it needs to run beside numpy 2.4, for comparisons with ours.

    python benchmarks/tools/clip_benchmark_fixed.py eval --dataset wds/TASK ...

is its own command line, with the two functions below in the place of its own. All that was found
wrong with it stands in docs/conformance.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from clip_benchmark.metrics import linear_probe, zeroshot_classification, zeroshot_retrieval


def accuracy(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Top-k accuracies, as clip_benchmark's function of this name but for the conversion.

    Args:
        output: logits, float [n, classes].
        target: labels, int64 [n].
        topk: the values of k, each at most the number of classes.
    """
    ranked = output.topk(max(topk), 1, True, True).indices
    hits = ranked.eq(target.view(-1, 1))
    return [hits[:, :k].sum().item() / len(target) for k in topk]


def recall_at_k(scores: torch.Tensor, positive_pairs: torch.Tensor, k: int) -> torch.Tensor:
    """The share of each query's positives among its k best candidates, float32 [queries].

    The same numbers as clip_benchmark's function of this name, but k may exceed the number of
    candidates, and the memory is [queries, k] instead of [queries, k, candidates].

    Args:
        scores: float [queries, candidates].
        positive_pairs: bool [queries, candidates], at least one True in each row.
        k: how many candidates are retrieved.
    """
    best = torch.topk(scores, min(k, scores.shape[1]), dim=1).indices
    return positive_pairs.gather(1, best).sum(dim=1) / positive_pairs.sum(dim=1)


@contextmanager
def repaired() -> Iterator[None]:
    """Inside this block clip_benchmark's zero-shot functions work."""
    places = [
        (zeroshot_classification, "accuracy", accuracy),
        (linear_probe, "accuracy", accuracy),
        (zeroshot_retrieval, "recall_at_k", recall_at_k),
    ]
    originals = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, replacement in places:
            setattr(module, name, replacement)
        yield
    finally:
        for (module, name, _), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def main() -> None:
    """Run clip_benchmark's command line on this process's arguments."""
    from clip_benchmark.cli import main as clip_benchmark_main  # imports all of its models

    with repaired():
        clip_benchmark_main()


if __name__ == "__main__":
    main()
