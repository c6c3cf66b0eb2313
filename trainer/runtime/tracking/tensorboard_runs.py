"""A TensorBoard run that continues: event files in one folder, each value of a step once.

Each start writes an event file of its own, which TensorBoard shows together. A new one leaves out
what those before it have, and begins with what a killed process had not written.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tabulate import tabulate

from siftclip.reading import open_file
from siftclip.redaction import printable
from siftclip.trainer.runtime.tracking.continued import Histogram, LastSteps, Records, ScalarLogger
from siftclip.trainer.runtime.tracking.metric_names import Axes
from siftclip.writing import make_folder, writing_to

log = logging.getLogger(__name__)

FOLDER = "tensorboard"
_LENGTH = struct.Struct("<QI")  # of an event, with its checksum
_CHECKSUM_BYTES = 4
_TEXT = "/text_summary"  # what TensorBoard adds to the keys of texts


class TensorBoardRun(ScalarLogger, TensorBoardLogger):
    """Lightning's logger, for a run of which earlier starts may have left event files."""

    def __init__(self, folder: Path) -> None:
        """Read what the event files of a folder hold; it need not be there."""
        super().__init__(save_dir=folder, name="", version="")
        self.before = logged_events(folder)
        self.axes = Axes()

    @rank_zero_only
    def write_scalars(self, values: Mapping[str, float], step: int, time: float | None) -> None:
        with self._writing() as writer:
            for key, value in values.items():
                writer.add_scalar(key, value, step, walltime=time)

    @rank_zero_only
    def log_records(self, key: str, records: Records, step: int) -> None:
        """Log a table as text, and its images as such."""
        if not records or not self.before.lacks(f"{key}{_TEXT}", step):
            return
        with self._writing() as writer:
            writer.add_text(key, _markdown(records), step)
            for number, record in enumerate(records):
                for name, value in record.items():
                    if isinstance(value, Image.Image):
                        pixels = np.asarray(value)
                        writer.add_image(f"{key}/{name}_{number}", pixels, step, dataformats="HWC")

    @rank_zero_only
    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        new = {key: each for key, each in histograms.items() if self.before.lacks(key, step)}
        with self._writing() as writer:
            add_histograms(writer, new, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Leave the event file open: what follows training goes into it, too."""

    @rank_zero_only
    def end(self, status: str) -> None:
        """Close the event file."""
        super().finalize(status)

    @rank_zero_only
    def save(self) -> None:
        """Write nothing: `config.yaml` in the run directory has the hyperparameters."""

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """Write in the block what is on the disk after it, whatever happens to the process."""
        folder = make_folder(Path(self.log_dir))
        with writing_to(folder):
            yield self.experiment
            self.experiment.flush()


def add_histograms(writer: Any, histograms: Mapping[str, Histogram], step: int) -> None:
    """Write histograms of a step by a writer of torch."""
    for key, histogram in histograms.items():
        counts, edges = np.asarray(histogram.counts), np.asarray(histogram.edges)
        centres = (edges[1:] + edges[:-1]) / 2  # of the values nothing finer is known
        writer.add_histogram_raw(
            key,
            min=histogram.low,
            max=histogram.high,
            num=int(counts.sum()),
            sum=float(counts @ centres),
            sum_squares=float(counts @ centres**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


def _markdown(records: Records) -> str:
    """Format a table without its images."""
    rows = [
        {
            name: printable(str(value)).replace("|", "\\|")
            for name, value in record.items()
            if not isinstance(value, Image.Image)
        }
        for record in records
    ]
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def logged_events(folder: Path) -> LastSteps:
    """Read the last step of each key in the event files of a folder, as far as they are whole."""
    from tensorboard.compat.proto.event_pb2 import Event

    last = LastSteps()
    for path in sorted(folder.glob("events.out.tfevents.*")):
        try:
            with open_file(path) as file:
                for data in _events(file):
                    event = Event.FromString(data)
                    for value in event.summary.value:
                        last.add(value.tag, event.step)
        except Exception as error:  # protobuf's own, of a damaged file, beside those of the system
            log.warning("%s counts as far as it is whole: %s", path, error)
    return last


def _events(file: BinaryIO) -> Iterator[bytes]:
    """Split an event file into its events: length (8 bytes), checksum, event, checksum."""
    left = os.fstat(file.fileno()).st_size
    while left >= _LENGTH.size:
        length, _ = _LENGTH.unpack(file.read(_LENGTH.size))
        left -= _LENGTH.size + length + _CHECKSUM_BYTES
        if left < 0:
            return  # cut off by a kill
        yield file.read(length)
        file.read(_CHECKSUM_BYTES)
