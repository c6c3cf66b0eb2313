"""Writes checkpoints so that only whole ones bear the name of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from siftclip.writing import atomic_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams a checkpoint into a file beside its place, and renames it.

    Lightning's own builds the whole file in memory twice, and then in the folder for temporary
    files, which is often small, before it is copied to its place.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            InputError: there is no room, or no permission.
        """
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
