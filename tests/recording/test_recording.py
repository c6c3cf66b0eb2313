"""What Siftclip answers is what it answered before; if not, the difference is read and recorded.

`make record` records anew; the diff of the files beside this one is what a change means for users.
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CLOSE = 1e-3  # relative: after some steps on another processor, or with other versions
# The same of a run that chooses by a text tower of width 2: layer norm leaves only the signs of two
# numbers, so that captions are as good as equal, and another rounding chooses another one of them.
CLOSE_IN_TIES = 2e-2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(python_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this code answers on this machine."""
    folder, printed = (tmp_path_factory.mktemp(name) for name in ("recorded", "printed"))
    words = (str(HERE / "record.py"), str(folder))
    result = python_server.run(*words, cwd=folder, folder=printed, env=dict(os.environ))
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def now(folder: Path) -> dict[str, Any]:
    return read(folder)


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    """What is recorded."""
    return read(HERE)


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "behaviour.json").read_text(encoding="utf-8"))
    return found


def losses(record: dict[str, Any]) -> list[float]:
    return [float.fromhex(value) for value in record["losses"].values()]


def test_what_an_earlier_commit_kept_is_reused(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now["reused"] == before["reused"]
    for command, lines in now["reused"].items():
        assert any("reused" in line for line in lines), command
        assert not any("not reused" in line for line in lines), command


def test_names_and_choices_of_selectors(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert list(now["selectors"]) == list(before["selectors"])
    for name, record in now["selectors"].items():
        for part in ("selection", "kept_samples", "kept"):
            assert record[part] == before["selectors"][name][part], (name, part)
        assert list(record["scores"]) == list(before["selectors"][name]["scores"]), name


def test_scores_of_selectors(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name, record in now["selectors"].items():
        earlier = before["selectors"][name]
        # what negCLIPLoss keeps is of 8-bit products first, where a processor has them
        if "negclip" in name and now["machine"]["int8"] != before["machine"]["int8"]:
            continue
        assert record["first_scores"] == pytest.approx(
            earlier["first_scores"], abs=1e-5, nan_ok=True
        ), name
        if now["machine"] == before["machine"]:
            assert record["scores"] == earlier["scores"], name


def test_runs(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert list(now["runs"]) == list(before["runs"])
    for name, record in now["runs"].items():
        earlier = before["runs"][name]
        for part in ("folder", "files", "log_names"):
            assert record[part] == earlier[part], (name, part)
        assert losses(record) == pytest.approx(losses(earlier), rel=CLOSE), name
        if now["machine"] == before["machine"]:
            assert record == earlier, name


def test_a_run_that_an_earlier_commit_left_killed_goes_on(
    now: dict[str, Any], before: dict[str, Any]
) -> None:
    record, earlier = now["continued"], before["continued"]
    assert record["kept"] == ["step-8.ckpt"]
    assert record["says"] == earlier["says"]
    assert list(record["losses"]) == [str(step) for step in range(1, 21)]
    assert losses(record)[:12] == pytest.approx(losses(earlier)[:12], rel=CLOSE)
    assert losses(record) == pytest.approx(losses(earlier), rel=CLOSE_IN_TIES)
    if now["machine"] == before["machine"]:
        assert record == earlier


def test_results_of_tasks(now: dict[str, Any], before: dict[str, Any]) -> None:
    for result, earlier in zip(now["eval"], before["eval"], strict=True):
        assert list(result["metrics"]) == list(earlier["metrics"])
        values = ("metrics", "interval")  # of ties, see above
        assert [x for x in result.items() if x[0] not in values] == [
            x for x in earlier.items() if x[0] not in values
        ]
        if now["machine"] == before["machine"]:
            assert result == earlier


def test_configurations_of_commands(folder: Path) -> None:
    found = {path.name: path.read_text() for path in (folder / "commands").iterdir()}
    recorded = {path.name: path.read_text() for path in (HERE / "commands").iterdir()}
    assert found == recorded


def test_files_of_the_wheel(folder: Path) -> None:
    assert (folder / "wheel.txt").read_text() == (HERE / "wheel.txt").read_text()


def test_every_selector_is_recorded_or_cannot_be(before: dict[str, Any]) -> None:
    configs = {path.stem for path in (HERE.parents[1] / "configs" / "selector").glob("*.yaml")}
    not_alone = runpy.run_path(str(HERE / "record.py"))["NOT_ALONE"]
    assert {*before["selectors"], *not_alone} == configs
