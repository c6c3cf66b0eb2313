"""Where an interrupted run continues: at its last checkpoint that is whole, as its log then says.

A disk that was full, a power cut or a copy may leave a checkpoint damaged. Each is read before
training begins; one that is not whole is renamed `step-N.ckpt.damaged`, where there is one before
it to continue from.
"""

from __future__ import annotations

import errno
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from siftclip.damaged import set_aside
from siftclip.datamodules.models.sharded_checkpoint import (
    REST_NAME,
    ShardedCheckpoint,
    is_sharded_checkpoint,
)
from siftclip.datamodules.models.weights import LIGHTNING_PREFIX, fault_of, require_same_keys
from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.trainer.runtime.environment import Environment, keep_environment
from siftclip.trainer.runtime.loggers import drop_repeated
from siftclip.trainer.runtime.run_dir import RunDir, checkpoints_in, is_rank_zero, step_of

_PARTS = ("state_dict", "optimizer_states", "loops", "global_step", "skipped_steps")
_NONE, _FAILED = -1, -2  # in place of a step

log = logging.getLogger(__name__)


def whole_checkpoint(run: RunDir, model: nn.Module, ranks: Ranks) -> Path | None:
    """Find the checkpoint to continue from, the same one on all ranks; None if there is none.

    Args:
        run: that was interrupted.
        model: that it trains, before it is wrapped or sharded.
        ranks: that continue it. The first one looks; all of them make this call.

    Raises:
        InputError: there are checkpoints, and none of them is whole.
    """
    if ranks.size == 1 and not is_rank_zero():
        return run.latest_checkpoint()  # Lightning started this process after the first had looked
    step, error = _NONE, None
    if ranks.rank == 0:
        try:
            step = _first_whole(run, {k: v.shape for k, v in model.state_dict().items()})
        except InputError as raised:
            step, error = _FAILED, raised
    step = int(ranks.sum(torch.tensor(step if ranks.rank == 0 else 0)))
    if step == _FAILED:
        raise error or InputError(f"{run.path} cannot continue, see the first rank.")
    return None if step == _NONE else run.checkpoints / f"step-{step}.ckpt"


def _first_whole(run: RunDir, shapes: Mapping[str, torch.Size]) -> int:
    """Return the highest step whose checkpoint is whole, and set aside those above it."""
    if os.path.lexists(run.checkpoints) and not run.checkpoints.is_dir():
        aside = set_aside(run.checkpoints)
        log.warning("%s is no folder: it is now %s", run.checkpoints, aside)
    damaged: dict[Path, str] = {}
    checkpoints = checkpoints_in(run.checkpoints)
    for step, path in reversed(checkpoints.items()):
        fault = checkpoint_fault(path, shapes)
        if fault is None:
            for other, reason in damaged.items():
                aside = set_aside(other)
                log.warning(
                    "%s cannot be continued from: %s. It is now %s, and the run continues from the "
                    "checkpoint before, of step %d.",
                    other,
                    reason,
                    other.name if aside is None else aside.name,
                    step,
                )
            return step
        damaged[path] = fault
    if not damaged:
        return _NONE
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
    raise InputError(
        f"The run {run.path} cannot continue: none of its checkpoints is whole ({reasons}). Put a "
        "copy of one in its place if you have it; or train again from the first step with "
        f"reuse=false, which moves what there is to {run.path}.replaced-TIME. "
        "trainer.keep_checkpoints says how many checkpoints are kept to fall back on."
    )


def checkpoint_fault(path: Path, shapes: Mapping[str, torch.Size]) -> str | None:
    """Read all of a checkpoint, and say in a few words why nothing can continue from it, if so.

    Args:
        path: of a `step-N.ckpt`, a file or a folder of parts.
        shapes: of the weights that it must hold, by name.

    Raises:
        InputError: it cannot be read now, which says nothing of its content.
    """
    try:
        content = _sound_parts(path) if path.is_dir() else _sound_file(path)
        _require_checkpoint(content, step_of(path), shapes)
    except zipfile.BadZipFile:
        return "it is cut off, or no checkpoint"
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP):
            return f"it is no file ({error.strerror})"
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}. Once it can, the same command "
            "continues; if it never can, delete it to continue from the one before."
        ) from None
    except Exception as error:  # damaged files raise anything from KeyError to UnpicklingError
        return " ".join(fault_of(error).split())
    return None


def _sound_file(path: Path) -> Any:
    """Read all of a file of torch; ValueError says what is wrong with it, among others."""
    if not path.stat().st_size:
        raise ValueError("it is empty")
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch does not compare checksums
    if damaged is not None:
        raise ValueError(f"the checksum of {Path(damaged).name} in it is wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _sound_parts(folder: Path) -> Any:
    """Read all parts of a checkpoint, and return what it holds without sharded values."""
    if not is_sharded_checkpoint(folder):
        raise ValueError(f"it is a folder without {REST_NAME}")
    _sound_file(folder / REST_NAME)
    parts = ShardedCheckpoint(folder)
    for path in parts.files[1:]:
        try:
            _sound_file(path)
        except FileNotFoundError:
            raise ValueError(f"{path.name} is missing in it") from None
        except zipfile.BadZipFile:
            raise ValueError(f"{path.name} in it is cut off, or no part of one") from None
        except ValueError as error:
            raise ValueError(f"{path.name} in it: {error}") from None
    parts.check()
    return parts.rest


def _require_checkpoint(content: Any, step: int, shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError for what is no checkpoint of this step with weights of these shapes."""
    missing = [part for part in _PARTS if not isinstance(content, dict) or part not in content]
    if missing:
        raise ValueError(f"it is no checkpoint of a run: it has no {missing[0]}")
    if content["global_step"] != step:
        raise ValueError(f"it is of step {content['global_step']}")
    weights = {
        name.removeprefix(LIGHTNING_PREFIX): value
        for name, value in content["state_dict"].items()
        if name.startswith(LIGHTNING_PREFIX)
    }
    require_same_keys(shapes, weights)
    for name, shape in shapes.items():
        if name in weights and weights[name].shape != shape:
            raise ValueError(
                f"it is of another model: {name} has the shape {tuple(weights[name].shape)}, here "
                f"{tuple(shape)}"
            )


def continue_files(run: RunDir, checkpoint: Path | None, now: Environment) -> None:
    """Make the files of a run say where it is, before anything is added to them.

    Args:
        run: that begins, or continues.
        checkpoint: to continue from; None: from the first step.
        now: what this session computes with.

    Raises:
        InputError: a file is damaged.
    """
    step = 0 if checkpoint is None else step_of(checkpoint)
    drop_repeated(run.path, step=None if run.has_model else step)
    changed = keep_environment(run.path, now, step=step)
    if changed:
        log.warning(
            "the run continues at step %d on something else: %s. From here on it differs from "
            "an uninterrupted run as another seed does (docs/training.md).",
            step,
            "; ".join(changed),
        )
