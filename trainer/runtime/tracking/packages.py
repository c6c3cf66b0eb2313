"""Whether what the loggers need is installed: known before anything is read or imported."""

from __future__ import annotations

import importlib.util
import os

from siftclip.confidential import ConfidentialUrl
from siftclip.errors import InputError
from siftclip.trainer.settings.logger import LoggerSettings


def mlflow_uri(settings: LoggerSettings) -> ConfidentialUrl | None:
    """Return the database or server of MLflow that is named, here or in its own variable."""
    uri = settings.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return None if not uri else ConfidentialUrl(uri)


def check_packages(settings: LoggerSettings) -> None:
    """Check that the packages of the wanted loggers are installed.

    Raises:
        InputError: one is not; the message says how to install it.
    """
    needed = {"tensorboard": ["tensorboard"] if settings.tensorboard else []}
    if settings.mlflow:
        uri = mlflow_uri(settings)
        of_databases = ["sqlalchemy", "alembic"] if uri is None or "sql" in uri else []
        needed["mlflow"] = ["mlflow", *of_databases]
    for name, packages in needed.items():
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise InputError(
                    f"logger.{name} needs the package {package}, which is not installed. Install "
                    f"it with: pip install 'siftclip[{name}]'"
                )
