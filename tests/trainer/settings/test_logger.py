"""Options of the loggers."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from siftclip.errors import InputError
from siftclip.trainer.runtime.tracking.packages import check_packages, mlflow_uri
from siftclip.trainer.settings.logger import LoggerSettings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"project": "a/b"}, r"logger\.project must be a name .* Got 'a/b'"),
        ({"entity": "my team"}, r"logger\.entity must be the name of a user or a team.*'my team'"),
        ({"group": ""}, r"logger\.group must be one line of 1 to 128 characters\. Got ''"),
        ({"job_type": "x" * 129}, r"logger\.job_type must be one line of 1 to 128"),
        ({"name": "a\x1b[31mb"}, r"logger\.name must be one line"),
        ({"id": "a b"}, r"logger\.id must consist of 1 to 128 letters, .* Got 'a b'"),
        ({"tags": ["good", "x" * 65]}, r"logger\.tags must each be one line of 1 to 64"),
        ({"x_axis": "epochs"}, r"logger\.x_axis must be one of"),
        (
            {"artifacts": ["pool"]},
            r"logger\.artifacts must be a list of some of \[selection, model",
        ),
        (
            {"mlflow_uri": "/data/mlruns"},
            r"logger\.mlflow_uri must be the address .*'/data/mlruns'",
        ),
        ({"samples": -1}, r"logger\.samples must be an integer of at least 0"),
        ({"gradients_every_n_steps": 0}, r"logger\.gradients_every_n_steps must be an integer"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoggerSettings(**options)


def test_a_run_of_a_comparison_has_its_group_and_a_name_of_its_own() -> None:
    plain = LoggerSettings().of_arm("c1", arm="clip_score", seed=2)
    assert (plain.group, plain.name, plain.job_type) == ("c1", "clip_score-s2", None)
    given = LoggerSettings(group="all", name="vit", tags=("a",)).of_arm("c1", arm="half", seed=0)
    assert (given.group, given.name, given.tags) == ("all", "vit-half-s0", ("a",))
    long = LoggerSettings().of_arm("c" * 200, arm="a" * 200, seed=0)
    assert len(str(long.group)) == len(str(long.name)) == 128
    with pytest.raises(InputError, match=r"logger\.id names a single run.*logger\.group"):
        LoggerSettings(id="x").of_arm("c1", arm="half", seed=0)


def test_passwords_in_the_address_of_mlflow_are_hidden() -> None:
    settings = LoggerSettings(mlflow_uri="https://me:hunter22@example.org/mlflow")
    assert "hunter22" not in repr(settings)
    assert settings.mlflow_uri is not None


@pytest.mark.parametrize(
    ("options", "missing", "extra"),
    [
        ({"tensorboard": True}, "tensorboard", "tensorboard"),
        ({"mlflow": True}, "mlflow", "mlflow"),
        ({"mlflow": True}, "alembic", "mlflow"),
        ({"mlflow": True, "mlflow_uri": "postgresql://host/db"}, "sqlalchemy", "mlflow"),
    ],
)
def test_a_missing_package_is_told_with_what_to_install(
    options: dict[str, Any], missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str) -> object:
        return None if name == missing else object()

    monkeypatch.setattr(importlib.util, "find_spec", without)
    message = rf"logger\.{extra} needs the package {missing}, .*pip install 'siftclip\[{extra}\]'$"
    with pytest.raises(InputError, match=message):
        check_packages(LoggerSettings(**options))
    check_packages(LoggerSettings())


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_mlflows_own_variable_counts_where_nothing_else_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert mlflow_uri(LoggerSettings()) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter22@example.org")
    found = mlflow_uri(LoggerSettings())
    assert found is not None
    assert (found.reveal(), "hunter22" in found) == ("https://me:hunter22@example.org", False)
    given = mlflow_uri(LoggerSettings(mlflow_uri="sqlite:///x.db"))
    assert given == "sqlite:///x.db"


def test_a_server_of_mlflow_needs_no_database_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "mlflow" or None)
    check_packages(LoggerSettings(mlflow=True, mlflow_uri="https://example.org"))
