"""Features of tasks' images, captions and class names: the targets that selectors select for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
from torch.utils.data import DataLoader
from tqdm import tqdm

from siftclip.datamodules.clip_models import ClipModel
from siftclip.datamodules.files import read_npz_all, write_npz
from siftclip.eval.clip_benchmark_fixes import repaired
from siftclip.eval.evaluate import evaluation_mode, fingerprint
from siftclip.eval.task_dataset import TaskDataset, collate_captions
from siftclip.eval.tasks import Task


def embed_tasks(
    clip: ClipModel,
    tasks: Sequence[Task],
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    num_workers: int = 0,
    progress: bool = True,
) -> list[Path]:
    """Write the features of tasks, one `TASK-SPLIT.npz` each; those that are there are kept.

    An npz holds unit vectors, float16 as in a pool: `img` [n, d], of images; `class_txt` [C, d],
    of class names as zero-shot classification uses them, the mean over the task's templates;
    `txt` [n, d], of the first caption of each image. Tasks with classes have no `txt`, retrieval
    has no `class_txt`. `model` says which weights they are of.

    Args:
        clip: the model with its transform and tokenizer.
        tasks: of any split.
        folder: to write to.
        device: where to run.
        batch_size: images in a batch.
        num_workers: processes that decode images.
        progress: whether to show a bar over the batches.

    Raises:
        InputError: a task is damaged.
    """
    model_hash = fingerprint(clip)
    paths = [folder / f"{task.name}-{task.split}.npz" for task in tasks]
    with evaluation_mode(clip, torch.device(device)) as ready, repaired():
        for task, path in zip(tasks, paths, strict=True):
            if path.is_file() and str(read_npz_all(path).get("model")) == model_hash:
                continue
            arrays = _embed_task(ready, task, batch_size, num_workers, progress)
            write_npz(path, model=np.asarray(model_hash), **arrays)
    return paths


def _embed_task(
    clip: ClipModel, task: Task, batch_size: int, num_workers: int, progress: bool
) -> dict[str, np.ndarray]:
    loader = DataLoader(
        TaskDataset(task, clip.eval_transform),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_captions if task.kind == "retrieval" else None,
        generator=torch.Generator(),  # without one it takes a number from the global generator
    )
    device = next(clip.model.parameters()).device
    found: dict[str, list[np.ndarray]] = {"img": [], "txt": []}
    for images, labels in tqdm(
        loader, desc=task.name, unit="batch", disable=not progress, leave=False
    ):
        image = clip.model.encode_image(images.to(device), normalize=True)  # type: ignore[operator]
        found["img"].append(image.half().cpu().numpy())
        if task.kind == "retrieval":
            tokens = clip.tokenizer([captions[0] for captions in labels]).to(device)
            text = clip.model.encode_text(tokens, normalize=True)  # type: ignore[operator]
            found["txt"].append(text.half().cpu().numpy())
    arrays = {key: np.concatenate(parts) for key, parts in found.items() if parts}
    if task.kind != "retrieval":
        classes = zero_shot_classifier(
            clip.model,
            clip.tokenizer,
            list(task.classnames),
            list(task.templates),
            device.type,
            amp=False,
        )
        arrays["class_txt"] = classes.T.half().cpu().numpy()
    return arrays
