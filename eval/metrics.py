"""Metrics of a model on a loader, by kind of task: clip_benchmark's functions, in fp32.

They are put together as in clip_benchmark's `evaluate` functions, which give no more than the
metrics, while paired tests need to know which samples were right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from sklearn.metrics import balanced_accuracy_score
from torch.utils.data import DataLoader

from siftclip.datamodules.clip_models import Tokenizer
from siftclip.eval.clip_benchmark_fixes import accuracy, recall_at_k
from siftclip.eval.tasks import TaskKind

RECALL_KS = (1, 5, 10)

Metrics = dict[str, float]
# (model with encode_image and encode_text, tokenizer, loader over a TaskDataset, device type)
# -> (metrics, bool [n] or None, see TaskResult.correct)
Evaluator = Callable[[Any, Tokenizer, DataLoader[Any], str], tuple[Metrics, np.ndarray | None]]


def _class_logits(
    model: Any, tokenizer: Tokenizer, loader: DataLoader[Any], device_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 [n, classes] and the targets, int64 [n] or float32 [n, classes]."""
    dataset: Any = loader.dataset  # a TaskDataset
    classifier = zeroshot_classification.zero_shot_classifier(
        model, tokenizer, dataset.classes, dataset.templates, device_type, amp=False
    )
    return zeroshot_classification.run_classification(
        model, classifier, loader, device_type, amp=False
    )


def evaluate_classification(
    model: Any, tokenizer: Tokenizer, loader: DataLoader[Any], device_type: str
) -> tuple[Metrics, np.ndarray]:
    """Composed as clip_benchmark's `zeroshot_classification.evaluate`, which keeps the logits."""
    logits, target = _class_logits(model, tokenizer, loader, device_type)
    return classification_metrics(logits, target)


def classification_metrics(
    logits: torch.Tensor, target: torch.Tensor
) -> tuple[Metrics, np.ndarray]:
    """acc1, acc5 (NaN with fewer than 5 classes), mean_per_class_recall; and the correctness.

    Args:
        logits: float32 [n, classes].
        target: int64 [n].

    Returns:
        The metrics, and bool [n] whose mean is acc1, ties included.
    """
    topk = (1, 5) if logits.shape[1] >= 5 else (1,)
    shares = accuracy(logits, target, topk=topk)
    # Of equal logits topk may put another one first than argmax does, so ask it as accuracy does.
    first = logits.topk(max(topk), 1, True, True).indices[:, 0]
    with warnings.catch_warnings():
        # A task need not hold an image of every class that a model can name.
        warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
        recall = float(balanced_accuracy_score(target, logits.argmax(dim=1)))
    metrics = {
        "acc1": shares[0],
        "acc5": shares[1] if len(shares) > 1 else float("nan"),
        "mean_per_class_recall": recall,
    }
    return metrics, first.eq(target).numpy()


def evaluate_multilabel(
    model: Any, tokenizer: Tokenizer, loader: DataLoader[Any], device_type: str
) -> tuple[Metrics, None]:
    """The mean over the classes of the average precision, as clip_benchmark's `evaluate`."""
    logits, target = _class_logits(model, tokenizer, loader, device_type)
    precisions = zeroshot_classification.average_precision_per_class(logits, target)
    return {"mean_average_precision": precisions.mean().item()}, None


def evaluate_retrieval(
    model: Any, tokenizer: Tokenizer, loader: DataLoader[Any], device_type: str
) -> tuple[Metrics, np.ndarray]:
    """Composed as clip_benchmark's `zeroshot_retrieval.evaluate`, which keeps the hits."""
    images, texts, image_of_text = [], [], list[int]()
    for batch_images, batch_captions, indices in zeroshot_retrieval.dataloader_with_indices(loader):
        tokens = tokenizer([caption for captions in batch_captions for caption in captions])
        images.append(F.normalize(model.encode_image(batch_images.to(device_type)), dim=-1).cpu())
        texts.append(F.normalize(model.encode_text(tokens.to(device_type)), dim=-1).cpu())
        for index, captions in zip(indices.tolist(), batch_captions, strict=True):
            image_of_text.extend([index] * len(captions))
    scores = torch.cat(texts) @ torch.cat(images).t()
    return retrieval_metrics(scores, torch.tensor(image_of_text), len(images[0]), device_type)


def retrieval_metrics(
    scores: torch.Tensor, image_of_text: torch.Tensor, batch_size: int, device_type: str
) -> tuple[Metrics, np.ndarray]:
    """Recall@1, 5 and 10 in both directions, and the means of the directions at 1 and 5.

    A query counts as a hit if at least one of its positives is among the k best, so that
    recall@k with fewer than k candidates is 1.

    Args:
        scores: float32 [texts, images].
        image_of_text: int64 [texts], the image that a caption belongs to.
        batch_size: queries ranked at a time.
        device_type: where to rank.

    Returns:
        The metrics, and bool [images]: whether the best caption of an image is one of its own.
    """
    positives = torch.zeros_like(scores, dtype=torch.bool)
    positives[torch.arange(len(scores)), image_of_text] = True
    directions = {"image": (scores, positives), "text": (scores.T, positives.T)}
    metrics: Metrics = {}
    hits: dict[str, torch.Tensor] = {}
    for k in RECALL_KS:
        for direction, (queries, pairs) in directions.items():
            name = f"{direction}_retrieval_recall@{k}"
            recall = zeroshot_retrieval.batchify(
                recall_at_k, queries, pairs, batch_size, device_type, k=k
            )
            hits[name] = recall > 0
            metrics[name] = hits[name].float().mean().item()
    for k in (1, 5):
        both = [metrics[f"{direction}_retrieval_recall@{k}"] for direction in directions]
        metrics[f"mean_recall@{k}"] = sum(both) / 2
    return metrics, hits["text_retrieval_recall@1"].numpy()


EVALUATORS: dict[TaskKind, Evaluator] = {
    "classification": evaluate_classification,
    "multilabel": evaluate_multilabel,
    "retrieval": evaluate_retrieval,
}
