"""A wandb run that continues: each value of a step once, over any number of starts.

Each start leaves a part of its own, `wandb/offline-run-DATE-ID` or `wandb/run-DATE-ID`. A new part
first gets what `metrics.jsonl` has and the parts before it lack, because their process was killed,
and leaves out what they have, where steps are repeated. Offline it numbers its rows (`_step`)
behind theirs; online the server says the first number that it lacks.
"""

from __future__ import annotations

import json
import logging
import math
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger

from siftclip.errors import InputError, is_finite
from siftclip.reading import in_one_line, open_file
from siftclip.redaction import shown

log = logging.getLogger(__name__)

STEP_KEY = "trainer/global_step"
_MAGIC, _HEADER_BYTES = b":W&B", 7  # of a file; a header of a chunk has as many
_BLOCK_BYTES = 32768
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(slots=True)
class LoggedRows:
    """What the parts of a run hold."""

    parts: int = 0
    next_row: int = 0  # the first number that no row has
    rows_of: dict[int, dict[str, int]] = field(default_factory=dict)  # the first, by step and key

    @property
    def last_step(self) -> int:
        return max((step for step, rows in self.rows_of.items() if rows), default=-1)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of wandb's."""
        number = int(row.get("_step", -1))
        self.next_row = max(self.next_row, number + 1)
        if STEP_KEY in row:
            rows = self.rows_of.setdefault(int(row[STEP_KEY]), {})
            for key in row:
                rows[key] = min(number, rows.get(key, number))

    def forget_from(self, number: int) -> None:
        """Forget the rows with this number and higher ones."""
        for step, rows in self.rows_of.items():
            self.rows_of[step] = {key: row for key, row in rows.items() if row < number}

    def lacks(self, metrics: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Return those metrics of a step of which no row has a value."""
        known = self.rows_of.get(step, ())
        return {key: value for key, value in metrics.items() if key not in known}


def _is_of_wandb(error: Exception) -> bool:
    from wandb import Error  # whose import takes a moment

    return isinstance(error, Error)


class WandbRun(WandbLogger):
    """Lightning's logger, for a run of which earlier starts have left rows.

    It shows wandb, which records the command line, one without credentials.
    """

    def __init__(self, *, before: LoggedRows, **options: Any) -> None:
        """Take what the parts before hold; `options` are those of Lightning's logger."""
        super().__init__(**options)
        self._wandb_init.pop("anonymous", None)  # wandb warns of it, whatever it is
        self._before = before
        self._first_row: int | None = (before.next_row or None) if self._offline else None
        self._asks_server = before.parts > 0 and not self._offline

    @property
    def experiment(self) -> Any:
        """The run of wandb, begun when it is first asked for."""
        whole = sys.argv
        sys.argv = [shown(word) for word in whole]
        try:
            run = super().experiment
        except Exception as error:
            if not _is_of_wandb(error):
                raise
            raise InputError(
                f"logger: wandb cannot begin the run: {in_one_line(error)}. logger=csv "
                "trains without it, and logger.mode=offline without its server."
            ) from error
        finally:
            sys.argv = whole
        if self._asks_server:
            self._asks_server = False
            self._before.forget_from(run.starting_step)
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run = self.experiment  # begun before it is said what it has
        row = dict(metrics)
        if step is not None:
            row = self._before.lacks(metrics, step)
            if not row:
                return
            row[STEP_KEY] = step
        if self._first_row is None:
            run.log(row)
            return
        run.log(row, step=self._first_row, commit=True)
        self._first_row = None  # from here on wandb counts

    def catch_up(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Log what `metrics.jsonl` has behind the last row of the parts before."""
        _ = self.experiment  # begun before it is said what it has
        for record in records:
            if record["step"] >= self._before.last_step:
                values = {
                    key: value for key, value in record.items() if key not in ("step", "time")
                }
                self.log_metrics(
                    {key: math.nan if v is None else v for key, v in values.items()}, record["step"]
                )


def logged_rows(folder: Path, run_id: str) -> LoggedRows:
    """Read what the parts of a run in a folder hold, as far as they are whole."""
    rows = LoggedRows()
    for path in sorted(folder.glob(f"wandb/*run-*/run-{run_id}.wandb")):
        rows.parts += 1
        for row in history(path):
            rows.add(row)
    return rows


def history(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a part, values by key; of what has parts, one of them."""
    from wandb.proto import wandb_internal_pb2

    for data in _records(_content_of(path)):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(data)
        except Exception:  # protobuf's own; the end of a file that was cut off
            return
        if record.WhichOneof("record_type") == "history":
            row = _row(record.history)
            if row is not None:
                yield row


def _row(history: Any) -> dict[str, Any] | None:
    """Return the values of a row; None of a damaged one."""
    try:
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in history.item}
    except (ValueError, RecursionError, IndexError):
        return None
    numbers = (row[key] for key in ("_step", STEP_KEY) if key in row)
    return row if all(map(is_finite, numbers)) else None


def _content_of(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read()
    except (InputError, OSError) as error:
        log.warning("this part of the wandb run counts as empty: %s", error)
        return b""


def _records(data: bytes) -> Iterator[bytes]:
    """Split a `.wandb` file, a log in LevelDB's format, into its records; ends where it is cut.

    Behind a header of 7 bytes there are blocks of 32 KiB with chunks, each with a checksum (4
    bytes), a length (2) and a type (1). The rest of a block that cannot hold a header is padding.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        return
    at, record = _HEADER_BYTES, b""
    while at + _HEADER_BYTES <= len(data):
        room = _BLOCK_BYTES - at % _BLOCK_BYTES
        if room < _HEADER_BYTES:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        at += _HEADER_BYTES
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or at + length > len(data):
            return
        record = (b"" if kind in (_WHOLE, _FIRST) else record) + data[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            yield record
