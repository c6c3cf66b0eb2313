"""Numbers that cannot be in what a run has written are one line of error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from siftclip.errors import InputError
from siftclip.files import append_jsonl
from siftclip.trainer.runtime.loggers import FileLogger
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.runtime.run_records import read_config, read_metrics

SUMMARY = {
    "selector": "random", "seed": 0, "steps": 6, "trained_samples": 96, "passes": 2.5,
    "loaded_samples": 96.0, "flops": 1e12, "coverage": 1.0, "train_seconds": 3.25, "later": -1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_seconds": -1}, r"train_seconds must be finite and at least 0\. Got -1"),
        ({"train_seconds": math.nan}, r"train_seconds must be finite"),
        ({"flops": math.inf}, r"flops must be finite"),
        ({"passes": "two"}, r"passes must be a number"),
        ({"coverage": 7.0}, r"coverage must be a share"),
        ({"steps": 1.5}, r"steps must be a whole number"),
        ({"seed": True}, r"seed must be a number"),
        ({"selector": 3}, r"selector must be a text"),
        ({"later": math.nan}, r"later must be finite"),
    ],
)
def test_summary(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path, run = tmp_path / "summary.json", RunDir(path=tmp_path)
    assert run.summary is None
    path.write_text(json.dumps(SUMMARY))
    assert run.summary == SUMMARY
    path.write_text(json.dumps({**SUMMARY, **changes}))
    with pytest.raises(InputError, match=rf"summary\.json cannot be: {message}"):
        _ = run.summary
    path.write_text("[]")
    with pytest.raises(InputError, match=r"summary\.json must hold a summary"):
        _ = run.summary


def test_a_summary_that_lacks_what_is_shown(tmp_path: Path) -> None:
    run = RunDir(path=tmp_path)
    run.finish(SUMMARY)
    with pytest.raises(
        InputError, match=r"summary\.json must .* but online is missing\. Delete it"
    ):
        run.cost_line()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold samples_seen and global_batch_size"),
        ('{"samples_seen": 8}', "must hold samples_seen and global_batch_size"),
        ('{"samples_seen": 8, "global_batch_size": 0}', "global_batch_size must be finite and at"),
        ('{"samples_seen": NaN, "global_batch_size": 2}', "samples_seen must be finite"),
        ('{"samples_seen": 8.5, "global_batch_size": 2}', "samples_seen must be a whole number"),
        ("{", "must be a JSON file"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_budget(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "budget.json").write_text(text)
    with pytest.raises(InputError, match=message):
        RunDir(path=tmp_path).budget()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"time": 1.0}, r"record 2, must have a step"),
        ({"step": -1}, r"record 2, cannot be: step"),
        ({"step": None}, r"record 2, cannot be: step"),
        ({"step": 2, "cost/flops": math.inf}, r"cost/flops must be finite"),
        ({"step": 2, "train/batch_time": -0.1}, r"train/batch_time must be finite and at least 0"),
        ({"step": 2, "online/share_clean": 7.0}, r"online/share_clean must be a share"),
        ({"step": 2, "train/loss": "nan"}, r"train/loss must be a number"),
        ({"step": 10**400}, r"record 2, cannot be: step must lie in"),
        ({"step": 2, "train/batch_time": 1e308}, r"train/batch_time must lie in"),
    ],
)
def test_log(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1, "train/loss": -0.5, "train/batch_time": 0.1})
    assert len(read_metrics(path)) == 1
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    for read in (RunDir(path=tmp_path).costs, RunDir(path=tmp_path).seconds):
        with pytest.raises(InputError, match=message):
            read()
    with pytest.raises(InputError, match=message):
        FileLogger(tmp_path).finalize("success")


def test_a_log_that_was_cut_off_goes_on_in_a_line_of_its_own(tmp_path: Path) -> None:
    logger = FileLogger(tmp_path)
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0 + step}, step=step)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    logger.log_metrics({"train/loss": 9.0}, step=2)
    assert [record["train/loss"] for record in read_metrics(path)] == [1.0, 2.0, 9.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", r"it has 'a' twice"),
        ("a: {b: 1, c: {d: 1, d: 2}}", r"it has 'd' twice"),
        ("a: " + "1:" * 9000 + "1", r"a value of 18001 characters without quotes"),
        ("a: &x [1]\nb: *x\n", "it has aliases"),
        ("a: !!timestamp x\n", "is not the configuration of a run"),
        ("a: !!int x\n", "is not the configuration of a run"),
        ("a: !!bool x\n", "is not the configuration of a run"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("[" * 10_000, "nested more than 100 deep"),
        ("x" * (5 << 20), r"config\.yaml has 5,242,880 bytes"),
        ("- 1", r"is not the configuration of a run: \[1\]"),
    ],
)
def test_configurations_from_elsewhere(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(path)
    path.write_bytes(b"a: \xff")
    with pytest.raises(InputError, match=r"config\.yaml must be UTF-8"):
        read_config(path)


def test_references_and_targets_stay_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN", "secret")
    path = tmp_path / "config.yaml"
    path.write_text("a: [{x: 1}, {x: 2}]\nb: ${oc.env:HIDDEN}\nc: {_target_: os.system}\n")
    assert read_config(path) == {
        "a": [{"x": 1}, {"x": 2}],
        "b": "${oc.env:HIDDEN}",
        "c": {"_target_": "os.system"},
    }
