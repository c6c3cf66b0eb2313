"""The loss that each sample had when it was trained on last."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class LossesSeen:
    """float32 by the pool's rows, equal on all ranks; NaN for samples that were not trained on."""

    def __init__(self, pool_samples: int) -> None:
        self.values = np.full(pool_samples, np.nan, dtype=np.float32)

    def update(self, rows: np.ndarray, losses: np.ndarray) -> None:
        """Take the losses of a step: rows int64 [n] and losses float32 [n], of all ranks."""
        self.values[rows] = losses

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"values": torch.from_numpy(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint, in place: sources hold the array."""
        self.values[:] = state["values"].numpy()
