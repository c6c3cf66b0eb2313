"""Loggers of the user's: what they get, and how their faults are told."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger

from siftclip.errors import InputError
from siftclip.trainer.runtime.tracking.own_loggers import adapted
from siftclip.trainer.stages.train import train_stage

CSV = "lightning.pytorch.loggers.CSVLogger"


class Failing(Logger):
    """Fails in each of its methods."""

    name, version = "x", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise OSError(28, "No space left on device")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        raise KeyError("x")

    def finalize(self, status: str) -> None:
        raise RuntimeError("two\nlines")


def test_a_logger_stays_what_it_is(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    (found,) = adapted([logger], [])
    assert found is logger
    assert isinstance(found, CSVLogger)


def test_axes_continue_from_the_log(tmp_path: Path) -> None:
    log = [{"step": step, **window(step)} for step in (1, 2, 3)]
    (logger,) = adapted([CSVLogger(tmp_path)], log)
    logger.log_metrics(window(4), step=4)
    logger.log_metrics({"eval/imagenet1k/acc1": 0.5}, step=4)
    logger.save()
    (path,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["samples"], row["seconds"]) for row in rows] == [("64.0", "2.0")] * 2
    assert rows[1]["val/imagenet-zeroshot-val-top1"] == "0.5"


def window(step: int) -> dict[str, float]:
    return {"train/batch_time": 0.5, "train/samples_seen": 16.0 * step}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda logger: logger.log_metrics({}, step=1), "OSError: .*No space left on device"),
        (lambda logger: logger.log_hyperparams({}), "KeyError: 'x'"),
        (lambda logger: logger.finalize("success"), "RuntimeError: two lines"),
    ],
)
def test_faults_name_the_option(call: Callable[[Logger], None], reason: str) -> None:
    (logger,) = adapted([Failing()], [])
    rest = r"\. Correct its arguments, or leave it out; the same command then continues\.$"
    with pytest.raises(InputError, match=rf"^trainer\.loggers\.0: .*Failing.*: {reason}{rest}"):
        call(logger)


def test_a_name_that_no_folder_can_have_is_a_fault_of_the_option(
    base: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    """Lightning reads it as a URL, and says so only when it first writes: before the first step."""
    node = f"{{_target_:{CSV},save_dir:{tmp_path / 'logs'},name:'zz://b'}}"
    with pytest.raises(InputError, match=r"trainer\.loggers\.0: .*CSVLogger.*Protocol not known"):
        train_stage(compose("train", [*base, f"+trainer.loggers=[{node}]"]))
    assert not list((tmp_path / "outputs").rglob("metrics.jsonl"))
    mended = node.replace("zz://b", "zz")
    train_stage(compose("train", [*base, f"+trainer.loggers=[{mended}]"]))
    assert list((tmp_path / "logs" / "zz").rglob("metrics.csv"))
