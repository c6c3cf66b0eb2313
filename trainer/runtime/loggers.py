"""The loggers of a run: files always, and those that its settings ask for beside them."""

from __future__ import annotations

import logging
import math
import netrc
import os
import re
import time as clock
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from siftclip.errors import InputError
from siftclip.files import append_jsonl, has_content, keep_records, write_text
from siftclip.reading import read_text
from siftclip.redaction import shown
from siftclip.trainer.runtime.launch import TrainingStopped
from siftclip.trainer.runtime.run_dir import METRICS_NAME, WANDB_ID_NAME, is_rank_zero
from siftclip.trainer.runtime.run_records import read_metrics
from siftclip.trainer.runtime.tracking.continued import ContinuedLogger, Histogram, Records
from siftclip.trainer.runtime.tracking.packages import mlflow_uri
from siftclip.trainer.runtime.tracking.wandb_files import LoggedRows, logged_rows, mend_parts
from siftclip.trainer.runtime.tracking.wandb_runs import (
    WandbRun,
    wandb_histograms,
    wandb_table,
)
from siftclip.trainer.settings.logger import WANDB_ID, LoggerSettings, WandbMode
from siftclip.writing import atomic_path

log = logging.getLogger(__name__)

_AFTER_TRAINING = ("eval/", "selection/")  # names of what is logged when the model is written
WANDB_MODES: tuple[WandbMode, ...] = get_args(WandbMode)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunKind:
    """What a run is called where its settings are silent."""

    name: str
    job_type: str


class FileLogger(Logger):
    """Appends every record to `metrics.jsonl`, and ends with the same as a table, `metrics.csv`.

    Lightning's CSVLogger deletes what an interrupted run has written when that run continues.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # JSON has neither NaN nor infinity, and a metric without a value must not end a training.
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        record = {"step": step, "time": round(clock.time(), 3), **values}
        append_jsonl(self.folder / METRICS_NAME, record)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: `config.yaml` in the run directory holds them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the table: one row per step, the last value where a step was logged again."""
        import pandas as pd

        rows: dict[int, dict[str, Any]] = {}
        for record in read_metrics(self.folder / METRICS_NAME):
            rows.setdefault(record["step"], {}).update(record)
        with atomic_path(self.folder / "metrics.csv") as temporary:
            pd.DataFrame([rows[step] for step in sorted(rows)]).to_csv(temporary, index=False)


def drop_repeated(folder: Path, *, step: int | None) -> None:
    """Drop from the log what a run that continues at `step` will log again, atomically.

    That is what it logged behind this step, and after its training; None: that training is done.
    """

    def stays(record: Mapping[str, Any]) -> bool:
        is_repeated = step is not None and record.get("step", 0) > step
        return not is_repeated and not any(key.startswith(_AFTER_TRAINING) for key in record)

    keep_records(folder / METRICS_NAME, stays, read=read_metrics)


# ---- Weights & Biases ---------------------------------------------------------------------------
def wandb_is_offline(mode: WandbMode) -> bool:
    """Return whether wandb must not use the network: in mode `auto`, unless the user is logged in.

    Raises:
        InputError: the mode is not one of `WANDB_MODES`.
    """
    if mode not in WANDB_MODES:
        raise InputError(f"logger.mode must be one of {list(WANDB_MODES)}. Got {mode!r}.")
    if mode != "auto":
        return mode == "offline"
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"] != "online"
    return not _logged_in()


