"""A kind of task of another distribution, the one of the guide, as its users have it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from siftclip.datamodules.models.load import load_clip_model, save_model_folder
from siftclip.eval import example_image
from siftclip.eval.results.files import read_results
from siftclip.trainer.demo.pool import DemoData

Cli = Callable[..., subprocess.CompletedProcess[str]]

GUIDE = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
SECTION = GUIDE.partition("## Your own kind of task")[2].partition("\n## ")[0]
MODULE, TEST = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
(TOML,) = re.findall(r"```toml\n(.*?)```", SECTION, flags=re.DOTALL)
QUIET = ["progress=false", "trainer.accelerator=cpu", "data.num_workers=0", "eval.resamples=50"]


@pytest.fixture
def other_model(model_folder: Path, tmp_path: Path) -> Path:
    """The same architecture with other weights."""
    architecture = json.loads((model_folder / "open_clip_config.json").read_text())["model_cfg"]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        save_model_folder(load_clip_model("tiny", architecture=architecture), tmp_path / "other")
    return tmp_path / "other"


def install(site: Path, text: str = MODULE) -> None:
    """Put the guide's module and its entry point into a folder that is on the path."""
    group, point = re.findall(r'"(siftclip\.\w+)"\]\n(.+)', TOML)[0]
    info = site / "my_package-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{point.replace(chr(34), '')}\n")
    (site / "my_package").mkdir(exist_ok=True)
    (site / "my_package" / "__init__.py").touch()
    (site / "my_package" / "counting.py").write_text(text)


def write_counts(root: Path, samples: int = 12) -> None:
    """Write a task of the kind, with images of noise."""
    (root / "test").mkdir(parents=True)
    (root / "dataset_type.txt").write_text("counting\n")
    (root / "test" / "nshards.txt").write_text("2\n")
    for tar in range(2):
        with tarfile.open(root / "test" / f"{tar}.tar", "w") as archive:
            for number in range(tar, samples, 2):
                label = {"thing": "dogs", "count": 1 + number % 10}
                members = {"png": example_image(number), "json": json.dumps(label).encode()}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"s{number}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def test_the_example_is_short_and_passes_its_own_test() -> None:
    assert len(MODULE.splitlines()) < 40
    names: dict[str, Any] = {"__name__": "my_package.counting"}
    exec(MODULE, names)  # noqa: S102 - our own guide
    exec(TEST, names)  # noqa: S102
    names["test_counting"]()


def test_a_plug_in_is_evaluated_kept_and_compared(
    cli: Cli, model_folder: Path, other_model: Path, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks"
    write_counts(tasks / "wds_counts")
    install(tmp_path)
    options = [f"eval.root={tasks}", *QUIET, "eval.predictions=true", "eval.details=true"]

    def evaluate(model: Path) -> subprocess.CompletedProcess[str]:
        return cli("eval", str(model), *options)

    for model in (model_folder, other_model):
        result = evaluate(model)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "counts" in result.stdout
    paths = sorted((tmp_path / "outputs" / "eval").glob("*/eval_results.jsonl"))
    assert len(paths) == 2
    for path in paths:
        (kept,) = read_results(path)
        assert (kept.key, kept.main_metric_name, kept.samples) == ("counts", "acc", 12)
        assert kept.metrics.keys() == {"acc", "acc_within_1", "main_metric"}
        assert kept.interval is not None
        table = pq.read_table(path.parent / "eval_results_details" / "counts_predictions.parquet")
        assert table.column_names == ["key", "tar", "captions", "acc", "acc_within_1"]
        assert table.column("captions").to_pylist() == [["dogs"]] * 12
        mean = sum(table.column("acc").to_pylist()) / 12
        assert kept.main_metric == pytest.approx(mean)

    compared = cli("eval", "diff", *map(str, paths))
    assert compared.returncode == 0, compared.stderr[-3000:]
    assert "counts" in compared.stdout

    again = evaluate(model_folder)
    assert "reused" in again.stdout + again.stderr
    install(tmp_path, MODULE.replace("error <= 1", "error <= 2"))
    changed = evaluate(model_folder)
    assert changed.returncode == 0, changed.stderr[-3000:]
    said = " ".join((changed.stdout + changed.stderr).split())
    assert "results of tasks that have changed are removed: counts" in said


def test_without_the_package_the_task_fails_and_the_others_do_not(
    cli: Cli, model_folder: Path, demo_data: DemoData, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks"
    shutil.copytree(demo_data.tasks / "wds_digit", tasks / "wds_digit")
    write_counts(tasks / "wds_counts")
    write_counts(tasks / "wds_odd")
    (tasks / "wds_odd" / "dataset_type.txt").write_text("os:system\n")
    result = cli("eval", str(model_folder), f"eval.root={tasks}", *QUIET)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    said = " ".join(result.stdout.split())
    assert "It says 'counting'. Another kind is added by installing a package" in said
    assert "It says 'os:system'" in said
    (path,) = (tmp_path / "outputs" / "eval").glob("*/eval_results.jsonl")
    assert [kept.key for kept in read_results(path)] == ["digit"]
