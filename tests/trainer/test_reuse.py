"""What commands reuse they say, and `reuse=false` computes again; files count by their content."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from siftclip.datamodules.models.load import load_clip_model, save_model_folder
from siftclip.datamodules.selection.pool_source import IDENTITY_NAME
from siftclip.errors import InputError
from siftclip.files import read_json, write_json
from siftclip.trainer.builders.models import model_files
from siftclip.trainer.builders.selection import score_stage, select_stage
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.model import ModelSettings
from siftclip.trainer.stages.evaluation import eval_stage
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d"


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_scores_and_selections_are_reused_in_a_line(
    base: list[str], compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    options = [*base, "selector=clip_score", "selector.fraction=0.5"]
    first = score_stage(compose("score", options))
    assert "reused" not in caplog.text
    score_stage(compose("score", options))
    assert re.search(rf"reused the scores or statistics of 1 part of {TIME} \(", caplog.text)
    caplog.clear()
    select_stage(compose("select", options))
    assert "reused the scores" in caplog.text  # another fraction, or a selection, needs no new ones
    assert "reused the selection" not in caplog.text
    caplog.clear()
    select_stage(compose("select", options))
    assert re.search(rf"reused the selection of {TIME} \(.*reuse=false", caplog.text)
    caplog.clear()
    (path,) = first.folder.glob("*.npz")
    before = path.stat().st_mtime_ns
    selected = select_stage(compose("select", [*options, "reuse=false"]))
    assert "reused" not in caplog.text
    assert path.stat().st_mtime_ns > before
    assert len(selected.selection) == 120
    with pytest.raises(InputError, match="reuse must be true or false"):
        select_stage(compose("select", [*options, "reuse=perhaps"]))


def test_scores_of_an_earlier_version_are_told_and_not_taken(
    base: list[str], compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    options = [*base, "selector=clip_score", "selector.fraction=0.5"]
    folder = score_stage(compose("score", options)).folder
    identity = read_json(folder / IDENTITY_NAME)
    old = {key: value for key, value in identity.items() if key not in ("format", "code", "files")}
    shutil.move(folder, folder.with_name("0123456789ab"))
    write_json(folder.with_name("0123456789ab") / IDENTITY_NAME, old)
    score_stage(compose("score", options))
    assert re.search(rf"not reused: scores of {TIME} .* an earlier version kept it", caplog.text)
    assert "reused the scores" not in caplog.text


def test_a_selection_of_an_earlier_version_is_told_and_not_taken(
    base: list[str], compose: Compose, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = compose("select", [*base, "selector=random", "selector.fraction=0.5"])
    select_stage(config)
    (path,) = (tmp_path / "outputs" / "selections").glob("random-*/selection.json")
    manifest = read_json(path)
    old = {key: value for key, value in manifest["identity"].items() if key != "code"}
    write_json(path, {**manifest, "identity": old})
    path.parent.rename(path.parent.with_name("random-0123456789ab"))
    select_stage(config)
    assert re.search(rf"not reused: the selection of {TIME} \(", caplog.text)
    assert "reused the selection" not in caplog.text


def test_a_file_of_scores_counts_by_its_content(
    base: list[str], compose: Compose, tmp_path: Path
) -> None:
    path = tmp_path / "scores.npy"
    config = compose("select", [*base, "selector=random", "selector.fraction=1"])
    uids = select_stage(config).pool.uids

    def write(values: np.ndarray) -> None:
        kept = np.zeros(len(uids), dtype=[("f0", "u8"), ("f1", "u8"), ("score", "f8")])
        kept["f0"], kept["f1"], kept["score"] = uids[:, 0], uids[:, 1], values
        np.save(path, kept)

    options = [*base, "selector=external", "selector.column=score", "selector.fraction=0.5"]
    config = compose("select", [*options, f"selector.path={path}"])
    values = np.arange(len(uids), dtype=np.float64)
    write(values)
    first = select_stage(config)
    status = path.stat()
    write(values[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` of another file does
    second = select_stage(config)
    assert set(first.rows.tolist()).isdisjoint(second.rows.tolist())


def test_a_finished_run_is_reused_in_a_line_and_can_begin_anew(
    base: list[str], compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    run = train_stage(compose("train", [*base, "reuse=false"]))
    assert not [*run.path.parent.glob("*.replaced-*")]  # there was no run before it
    before = (run.path / "summary.json").stat().st_mtime_ns
    again = train_stage(compose("train", base))
    assert again.path == run.path
    assert re.search(rf"reused the finished run of {TIME}", caplog.text)
    assert (run.path / "summary.json").stat().st_mtime_ns == before
    versions = read_json(run.path / "versions.json")
    write_json(run.path / "versions.json", {**versions, "git": "abc", "torch": "1.0"})
    train_stage(compose("train", base))
    assert re.search(r"made with other code: git abc, here .*; torch 1\.0, here", caplog.text)
    caplog.clear()
    anew = train_stage(compose("train", [*base, "reuse=false"]))
    assert anew.path == run.path
    assert (run.path / "summary.json").stat().st_mtime_ns > before
    (aside,) = run.path.parent.glob(f"{run.path.name}.replaced-*")
    assert (aside / "summary.json").stat().st_mtime_ns == before
    weights = [folder / "model" / "open_clip_model.safetensors" for folder in (aside, run.path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_is_another_one_with_other_weights_in_the_same_file(
    base: list[str], compose: Compose, tmp_path: Path
) -> None:
    config = compose("train", base)
    options = [*base, f"model.pretrained={tmp_path / 'start' / 'open_clip_model.safetensors'}"]
    runs = []
    for seed in range(2):
        torch.manual_seed(seed)
        clip = load_clip_model("start", architecture=to_plain(config.model.architecture))
        save_model_folder(clip, tmp_path / "start")
        runs.append(train_stage(compose("train", options)))
    assert runs[0].path != runs[1].path
    options.append(f"run_dir={runs[0].path}")
    with pytest.raises(InputError, match=r"Different: the model \(files\)"):
        train_stage(compose("train", options))


def test_files_of_a_model_are_those_that_are_loaded(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "weights").write_text("a")
    (run / "checkpoint").write_text("b")
    assert model_files(ModelSettings(name=str(run)))["name"].keys() == {"weights"}
    assert model_files(ModelSettings(name=f"local-dir:{run}"))["name"].keys() == {"weights"}
    assert model_files(ModelSettings(name="ViT-B-32", pretrained="openai")) == {}
    model = ModelSettings(name="a", architecture={"text_cfg": {"hf_model_name": str(run)}})
    first = model_files(model)
    (run / "checkpoint").write_text("another one")
    assert model_files(model) != first


def test_a_damaged_selection_is_set_aside_and_made_again(
    base: list[str], compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    config = compose("select", [*base, "selector=random", "selector.fraction=0.5"])
    first = select_stage(config)
    contents = {path.name: path.read_bytes() for path in first.folder.glob("*.npy")}
    for number, text in enumerate(("[]", "null", "{"), start=1):
        (first.folder / "selection.json").write_text(text)
        caplog.clear()
        assert select_stage(config).selection.digest == first.selection.digest
        assert "It is made again; what was there is now selection.json.damaged" in caplog.text
        assert len(list(first.folder.glob("selection.json.damaged*"))) == number
    assert {path.name: path.read_bytes() for path in first.folder.glob("*.npy")} == contents


def test_results_are_reused_in_a_line(
    base: list[str],
    compose: Compose,
    demo_data: DemoData,
    model_folder: Path,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    options = [*base, f"eval.root={demo_data.tasks}", "eval.resamples=0"]
    path = tmp_path / "eval_results.jsonl"
    tasks = len(eval_stage(compose("eval", options), model_folder, results_path=path).results)
    for file in [path, *(tmp_path / "eval_results_outcomes").iterdir()]:
        os.utime(file, (10**9, 10**9))  # in 2001
    for _ in range(2):  # nor does reusing them make them new
        caplog.clear()
        eval_stage(compose("eval", options), model_folder, results_path=path)
        assert re.search(rf"reused the results of {tasks} of {tasks} tasks of 2001-", caplog.text)
    caplog.clear()
    eval_stage(compose("eval", [*options, "reuse=false"]), model_folder, results_path=path)
    assert "reused" not in caplog.text
