"""The target stage: an open_clip model over tasks in clip_benchmark's layout."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from siftclip.eval.encoding.encoder import EncodeOptions
from siftclip.eval.target_features import embed_tasks
from siftclip.eval.tasks.task import TEST_SPLIT, find_tasks
from siftclip.locks import LOCK_NAME, locked
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.runtime.cores import share_cores, worker_count
from siftclip.trainer.runtime.hardware import check_hardware
from siftclip.trainer.settings.commands import TargetCommand
from siftclip.trainer.stages.evaluation import evaluation_device

log = logging.getLogger(__name__)


def target_stage(settings: TargetCommand) -> tuple[Path, list[Path]]:
    """Embed the configured tasks; returns the folder and its files.

    Raises:
        InputError: an option is wrong or a task is damaged.
    """
    features, target, common = settings.features, settings.target, settings.common
    if features.model is None:
        raise RuntimeError("settings without a model are refused where they are read")
    check_hardware(settings.trainer)
    with options_of(under("target", "root", names="tasks")):
        tasks = find_tasks(
            Path(target.root), target.tasks, split=target.split, key_split=target.key_split
        ).complete()
    tested = [task.name for task in tasks if task.split == TEST_SPLIT]
    if tested:
        log.warning(
            "target.split=%s is the split that siftclip eval tests on: what is selected for these "
            "targets makes values of %s too high. Take target.split=train.",
            TEST_SPLIT,
            ", ".join(tested),
        )
    clip = clip_model_from(features.model, trained=True)
    folder = common.output_root / "targets" / features.name
    if target.folder is not None:
        folder = Path(target.folder)
    num_workers = worker_count(settings.data.num_workers)
    share_cores(num_workers)
    options = EncodeOptions(
        device=torch.device(evaluation_device(settings.trainer)),
        batch_size=features.batch_size,
        num_workers=num_workers,
        max_image_pixels=settings.data.max_image_pixels,
        progress=common.progress,
    )
    with locked(folder / LOCK_NAME, owner=f"The targets {folder}", wait=True):
        paths = embed_tasks(clip, tasks, folder, options, reuse=common.reuse)
    return folder, paths
