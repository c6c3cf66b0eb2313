"""What loggers get beside the names in `metrics.jsonl`: where the run is, and open_clip's names.

`metrics.jsonl` has each number once, under the name that Siftclip's own reports read. Loggers get
the same names, and more of them: three axes for charts, and the name that open_clip has for the
same number where that is another one. docs/logging.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STEP_KEY = "trainer/global_step"  # Lightning's
SAMPLES, FLOPS, SECONDS = AXES = ("samples", "flops", "seconds")
SELECTION_PREFIX = "selection/"  # of what is known before the first step
_STEP_SECONDS = "train/batch_time"  # which records of training have, and no others
# Of training they are the same: train/loss, train/lr, train/scale, ...
OPEN_CLIP_NAMES = {
    "eval/imagenet1k/acc1": "val/imagenet-zeroshot-val-top1",
    "eval/imagenet1k/acc5": "val/imagenet-zeroshot-val-top5",
    "eval/imagenetv2/acc1": "val/imagenetv2-zeroshot-val-top1",
    "eval/imagenetv2/acc5": "val/imagenetv2-zeroshot-val-top5",
}


def with_open_clip_names(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Add to metrics those that open_clip logs under another name, under that name."""
    theirs = {OPEN_CLIP_NAMES[name]: metrics[name] for name in metrics if name in OPEN_CLIP_NAMES}
    return {**metrics, **theirs}


def is_of_training(metrics: Mapping[str, Any]) -> bool:
    """Return whether metrics are those of a window of training steps."""
    return metrics.get(_STEP_SECONDS) is not None


@dataclass(slots=True)
class Axes:
    """How far a run is: trained samples, FLOPs, and seconds of training.

    They follow from the records of its log, so that they go on after a restart as if there had
    been none, see `at`.
    """

    _step: int = 0
    _samples: float = 0.0
    _flops: float | None = 0.0
    _seconds: float = 0.0

    def at(self, metrics: Mapping[str, Any], step: int) -> dict[str, float]:
        """Return the axes for metrics of a step; those of training move them on.

        Args:
            metrics: of one record, in the order of the log. What has no window of training, as an
                evaluation, stands where the last record of training was.
            step: of the record.
        """
        if is_of_training(metrics) and step > self._step:
            self._seconds += metrics[_STEP_SECONDS] * (step - self._step)
            self._samples = metrics.get("train/samples_seen", self._samples)
            self._flops = metrics.get("cost/flops")  # none of a model that cannot be counted
            self._step = step
        axes = {SAMPLES: self._samples, FLOPS: self._flops, SECONDS: self._seconds}
        return {name: value for name, value in axes.items() if value is not None}
