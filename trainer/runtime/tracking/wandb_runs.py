"""A wandb run that continues: each value of a step once, over any number of starts.

Each start leaves a part of its own, `wandb/offline-run-DATE-ID` or `wandb/run-DATE-ID`. A new part
first gets what `metrics.jsonl` has and the parts before it lack, because their process was killed,
and leaves out what they have, where steps are repeated. Offline it numbers its rows (`_step`)
behind theirs; online the server says the first number that it lacks.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from siftclip.errors import InputError
from siftclip.reading import in_one_line, read_text
from siftclip.redaction import shown
from siftclip.trainer.runtime.tracking.continued import ContinuedLogger, Histogram, Records
from siftclip.trainer.runtime.tracking.metric_names import (
    AXES,
    STEP_KEY,
    Axes,
    with_open_clip_names,
)
from siftclip.trainer.runtime.tracking.wandb_files import LoggedRows
from siftclip.trainer.settings.logger import XAxis

log = logging.getLogger(__name__)

_STAGING_VARIABLE = "WANDB_DATA_DIR"


def _is_of_wandb(error: Exception) -> bool:
    from wandb import Error  # whose import takes a moment

    return isinstance(error, Error)


class WandbRun(ContinuedLogger, WandbLogger):
    """Lightning's logger, for a run of which earlier starts may have left rows.

    It shows wandb, which records the command line, one without credentials.
    """

    def __init__(
        self, *, before: LoggedRows, x_axis: XAxis = "step", tables: bool = False, **options: Any
    ) -> None:
        """Set what the parts before hold, and what charts count by.

        Args:
            before: read by `logged_rows`.
            x_axis: of all charts that are not set otherwise in wandb.
            tables: whether it takes tables, each of which is an artifact for wandb.
            **options: those of Lightning's logger.
        """
        super().__init__(**options)
        self._wandb_init.pop("anonymous", None)  # wandb warns of it, whatever it is
        self._before = before
        self._x_axis = x_axis
        self._takes_tables = tables
        self._axes = Axes()
        self._first_row: int | None = (before.next_row or None) if self._offline else None
        self._is_new = True

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
        if self._is_new:
            self._is_new = False
            self._begun(run)
        return run

    @rank_zero_only
    def _begun(self, run: Any) -> None:
        for axis in AXES:
            run.define_metric(axis)
        if self._x_axis != "step":
            run.define_metric("*", step_metric=self._x_axis, step_sync=True, overwrite=True)
        if not self._offline:
            self._before.forget_from(run.starting_step)

    @property
    def earlier_artifacts(self) -> set[tuple[str, str]]:
        """Names and digests of the artifacts of earlier parts; online the server knows them."""
        return self._before.artifacts if self._offline else set()

    @rank_zero_only
    def log_metrics(
        self, metrics: Mapping[str, Any], step: int | None = None, *, time: float | None = None
    ) -> None:
        """Log a row; wandb has its own clock."""
        run = self.experiment  # begun before it is said what it has
        row = with_open_clip_names(metrics)
        if step is not None:
            axes = self._axes.at(metrics, step)
            row = self._before.lacks(row, step)
            if not row:
                return
            row |= {**axes, STEP_KEY: step}
        row = {key: math.nan if value is None else value for key, value in row.items()}
        with self.staging():
            if self._first_row is None:
                run.log(row)
                return
            run.log(row, step=self._first_row, commit=True)
        self._first_row = None  # from here on wandb counts

    def lacks(self, key: str, step: int) -> bool:
        return bool(self._before.lacks({key: None}, step))

    @rank_zero_only
    def catch_up(self, records: Records) -> None:
        """Log what the parts before lack; none where the server has rows that are not here."""
        is_elsewhere = not self._offline and not self._before.parts
        is_elsewhere = is_elsewhere and self.experiment.starting_step > 0
        last_step = math.inf if is_elsewhere else self._before.last_step
        for record in records:
            if record["step"] < last_step:
                self._axes.at(record, record["step"])
        super().catch_up([record for record in records if record["step"] >= last_step])

    @rank_zero_only
    def log_records(self, key: str, records: Records, step: int | None) -> None:
        if not (self._takes_tables and records):
            return
        if step is not None and not self.lacks(key, step):
            return
        with self.staging(), _forgiven(f"the table {key}"):
            self.log_metrics({key: wandb_table(records)}, step)

    @rank_zero_only
    def log_page(self, key: str, path: Path) -> None:
        """Log a page of HTML."""
        import wandb

        self.log_metrics({key: wandb.Html(read_text(path))})

    @rank_zero_only
    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        self.log_metrics(wandb_histograms(histograms), step)

    @rank_zero_only
    def log_summary(self, metrics: Mapping[str, Any]) -> None:
        """Set what tables of runs show of this one, whichever part of it wandb reads last."""
        values = {key: value for key, value in metrics.items() if value is not None}
        self.experiment.summary.update(with_open_clip_names(values))

    @rank_zero_only
    def log_artifact(self, artifact: Any, *, is_input: bool) -> None:
        """Log an artifact that the run has made, or was made from.

        wandb's own `use_artifact` refuses to do so offline, and waits for the server online; both
        go through this call of it.
        """
        run = self.experiment
        with _forgiven(f"the artifact {artifact.name}"):
            run._log_artifact(artifact, is_user_created=is_input, use_after_commit=is_input)

    @contextmanager
    def staging(self) -> Iterator[None]:
        """Have wandb put copies of what it is given into the run's folder, inside the block.

        Else they lie in the home folder, and `wandb sync` on another machine misses them.
        """
        if self.save_dir is None or _STAGING_VARIABLE in os.environ:
            yield
            return
        os.environ[_STAGING_VARIABLE] = str(Path(self.save_dir).absolute() / "wandb")
        try:
            yield
        finally:
            del os.environ[_STAGING_VARIABLE]

    @rank_zero_only
    def end(self, status: str) -> None:
        """Close the run; one that is to be continued counts as preempted, and not as finished."""
        run = self.experiment
        if status == "stopped":
            run.mark_preempting()
        run.finish(exit_code=int(status != "finished"))


@contextmanager
def _forgiven(what: str) -> Iterator[None]:
    """Warn where wandb fails inside the block: what is beside the metrics must not end a run."""
    try:
        yield
    except Exception as error:  # of a server, or of a disk
        log.warning("wandb does not take %s: %s", what, in_one_line(error))


def wandb_histograms(histograms: Mapping[str, Histogram]) -> dict[str, Any]:
    """Return histograms as wandb has them."""
    import wandb

    return {
        key: wandb.Histogram(np_histogram=(list(each.counts), each.edges))
        for key, each in histograms.items()
    }


def wandb_table(records: Records) -> Any:
    """Return a table as wandb has it, with its images."""
    import wandb

    columns = list(records[0])
    rows = [[_cell(record[column]) for column in columns] for record in records]
    return wandb.Table(columns=columns, data=rows)


def _cell(value: Any) -> Any:
    import wandb

    return wandb.Image(value) if isinstance(value, Image.Image) else value