def _logged_in() -> bool:
    """Return whether wandb has a key: in the environment, or where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_run_id(folder: Path, given: str | None = None) -> str:
    """Return the id of the folder's wandb run, drawn once and kept in its file `wandb_id`.

    A name alone would not do: in wandb a run that was deleted here and trained again, or one of the
    same name elsewhere, would be taken for a restart, and its curves would be mixed.

    Args:
        folder: of the run.
        given: an id that takes the place of what is kept.
    """
    path = folder / WANDB_ID_NAME
    kept = read_text(path).strip() if has_content(path) else ""
    if kept == given or (given is None and WANDB_ID.fullmatch(kept)):
        return kept
    if kept:
        reason = "holds no id of wandb's" if given is None else f"holds another id, {shown(kept)}"
        log.warning("%s %s: the wandb run begins anew", path, reason)
    if given is None:
        name = re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII)[:64]
        given = f"{name}-{uuid.uuid4().hex[:8]}"
    write_text(path, f"{given}\n")
    return given


def wandb_run(
    folder: Path, settings: LoggerSettings, kind: RunKind, config: Mapping[str, Any]
) -> WandbRun:
    """Build the run of a folder in Weights & Biases; see `make_loggers`."""
    run_id, before = None, LoggedRows()
    if is_rank_zero():  # the others log nothing
        run_id = wandb_run_id(folder, settings.id)
        mend_parts(folder, run_id)
        before = logged_rows(folder, run_id)
    return WandbRun(
        before=before,
        x_axis=settings.x_axis,
        tables="tables" in settings.artifacts or settings.samples > 0,
        save_dir=folder,
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        job_type=settings.job_type or kind.job_type,
        name=shown(settings.name or kind.name),
        notes=None if settings.notes is None else shown(settings.notes),
        tags=[*map(shown, settings.tags)] or None,
        id=run_id,
        offline=wandb_is_offline(settings.mode),
        config=dict(config),
        settings=_quiet_settings(),
    )


def _quiet_settings() -> Any:
    import wandb

    return wandb.Settings(console="off", silent=True)


# ---- all of them --------------------------------------------------------------------------------
def make_loggers(
    folder: Path,
    settings: LoggerSettings,
    *,
    kind: RunKind,
    output_root: Path,
    config: Mapping[str, Any] | None = None,
) -> list[Logger]:
    """Build the loggers of the run in `folder`. After a restart they continue that folder's run.

    Online wandb appends what the server lacks. Offline each start leaves a folder of its own with
    the id of the run, and `wandb sync` sends them one after the other.

    Args:
        folder: of the run.
        settings: which loggers.
        kind: what the run is called where the settings are silent.
        output_root: where the database of MLflow is, if no other is named.
        config: nested, without credentials.

    Raises:
        InputError: a service cannot be asked, or refuses.
    """
    config = config or {}
    loggers: list[Logger] = [FileLogger(folder)]
    if settings.wandb:
        loggers.append(wandb_run(folder, settings, kind, config))
    if not is_rank_zero():
        return loggers
    if settings.tensorboard:
        from siftclip.trainer.runtime.tracking.tensorboard_runs import FOLDER, TensorBoardRun

        loggers.append(TensorBoardRun(folder / FOLDER))
    if settings.mlflow:
        loggers.append(_mlflow_run(folder, settings, kind, output_root, config))
    return loggers


def _mlflow_run(
    folder: Path,
    settings: LoggerSettings,
    kind: RunKind,
    output_root: Path,
    config: Mapping[str, Any],
) -> Logger:
    from siftclip.trainer.runtime.tracking.mlflow_runs import MlflowRun, default_uri

    uri = mlflow_uri(settings)
    tags = {
        "job_type": settings.job_type or kind.job_type,
        "group": settings.group,
        "mlflow.note.content": settings.notes,
        **dict.fromkeys(settings.tags, "true"),
    }
    return MlflowRun(
        folder,
        uri=default_uri(output_root) if uri is None else uri.reveal(),
        experiment=settings.project,
        name=shown(settings.name or kind.name),
        tags={key: shown(value) for key, value in tags.items() if value is not None},
        parameters=config,
    )


def catch_up(loggers: Sequence[Logger], records: Records) -> None:
    """Give each logger what the log of the run has, and the logger lacks."""
    for logger in loggers:
        if isinstance(logger, ContinuedLogger):
            logger.catch_up(records)


def log_tables(loggers: Sequence[Logger], tables: Mapping[str, Records], *, step: int) -> None:
    """Log tables, lists of equally keyed records, where a logger has them."""
    for logger in loggers:
        for key, records in tables.items():
            if isinstance(logger, ContinuedLogger):
                logger.log_records(key, records, step)
            elif isinstance(logger, WandbLogger) and records:
                logger.log_metrics({key: wandb_table(records)}, step=step)


def log_histograms(
    loggers: Sequence[Logger], histograms: Mapping[str, Histogram], *, step: int
) -> None:
    """Log how values are distributed, where a logger has a place for that: on the first rank."""
    for logger in loggers if is_rank_zero() else ():
        if isinstance(logger, ContinuedLogger):
            logger.log_histograms(histograms, step)
        elif isinstance(logger, WandbLogger):
            logger.log_metrics(wandb_histograms(histograms), step=step)
        elif isinstance(logger, TensorBoardLogger):
            from siftclip.trainer.runtime.tracking.tensorboard_runs import add_histograms

            add_histograms(logger.experiment, histograms, step)


def log_summary(loggers: Sequence[Logger], records: Records) -> None:
    """Set what Weights & Biases shows of a run in a table: the last value of each key of its log.

    Of a run in several parts the last one would show its own values alone.
    """
    last: dict[str, Any] = {}
    for record in records:
        last |= {key: value for key, value in record.items() if key not in ("step", "time")}
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.log_summary(last)


def finish(loggers: Sequence[Logger], *, status: str = "finished") -> None:
    """Close the loggers, so that another run of this process begins with new ones.

    Args:
        loggers: of the run.
        status: "finished", "stopped" of one that is to be continued, or "failed".
    """
    for logger in loggers:
        logger.finalize("failed" if status == "failed" else "success")
        if isinstance(logger, ContinuedLogger):
            logger.end(status)
        elif isinstance(logger, WandbLogger) and is_rank_zero():
            logger.experiment.finish()


@contextmanager
def closed_after(loggers: Sequence[Logger]) -> Iterator[None]:
    """Close the loggers after the block, as failed where it raises an error.

    A training that a signal stops has closed them itself.
    """
    try:
        yield
    except TrainingStopped:
        raise
    except Exception:
        for logger in loggers:
            with suppress(Exception):  # the error that is raised says more
                finish([logger], status="failed")
        raise
    finish(loggers)
