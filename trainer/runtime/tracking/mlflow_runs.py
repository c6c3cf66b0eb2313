"""An MLflow run that continues: each value of a step once, over any number of starts.

Its id is kept in the file `mlflow_id` of the run's folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time as clock
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from PIL import Image

from siftclip.errors import InputError
from siftclip.files import has_content, write_text
from siftclip.locks import lock_beside, locked
from siftclip.reading import in_one_line, read_text
from siftclip.redaction import redact
from siftclip.trainer.runtime.tracking.continued import LastSteps, Records, ScalarLogger
from siftclip.trainer.runtime.tracking.metric_names import Axes
from siftclip.writing import make_folder

log = logging.getLogger(__name__)

ID_NAME = "mlflow_id"
_SQLITE = "sqlite:///"
_MLFLOW_ID = re.compile(r"[0-9a-zA-Z][\w-]{0,255}", re.ASCII)
_NO_KEY = re.compile(r"[^\w/. :-]", re.ASCII)  # what its keys cannot have, such as @
_MOST_METRICS, _MOST_PARAMETERS = 1000, 100  # of one request
_MOST_CHARACTERS, _MOST_KEY_CHARACTERS = 6000, 250  # of a parameter
_ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowRun(ScalarLogger, MLFlowLogger):
    """Lightning's logger, for a run of which earlier starts may have logged a part."""

    def __init__(
        self,
        folder: Path,
        *,
        uri: str,
        experiment: str,
        name: str,
        tags: Mapping[str, str],
        parameters: Mapping[str, Any],
    ) -> None:
        """Begin the run of a folder, or continue it.

        Args:
            folder: of the run.
            uri: of the database or the server.
            experiment: that it belongs to.
            name: of the run.
            tags: of the run.
            parameters: nested; a run that continues keeps those that it began with.

        Raises:
            InputError: MLflow cannot be asked, or refuses.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing but the run is sent
        with _told(), _alone(uri):
            _quiet()
            super().__init__(experiment, tracking_uri=uri, run_name=name)
            client = self._mlflow_client
            self._run_id = _kept_run(client, folder)
            if self._run_id is None:
                self._experiment_id = _experiment_of(client, experiment, uri)
                self._run_id = _new_run(
                    client, self._experiment_id, name=name, tags=tags, parameters=parameters
                )
                write_text(folder / ID_NAME, f"{self._run_id}\n")
            else:
                client.update_run(self._run_id, status="RUNNING")
                self._experiment_id = client.get_run(self._run_id).info.experiment_id
            self._initialized = True
            self.before = _logged_metrics(client, str(self._run_id))
        self.axes = Axes()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The client of MLflow. Unlike Lightning's, it leaves the process's own address alone."""
        return self._mlflow_client

    @rank_zero_only
    def log_metrics(
        self, metrics: Mapping[str, Any], step: int | None = None, *, time: float | None = None
    ) -> None:
        super().log_metrics(
            {mlflow_key(key): value for key, value in metrics.items()}, step, time=time
        )

    @rank_zero_only
    def write_scalars(self, values: Mapping[str, float], step: int, time: float | None) -> None:
        from mlflow.entities import Metric

        at = int(1000 * (clock.time() if time is None else time))
        metrics = [Metric(key, float(value), at, step) for key, value in values.items()]
        with _told():
            for start in range(0, len(metrics), _MOST_METRICS):
                part = metrics[start : start + _MOST_METRICS]
                self._mlflow_client.log_batch(self._run_id, metrics=part)

    @rank_zero_only
    def log_records(self, key: str, records: Records, step: int) -> None:
        """Keep a table as a file of the run, and its images beside it; a later one replaces it."""
        if not records:
            return
        place = mlflow_key(key)
        rows = [
            [f"{place}/{name}_{number}.png" if _is_image(value) else value
             for name, value in record.items()]
            for number, record in enumerate(records)
        ]  # fmt: skip
        with _told():
            client, run_id = self._mlflow_client, self._run_id
            for number, record in enumerate(records):
                for name, value in record.items():
                    if _is_image(value):
                        client.log_image(run_id, value, f"{place}/{name}_{number}.png")
            client.log_dict(run_id, {"columns": list(records[0]), "data": rows}, f"{place}.json")

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Leave the run open: what follows training is logged into it, too."""

    @rank_zero_only
    def end(self, status: str) -> None:
        with _told():
            self._mlflow_client.set_terminated(self._run_id, _ENDS[status])


def mlflow_key(key: str) -> str:
    """Return the key that MLflow has for a metric: with _ for what it does not take, such as @."""
    return _NO_KEY.sub("_", key)[:_MOST_KEY_CHARACTERS]


def default_uri(folder: Path) -> str:
    """Return the address of the database in a folder."""
    return f"{_SQLITE}{folder.absolute() / 'mlflow.db'}"


def _kept_run(client: Any, folder: Path) -> str | None:
    """Return the id of the folder's run, if MLflow has it."""
    from mlflow.exceptions import MlflowException

    path = folder / ID_NAME
    kept = read_text(path).strip() if has_content(path) else ""
    if not kept:
        return None
    try:
        if _MLFLOW_ID.fullmatch(kept) and client.get_run(kept).info.lifecycle_stage == "active":
            return kept
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    log.warning("%s names no run that MLflow has: the MLflow run begins anew", path)
    return None


