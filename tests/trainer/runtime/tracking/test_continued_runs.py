"""Runs of TensorBoard, MLflow and wandb that continue: each value of a step once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tracked_runs import (
    Curves,
    mlflow_client,
    mlflow_curves,
    tensorboard_curves,
    wait_for_another_second,
)
from wandb_offline import has_whole_records, read_parts, record_ends

from siftclip.errors import InputError
from siftclip.files import read_jsonl
from siftclip.trainer.runtime.loggers import (
    RunKind,
    catch_up,
    closed_after,
    drop_repeated,
    finish,
    log_tables,
    make_loggers,
)
from siftclip.trainer.runtime.tracking.mlflow_runs import default_uri, mlflow_key
from siftclip.trainer.settings.logger import LoggerSettings

TASKS = [{"task": "digit", "note": "a | b"}]


def log_steps(
    folder: Path,
    settings: LoggerSettings,
    steps: list[int],
    *,
    continued_at: int = 0,
    status: str | None = "finished",
    config: dict[str, Any] | None = None,
) -> None:
    """What a start of a run does, without training; with no status it is killed at its end."""
    drop_repeated(folder, step=continued_at)
    kind = RunKind(name="a run", job_type="train")
    loggers = make_loggers(folder, settings, kind=kind, output_root=folder, config=config)
    for logger in loggers[1:]:
        logger.log_metrics({"selection/samples": 9.0}, step=0)
    log_tables(loggers, {"selection/scores": TASKS}, step=0)
    catch_up(loggers, read_jsonl(folder / "metrics.jsonl"))
    for step in steps:
        for logger in loggers:
            window = {"train/loss": 10.0 - step, "train/batch_time": 0.5}
            logger.log_metrics({**window, "train/samples_seen": 16.0 * step}, step=step)
            if step % 2 == 0:
                logger.log_metrics({"eval_during/digit@1": 0.5}, step=step)
    if status is not None:
        finish(loggers, status=status)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a database of MLflow, whose tables take seconds to make."""
    uri = default_uri(tmp_path_factory.mktemp("mlflow"))
    mlflow_client(uri)
    return uri


@pytest.fixture(params=["tensorboard", "mlflow"])
def tracker(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[LoggerSettings, Callable[[], Curves]]]:
    """Settings of a logger, and what reads its curves."""
    if request.param == "tensorboard":
        pytest.importorskip("tensorboard", reason="siftclip[tensorboard] is not installed")
        settings = LoggerSettings(wandb=False, tensorboard=True)
        yield settings, lambda: tensorboard_curves(tmp_path / "tensorboard")
        return
    uri = request.getfixturevalue("database")
    settings = LoggerSettings(wandb=False, mlflow=True, mlflow_uri=uri, project=tmp_path.name)
    yield settings, lambda: mlflow_curves(uri, (tmp_path / "mlflow_id").read_text().strip())


def test_a_restart_continues_the_run(
    tmp_path: Path, tracker: tuple[LoggerSettings, Callable[[], Curves]]
) -> None:
    """Steps are repeated, one is lost, and the last start only looks at what there is."""
    settings, curves = tracker
    for steps, at, status in (
        ([1, 2, 3], 0, None),
        ([3, 4], 2, "stopped"),
        ([4, 5], 3, None),
        ([6], 5, "finished"),
        ([], 6, "finished"),
    ):
        log_steps(tmp_path, settings, steps, continued_at=at, status=status)
    found = curves()
    assert found["train/loss"] == [(step, 10.0 - step) for step in range(1, 7)]
    key = mlflow_key("eval_during/digit@1") if settings.mlflow else "eval_during/digit@1"
    assert found[key] == [(2, 0.5), (4, 0.5), (6, 0.5)]
    assert found["selection/samples"] == [(0, 9.0)]
    assert found["samples"] == [(step, 16.0 * step) for step in range(1, 7)]
    assert found["seconds"] == [(step, 0.5 * step) for step in range(1, 7)]


def test_a_logger_that_comes_later_gets_the_whole_log(
    tmp_path: Path, tracker: tuple[LoggerSettings, Callable[[], Curves]]
) -> None:
    settings, curves = tracker
    log_steps(tmp_path, LoggerSettings(wandb=False), [1, 2, 3])
    log_steps(tmp_path, settings, [4], continued_at=3)
    assert curves()["train/loss"] == [(step, 10.0 - step) for step in range(1, 5)]


