"""Writes checkpoints so that only whole ones bear the name of one; reads those in parts too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from siftclip.datamodules.models.sharded_checkpoint import (
    ShardedCheckpoint,
    is_sharded_checkpoint,
)
from siftclip.files import write_torch
from siftclip.reading import readable


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
        write_torch(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint; one in parts, which sharded training has written, as if it were whole.

        Raises:
            InputError: a part cannot be read.
        """
        if not is_sharded_checkpoint(path):
            return super().load_checkpoint(path, *args, **options)
        with readable(path, "checkpoint in parts"):
            parts = ShardedCheckpoint(Path(path))
            return {key: parts.whole(value, key) for key, value in parts.rest.items()}