def _experiment_of(client: Any, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "active":
            return str(found.experiment_id)
        raise InputError(
            f"logger.project={name}: this experiment of MLflow was deleted. Restore it, or choose "
            "another name."
        )
    place = None  # else MLflow keeps files of a local run in the folder where it was typed
    if uri.startswith(_SQLITE):
        place = (_database(uri).parent / "mlruns").as_uri()
    return str(client.create_experiment(name, artifact_location=place))


def _new_run(
    client: Any,
    experiment: str,
    *,
    name: str,
    tags: Mapping[str, str],
    parameters: Mapping[str, Any],
) -> str:
    from mlflow.entities import Param

    named = {mlflow_key(key): value for key, value in tags.items()}
    run = client.create_run(experiment, run_name=name, tags=named)
    listed = [
        Param(mlflow_key(key), value[:_MOST_CHARACTERS]) for key, value in _flat(parameters).items()
    ]
    for start in range(0, len(listed), _MOST_PARAMETERS):
        client.log_batch(run.info.run_id, params=listed[start : start + _MOST_PARAMETERS])
    return str(run.info.run_id)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the values of a nested configuration as texts, by dotted names."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _logged_metrics(client: Any, run_id: str) -> LastSteps:
    """Ask for the last step of each metric of a run."""
    last = LastSteps()
    for key in client.get_run(run_id).data.metrics:
        last.add(key, max(metric.step for metric in client.get_metric_history(run_id, key)))
    return last


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image)


def _alone(uri: str) -> AbstractContextManager[None]:
    """Let one process at a time make the tables of a database, which takes seconds."""
    if not uri.startswith(_SQLITE):
        return nullcontext()
    path = _database(uri)
    make_folder(path.parent)
    return locked(lock_beside(path), owner=f"The database {path}", wait=True)


def _database(uri: str) -> Path:
    """Return the file of an address of SQLite, without options behind it."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]).absolute()


def _quiet() -> None:
    """Keep MLflow and its migrations from explaining every step."""
    import mlflow  # noqa: F401 - sets its own level

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def _told() -> Iterator[None]:
    """Tell faults of MLflow, its database or its server as faults of the option."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of MLflow, SQLAlchemy, requests, or the operating system
        raise InputError(
            f"logger.mlflow: MLflow cannot log: {type(error).__name__}: "
            f"{redact(in_one_line(error))}. logger.mlflow=false trains without it; once it works, "
            "the same command continues."
        ) from error
