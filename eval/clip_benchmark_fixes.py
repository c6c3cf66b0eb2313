"""What of clip_benchmark 1.6.2 does not work as it is, in one place.

Faults found with numpy 2.4, torch 2.15, webdataset 1.0.2 and transformers 5, and what we do:

 1. accuracy() calls float() on a one-element array, an error since numpy 2.4. Worked around:
    `repaired` puts `accuracy` in its place, in linear_probe too.
 2. webdataset fails with more workers than tars. Avoided: `TaskDataset` has no such limit.
 3. `--task auto` takes a retrieval set in the wds layout for classification. Avoided:
    `tasks.read_task` reads dataset_type.txt.
 4. amp=True is bf16 on the CPU, so that results vary with the batch size. Avoided: `evaluate`
    passes amp=False, and switches off autocast that is on around it.
 5. linear_probe needs CUDA. Does not arise: zero-shot only.
 6. linear_probe reuses features of a model that has changed. Does not arise: zero-shot only.
 7. `--skip_load` fails. Does not arise: the command line is not used.
 8. Captioning fails with transformers 5. Does not arise: no captioning.
 9. recall@k fails with fewer than k candidates. Worked around: `recall_at_k`.
10. The datasets cannot be pickled for spawned workers. Avoided: `TaskDataset` can.
11. The default output path contains that of the model. Does not arise: `results` writes.
12. Lightning checkpoints are not read. Does not arise: the model is passed in memory.
13. NaN is written into JSON (acc5 with fewer than 5 classes). Worked around: `none_for_nan`.
14. webdataset warns about shardshuffle. Avoided: webdataset is not used.
15. DataComp's eval_utils cuts webdataset's pipeline in the wrong place. Does not arise: not used.
16. DataComp's evaluation pins versions of 2022. Does not arise: not used.
17. Each task loads the model anew. Avoided: `evaluate.evaluate_tasks` takes one in memory.

Besides, its functions draw a progress bar a task and tower, which `repaired` silences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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


def none_for_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics with None where there is no number, which JSON can hold."""
    return {name: None if math.isnan(value) else float(value) for name, value in metrics.items()}


def _no_bar(iterable: Iterable[Any], *_: Any, **__: Any) -> Iterable[Any]:
    return iterable


@contextmanager
def repaired() -> Iterator[None]:
    """Inside this block clip_benchmark's zero-shot functions draw no bars, and `evaluate` works."""
    places = [
        (zeroshot_classification, "accuracy", accuracy),
        (linear_probe, "accuracy", accuracy),
        (zeroshot_retrieval, "recall_at_k", recall_at_k),
        (zeroshot_classification, "tqdm", _no_bar),
        (zeroshot_retrieval, "tqdm", _no_bar),
    ]
    originals = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, replacement in places:
            setattr(module, name, replacement)
        yield
    finally:
        for (module, name, _), original in zip(places, originals, strict=True):
            setattr(module, name, original)
