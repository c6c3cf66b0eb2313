"""wandb, read back from a real offline run, and the files that are always written."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import DictConfig
from tracked_runs import wait_for_another_second
from wandb_offline import read_part, read_parts, wait_until_written

from siftclip.errors import InputError
from siftclip.files import read_jsonl
from siftclip.redaction import remember
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.loggers import (
    FileLogger,
    RunKind,
    catch_up,
    drop_repeated,
    finish,
    make_loggers,
    wandb_is_offline,
    wandb_run_id,
)
from siftclip.trainer.settings.logger import LoggerSettings
from siftclip.trainer.stages.train import train_stage


def test_offline_run_holds_metrics_config_statistics_and_tables(
    base: list[str],
    compose: Callable[..., DictConfig],
    demo_data: DemoData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["logger=wandb", f"eval.root={demo_data.tasks}", "eval.during.every_n_steps=3"]
    options.append("logger.artifacts=[tables]")
    run = train_stage(compose("train", [*base, *options]))
    (part,) = read_parts(run.path)
    keys = {key for record in part.rows for key in record}
    assert {
        "train/loss",
        "train/contrastive_loss",
        "train/lr",
        "train/scale",
        "train/data_time",
        "train/batch_time",
        "train/samples_per_second",
        "train/samples_per_second_per_gpu",
        "selection/samples",
        "selection/coverage",
        "selection/score_q50",
        "eval_during/digit",
        "eval_during/retrieval",
        "eval/digit/acc1",
        "eval/retrieval/mean_recall@1",
        "eval/tasks/path",
    } <= keys
    assert part.steps_with("train/loss") == [1, 2, 3, 4, 5, 6]
    assert part.config["selector"]["fraction"] == 0.3
    assert part.config["scale"]["samples_seen"] == 96
    content = part.table("eval/tasks")
    assert content["columns"][:5] == ["task", "title", "family", "metric", "value"]
    assert {row[0] for row in content["data"]} == {"digit", "colour", "count", "retrieval"}


def log_steps(folder: Path, steps: list[int], *, continued_at: int) -> None:
    """What a start of a run does, without training."""
    drop_repeated(folder, step=continued_at)
    loggers = make_loggers(
        folder,
        LoggerSettings(mode="offline"),
        kind=RunKind(name="a run", job_type="train"),
        output_root=folder,
    )
    catch_up(loggers, read_jsonl(folder / "metrics.jsonl"))
    for step in steps:
        for logger in loggers:
            logger.log_metrics({"train/loss": 10.0 - step}, step=step)
            if step % 2 == 0:
                logger.log_metrics({"eval_during/digit": 0.5}, step=step)
    finish(loggers)
    wait_until_written(max(folder.glob("wandb/offline-run-*/*.wandb")))


def rows_of(folder: Path) -> list[list[dict[str, Any]]]:
    """The rows of all parts of the run in a folder, in the order of their starts."""
    return [part.rows for part in read_parts(folder)]


def steps_with(key: str, rows: list[dict[str, Any]]) -> list[int]:
    return [row["trainer/global_step"] for row in rows if key in row]


def test_a_restart_continues_the_wandb_run(tmp_path: Path) -> None:
    """Offline folders with one id, in the order of their start, which `wandb sync` joins."""
    for steps, at in (([1, 2, 3], 0), ([3, 4], 2), ([4, 5], 3), ([6], 5)):
        log_steps(tmp_path, steps, continued_at=at)
        wait_for_another_second()
    parts = rows_of(tmp_path)
    assert [steps_with("train/loss", part) for part in parts] == [[1, 2, 3], [4], [5], [6]]
    assert [steps_with("eval_during/digit", part) for part in parts] == [[2], [4], [], [6]]
    assert [row["_step"] for part in parts for row in part] == list(range(9))
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "eval_during/digit" in r] == [2, 4, 6]


@pytest.mark.parametrize("kept_rows", [0, 1, 3])
@pytest.mark.parametrize("tail", [b"", bytes(500)])
def test_rows_that_a_part_has_lost_are_in_the_next_one(
    tmp_path: Path, kept_rows: int, tail: bytes
) -> None:
    """A part is cut in the middle of a row, as by a kill or a power cut."""
    log_steps(tmp_path, [1, 2, 3], continued_at=0)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    whole = path.read_bytes()
    ends = [match.end() for match in re.finditer(b"trainer/global_step", whole)]
    for end in ends:
        path.write_bytes(whole[:end] + tail)
        if len(read_part(path).rows) == kept_rows:
            break
    assert len(read_part(path).rows) == kept_rows
    wait_for_another_second()
    log_steps(tmp_path, [4], continued_at=3)
    rows = [row for part in rows_of(tmp_path) for row in part]
    assert steps_with("train/loss", rows) == [1, 2, 3, 4]
    assert steps_with("eval_during/digit", rows) == [2, 4]
    assert [row["_step"] for row in rows] == list(range(6))


def test_a_command_line_in_wandbs_files_has_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a script of one's own, too, whose words are what they are."""
    words = [
        "train.py",
        "pool.root=https://me:hunter22@example.org/pool",
        "--key",
        "s3cr3t-of-mine",
    ]
    remember("s3cr3t-of-mine")
    monkeypatch.setattr(sys, "argv", words)
    log_steps(tmp_path, [1], continued_at=0)
    assert sys.argv == words
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"example.org" in path.read_bytes() for path in files)
    for secret in (b"hunter22", b"s3cr3t-of-mine"):
        assert not [path for path in files if secret in path.read_bytes()]


def test_ids_of_wandb_runs(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "50 %: über#1"]
    ids = [wandb_run_id(folder) for folder in folders]
    assert [wandb_run_id(folder) for folder in folders] == ids
    assert len({*ids}) == 3
    assert ids[0].startswith("run-")
    for one in ids:
        assert re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", one)


def test_offline_unless_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_is_offline("auto")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert not wandb_is_offline("auto")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_is_offline("auto")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert not wandb_is_offline("auto")
    assert wandb_is_offline("offline")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_is_offline("auto")
    assert not wandb_is_offline("online")
    with pytest.raises(InputError, match=r"logger\.mode must be one of .*Got 'on'"):
        wandb_is_offline("on")


def test_table_keeps_what_was_logged_before_a_restart(tmp_path: Path) -> None:
    first = FileLogger(tmp_path)
    first.log_metrics({"train/loss": 3.0}, step=1)
    first.log_metrics({"train/loss": 2.5}, step=2)
    second = FileLogger(tmp_path)
    second.log_metrics({"train/loss": 2.0}, step=2)
    second.log_metrics({"eval/digit/acc1": 0.5}, step=2)
    second.finalize("success")
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["step"].tolist() == [1, 2]
    assert table["train/loss"].tolist() == [3.0, 2.0]
    assert table["eval/digit/acc1"].iloc[1] == 0.5
