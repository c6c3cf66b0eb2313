"""The target stage: an open_clip model over tasks in clip_benchmark's layout."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from omegaconf import DictConfig

from siftclip.datamodules.locks import LOCK_NAME, locked
from siftclip.datamodules.tar_walk import require_key_split
from siftclip.eval.encoding import EncodeOptions
from siftclip.eval.target_features import embed_tasks
from siftclip.eval.tasks import TEST_SPLIT, find_tasks
from siftclip.selectors.errors import InputError, require_bool, require_int
from siftclip.trainer.build.options import options_of, under
from siftclip.trainer.cores import share_cores, worker_count
from siftclip.trainer.evaluation import evaluation_device
from siftclip.trainer.models import clip_model_from
from siftclip.trainer.stages import output_root, plain

log = logging.getLogger(__name__)


def target_stage(config: DictConfig) -> tuple[Path, list[Path]]:
    """Embed the configured tasks; returns the folder and its files.

    Raises:
        InputError: an option is wrong or a task is damaged.
    """
    if config.features.model is None:
        raise InputError(
            "target needs the model whose features the pool has: features=open_clip "
            "features.name=NAME features.model.name=MODEL."
        )
    key_split = require_key_split("target.key_split", config.target.key_split)
    with options_of(under("target", "root", names="tasks")):
        tasks = find_tasks(
            Path(config.target.root),
            plain(config.target.tasks),
            split=str(config.target.split),
            key_split=key_split,
        ).complete()
    tested = [task.name for task in tasks if task.split == TEST_SPLIT]
    if tested:
        log.warning(
            "target.split=%s is the split that siftclip eval tests on: what is selected for these "
            "targets makes values of %s too high. Take target.split=train.",
            TEST_SPLIT,
            ", ".join(tested),
        )
    batch_size = require_int("features.batch_size", config.features.batch_size, minimum=1)
    clip = clip_model_from(config.features.model, "features.model", trained=True)
    folder = config.target.folder
    if folder is None:
        folder = output_root(config) / "targets" / str(config.features.name)
    num_workers = worker_count(config.data.num_workers)
    share_cores(num_workers)
    options = EncodeOptions(
        device=torch.device(evaluation_device(config)),
        batch_size=batch_size,
        num_workers=num_workers,
        max_image_pixels=config.data.max_image_pixels,
        progress=config.progress,
    )
    reuse = require_bool("reuse", config.reuse)
    with locked(Path(folder) / LOCK_NAME, owner=f"The targets {folder}", wait=True):
        paths = embed_tasks(clip, tasks, Path(folder), options, reuse=reuse)
    return Path(folder), paths
