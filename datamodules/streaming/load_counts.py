"""What was loaded so far: samples, retries, and bad samples, which are bounded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from siftclip.datamodules.index.faults import FaultLog
from siftclip.datamodules.pool.image_formats import describe_formats
from siftclip.datamodules.streaming.batches import Batch

log = logging.getLogger(__name__)

FIRST_SAMPLES = 1000  # judged together: few samples say little of a rate


@dataclass(slots=True, kw_only=True)
class LoadCounts:
    """Counts of one rank, over all processes that continued from each other."""

    owner: str  # of the samples, such as "pool /data/pool"
    max_bad_fraction: float  # of the samples
    loaded_samples: int = 0
    retries: int = 0  # reads that had to be repeated
    faults: FaultLog = field(default_factory=FaultLog)
    formats: Counter[str] = field(default_factory=Counter)  # of images, those that are rare

    def add(self, batch: Batch) -> None:
        """Count a batch.

        The first FIRST_SAMPLES samples are judged together: few samples say little of a rate.

        Raises:
            InputError: too many samples are bad.
        """
        self.loaded_samples += len(batch.rows)
        self.retries += batch.retries
        self.formats.update(batch.formats)
        for cause, place in batch.faults:
            self.faults.add(cause, place)
        bound = self.max_bad_fraction * max(self.loaded_samples, FIRST_SAMPLES)
        if self.faults.samples > bound:
            self.faults.check(
                owner=self.owner,
                total=self.loaded_samples + self.faults.samples,
                max_bad_fraction=self.max_bad_fraction,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return {
            "loaded_samples": self.loaded_samples,
            "retries": self.retries,
            "faults": self.faults.state(),
            "formats": dict(self.formats),
        }

    def say_at_end(self) -> None:
        """Log what was replaced, and which images had a rare format."""
        if self.faults.samples:
            log.warning(
                "training replaced %d bad samples: %s", self.faults.samples, self.faults.summary()
            )
        if self.formats:
            log.info("training: %s", describe_formats(self.formats, self.loaded_samples))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the counts of `state_dict`; other entries are left alone."""
        self.loaded_samples = state_dict["loaded_samples"]
        self.retries = state_dict["retries"]
        self.faults = FaultLog.from_state(state_dict["faults"])
        self.formats = Counter(state_dict.get("formats", {}))  # older checkpoints have none