def test_wandb_that_comes_later_gets_the_whole_log(tmp_path: Path) -> None:
    log_steps(tmp_path, LoggerSettings(wandb=False), [1, 2, 3])
    log_steps(tmp_path, LoggerSettings(mode="offline"), [4], continued_at=3)
    (part,) = read_parts(tmp_path)
    assert part.steps_with("train/loss") == [1, 2, 3, 4]
    assert [row["seconds"] for row in part.rows if "train/loss" in row] == [0.5, 1, 1.5, 2]
    assert part.rows[0]["selection/samples"] == 9
    assert part.artifacts == []  # a server that takes no artifact gets all numbers


def test_wandb_says_that_a_stopped_run_is_not_finished(tmp_path: Path) -> None:
    settings = LoggerSettings(mode="offline", artifacts=("tables",))
    log_steps(tmp_path, settings, [1], status="stopped")
    wait_for_another_second()
    log_steps(tmp_path, settings, [2], continued_at=1)
    parts = read_parts(tmp_path)
    assert [part.exit_code for part in parts] == [1, 0]
    assert [len(part.artifacts) for part in parts] == [1, 0]  # the table


@pytest.mark.parametrize("kept_bytes", [0, 7, 40, -1, -30, -700])
def test_parts_that_a_kill_has_cut_are_mended(tmp_path: Path, kept_bytes: int) -> None:
    """`wandb sync` stops at one that is cut, or has not begun, and sends no later one."""
    settings = LoggerSettings(mode="offline")
    log_steps(tmp_path, settings, [1, 2, 3])
    (first,) = read_parts(tmp_path)
    whole = first.path.read_bytes()
    first.path.write_bytes(whole[:kept_bytes])
    wait_for_another_second()
    log_steps(tmp_path, settings, [4], continued_at=3)
    parts = read_parts(tmp_path)
    rows = [row for part in parts for row in part.rows]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [9, 8, 7, 6]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert all(part.run is not None and has_whole_records(part.path) for part in parts)
    if kept_bytes < 0:
        assert whole.startswith(first.path.read_bytes())
    else:
        assert len(parts) == 1
        assert len([*tmp_path.glob("wandb/empty-offline-run-*")]) == 1


def test_what_wandb_still_writes_of_a_killed_process_is_not_there_twice(tmp_path: Path) -> None:
    """Its own process outlives the one that was killed; the next start logs these rows again."""
    settings = LoggerSettings(mode="offline")
    log_steps(tmp_path, settings, [1, 2, 3])
    (part,) = read_parts(tmp_path)
    whole = part.path.read_bytes()
    written = [end for end in record_ends(part.path) if end < 0.8 * len(whole)][-1]
    with part.path.open("r+b") as of_wandb:
        of_wandb.truncate(written)
        of_wandb.seek(written)
        wait_for_another_second()
        log_steps(tmp_path, settings, [4], continued_at=3)
        of_wandb.write(whole[written:])
    rows = [row for part in read_parts(tmp_path) for row in part.rows]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [9, 8, 7, 6]
    assert [row["_step"] for row in rows] == list(range(len(rows)))


# ---- TensorBoard --------------------------------------------------------------------------------
@pytest.mark.parametrize("lost_bytes", [1, 60, 400])
def test_what_an_event_file_has_lost_is_in_the_next_one(tmp_path: Path, lost_bytes: int) -> None:
    pytest.importorskip("tensorboard", reason="siftclip[tensorboard] is not installed")
    settings = LoggerSettings(wandb=False, tensorboard=True)
    log_steps(tmp_path, settings, [1, 2, 3])
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    wait_for_another_second()
    log_steps(tmp_path, settings, [4], continued_at=3)
    found = tensorboard_curves(tmp_path / "tensorboard")
    assert found["train/loss"] == [(step, 10.0 - step) for step in range(1, 5)]
    assert found["eval_during/digit@1"] == [(2, 0.5), (4, 0.5)]


@pytest.mark.parametrize("content", [b"", b"\xff" * 400, bytes(400)])
def test_damaged_event_files_count_as_far_as_they_are_whole(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard", reason="siftclip[tensorboard] is not installed")
    place = tmp_path / "tensorboard"
    place.mkdir()
    (place / "events.out.tfevents.0.x").write_bytes(content)
    (place / "events.out.tfevents.1.x").mkdir()
    log_steps(tmp_path, LoggerSettings(wandb=False, tensorboard=True), [1])
    assert "events.out.tfevents.1.x counts as far as it is whole" in caplog.text
    (place / "events.out.tfevents.1.x").rmdir()
    assert tensorboard_curves(place)["train/loss"] == [(1, 9.0)]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="siftclip[tensorboard] is not installed")
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(InputError, match=r"tensorboard.* cannot be written"):
        log_steps(tmp_path, LoggerSettings(wandb=False, tensorboard=True), [1])


