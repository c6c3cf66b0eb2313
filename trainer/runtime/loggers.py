"""Loggers of a run: JSONL and CSV always, wandb when asked for (offline unless logged in)."""

from __future__ import annotations

import logging
import math
import netrc
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

from siftclip.errors import InputError
from siftclip.files import append_jsonl, has_content, keep_records, write_text
from siftclip.reading import read_text
from siftclip.trainer.runtime.run_dir import METRICS_NAME, is_rank_zero
from siftclip.trainer.runtime.run_records import read_metrics
from siftclip.trainer.runtime.wandb_runs import LoggedRows, WandbRun, logged_rows
from siftclip.trainer.settings.lightning import WandbMode
from siftclip.writing import atomic_path

log = logging.getLogger(__name__)

_WANDB_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_AFTER_TRAINING = ("eval/", "selection/")  # names of what is logged when the model is written
WANDB_MODES: tuple[WandbMode, ...] = get_args(WandbMode)


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
        record = {"step": step, "time": round(time.time(), 3), **values}
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


def wandb_run_id(folder: Path) -> str:
    """Return the id of the folder's wandb run, drawn once and kept in its file `wandb_id`.

    A name alone would not do: in wandb a run that was deleted here and trained again, or one of the
    same name elsewhere, would be taken for a restart, and its curves would be mixed.
    """
    path = folder / "wandb_id"
    kept = read_text(path).strip() if has_content(path) else ""
    if _WANDB_ID.fullmatch(kept):
        return kept
    if kept:
        log.warning("%s holds no id of wandb's: the wandb run begins anew", path)
    name = re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII)[:64]
    drawn = f"{name}-{uuid.uuid4().hex[:8]}"
    write_text(path, f"{drawn}\n")
    return drawn


def make_loggers(
    folder: Path,
    *,
    name: str,
    wandb_enabled: bool,
    mode: WandbMode = "auto",
    project: str = "siftclip",
    config: Mapping[str, Any] | None = None,
) -> list[Logger]:
    """Build the loggers of the run in `folder`. After a restart wandb continues that folder's run.

    Online it appends what the server lacks. Offline each start leaves a folder of its own with the
    id of the run, and `wandb sync` sends them one after the other.
    """
    loggers: list[Logger] = [FileLogger(folder)]
    if wandb_enabled:
        offline, run_id, before = wandb_is_offline(mode), None, LoggedRows()
        if is_rank_zero():  # the others log nothing
            run_id = wandb_run_id(folder)
            before = logged_rows(folder, run_id)
        wandb = WandbRun(
            before=before,
            save_dir=folder,
            project=project,
            name=name,
            id=run_id,
            offline=offline,
            config=dict(config or {}),
            settings=_quiet_settings(),
        )
        if before.parts:
            wandb.catch_up(read_metrics(folder / METRICS_NAME))
        loggers.append(wandb)
    return loggers


def _quiet_settings() -> Any:
    import wandb

    return wandb.Settings(console="off", silent=True)


def log_tables(
    loggers: list[Logger], tables: Mapping[str, list[dict[str, Any]]], *, step: int
) -> None:
    """Send tables, lists of equally keyed records, to wandb; the other loggers have no tables."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            for key, records in tables.items():
                if not records:
                    continue
                columns = list(records[0])
                rows = [[record[column] for column in columns] for record in records]
                logger.log_table(key=key, columns=columns, data=rows, step=step)


def finish(loggers: list[Logger]) -> None:
    """Close the loggers, so that another run of this process starts a new wandb run."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger) and is_rank_zero():
            logger.experiment.finish()