# ---- runs that fail -----------------------------------------------------------------------------
def test_a_run_that_fails_is_closed(database: str, tmp_path: Path) -> None:
    """As failed; another run of the same process is a run of its own."""
    found = {}
    for name in ("first", "second"):
        settings = LoggerSettings(
            mode="offline", mlflow=True, mlflow_uri=database, project=tmp_path.name
        )
        folder, kind = tmp_path / name, RunKind(name=name, job_type="train")
        loggers = make_loggers(folder, settings, kind=kind, output_root=folder, config={})
        fails = pytest.raises(OSError, match=name) if name == "first" else nullcontext()
        with fails, closed_after(loggers):
            loggers[1].log_metrics({"train/loss": 1.0}, step=1)
            if name == "first":
                raise OSError(name)
        (part,) = read_parts(folder)
        run_id = (folder / "mlflow_id").read_text().strip()
        status = mlflow_client(database).get_run(run_id).info.status
        found[part.run.display_name] = part.exit_code, status
    assert found == {"first": (1, "FAILED"), "second": (0, "FINISHED")}


# ---- MLflow -------------------------------------------------------------------------------------
def mlflow_settings(database: str, tmp_path: Path, **options: Any) -> LoggerSettings:
    return LoggerSettings(
        wandb=False, mlflow=True, mlflow_uri=database, project=tmp_path.name, **options
    )


def test_parameters_are_those_that_the_run_began_with(database: str, tmp_path: Path) -> None:
    """MLflow refuses to change one, and other devices make no other run."""
    settings = mlflow_settings(database, tmp_path)
    log_steps(tmp_path, settings, [1], config={"trainer": {"devices": 1}}, status="stopped")
    run_id = (tmp_path / "mlflow_id").read_text().strip()
    client = mlflow_client(database)
    assert client.get_run(run_id).info.status == "KILLED"
    log_steps(tmp_path, settings, [2], continued_at=1, config={"trainer": {"devices": 2}})
    run = client.get_run(run_id)
    assert (run.data.params, run.info.status) == ({"trainer.devices": "1"}, "FINISHED")


@pytest.mark.parametrize("kept", ["no such run", "0" * 32, "deleted"])
def test_a_run_that_mlflow_has_lost_begins_anew(
    database: str, tmp_path: Path, kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = mlflow_settings(database, tmp_path)
    log_steps(tmp_path, settings, [1, 2])
    client = mlflow_client(database)
    if kept == "deleted":
        kept = (tmp_path / "mlflow_id").read_text().strip()
        client.delete_run(kept)
    (tmp_path / "mlflow_id").write_text(kept)
    log_steps(tmp_path, settings, [3], continued_at=2)
    assert "names no run that MLflow has" in caplog.text
    run_id = (tmp_path / "mlflow_id").read_text().strip()
    assert run_id != kept
    assert mlflow_curves(database, run_id)["train/loss"] == [(n, 10.0 - n) for n in (1, 2, 3)]


def test_a_deleted_experiment_is_told(database: str, tmp_path: Path) -> None:
    client = mlflow_client(database)
    client.delete_experiment(client.create_experiment(tmp_path.name))
    with pytest.raises(InputError, match=r"logger\.project=.* was deleted\. Restore it, or"):
        log_steps(tmp_path, mlflow_settings(database, tmp_path), [1])


def test_what_mlflow_refuses_is_told_without_passwords(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="siftclip[mlflow] is not installed")
    settings = LoggerSettings(
        wandb=False, mlflow=True, mlflow_uri=f"nosuch://me:hunter22@{tmp_path}"
    )
    with pytest.raises(InputError, match=r"^logger\.mlflow: MLflow cannot log: ") as caught:
        log_steps(tmp_path, settings, [1])
    assert "logger.mlflow=false trains without it" in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_mlflow_says_nothing_of_what_it_does(
    database: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither on the terminal nor to its makers."""
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    log_steps(tmp_path, mlflow_settings(database, tmp_path), [1])
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("mlflow").level == logging.WARNING
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
