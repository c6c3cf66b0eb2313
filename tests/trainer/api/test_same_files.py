"""What Python makes is what the commands make: the main job both ways, and the files compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import CPU, QUICK, TRAINING, VIT_TINY

import siftclip
from siftclip.selectors import NegCLIPLoss, Uniform
from siftclip.trainer.demo.pool import DemoData


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """The same outputs of the commands and of Python."""

    commands: Path
    python: Path
    selection: siftclip.trainer.PoolSelection
    run: siftclip.RunDir
    results: Any


@pytest.fixture(scope="module")
def python_pool(demo_data: DemoData) -> siftclip.Pool:
    return siftclip.Pool(demo_data.pool, cache_dir=demo_data.root / "cache", progress=False)


@pytest.fixture(scope="module")
def both(
    demo_data: DemoData,
    python_pool: siftclip.Pool,
    model_folder: Path,
    base_of: Callable[[Path], list[str]],
    python_server: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Both:
    """The main job: embed, select, train, evaluate, with a command each and a function each."""
    root = tmp_path_factory.mktemp("both")
    commands, python, printed = root / "commands", root / "python", root / "printed"
    printed.mkdir()
    base = [
        *(o for o in base_of(commands) if not o.startswith(("features.", "output_dir"))),
        "features=open_clip",
        "features.name=mine",
        f"features.root={commands / 'features'}",
        f"features.model.name={model_folder}",
        f"output_dir={commands / 'outputs'}",
        "selector=negcliploss",
        "selector.fraction=0.5",
    ]

    def command(*words: str) -> None:
        result = python_server.run(
            *("-m", "siftclip.trainer.cli", *words),
            cwd=root,
            folder=printed,
            env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
            ranks=None,
        )
        assert result.returncode == 0, result.stderr[-3000:]

    command("embed", *base)
    command("select", *base)
    command("train", *base)
    (run,) = (commands / "outputs" / "train").iterdir()
    quick = ("trainer.accelerator=cpu", "data.num_workers=0", "progress=false")
    command("eval", str(run), f"eval.root={demo_data.tasks}", *quick)

    # those of the command are reused, since what is kept goes with the times of files
    _, features = (
        siftclip.embed(
            python_pool,
            str(model_folder),
            name="mine",
            folder=outputs / "features",
            trainer=CPU,
            **QUICK,
        )
        for outputs in (python, commands)
    )
    selection = siftclip.select(
        python_pool,
        features,
        NegCLIPLoss(fraction=0.5),
        output_dir=python / "outputs",
        progress=False,
        trainer=CPU,
    )
    trained = siftclip.train(selection, VIT_TINY, **TRAINING)
    results = siftclip.evaluate(trained, demo_data.tasks, trainer=CPU, **QUICK)
    return Both(commands=commands, python=python, selection=selection, run=trained, results=results)


def test_features_are_the_same_files(both: Both) -> None:
    ours, theirs = (
        sorted((root / "features").glob("*.npz")) for root in (both.python, both.commands)
    )
    assert [path.name for path in ours] == [path.name for path in theirs]
    for path, other in zip(ours, theirs, strict=True):
        assert path.read_bytes() == other.read_bytes()
    manifests = [
        json.loads((root / "features" / "features.json").read_text())
        for root in (both.python, both.commands)
    ]
    assert manifests[0] == manifests[1]


def test_selections_have_the_same_names_and_files(both: Both) -> None:
    (theirs,) = (both.commands / "outputs" / "selections").iterdir()
    ours = both.selection.folder
    assert ours.name == theirs.name
    assert (ours / "selection.npy").read_bytes() == (theirs / "selection.npy").read_bytes()
    assert (ours / "scores.npy").read_bytes() == (theirs / "scores.npy").read_bytes()
    manifests = [json.loads((folder / "selection.json").read_text()) for folder in (ours, theirs)]
    for manifest in manifests:
        del manifest["cost"]
        for member in manifest["members"]:
            del member["seconds"]
        given = manifest["parameters"].items()  # the command line also lists what is null
        manifest["parameters"] = {name: value for name, value in given if value is not None}
    assert manifests[0] == manifests[1]


def test_runs_have_the_same_names_weights_and_logs(both: Both) -> None:
    (theirs,) = (path for path in (both.commands / "outputs" / "train").iterdir() if path.is_dir())
    ours = both.run.path
    assert ours.name == theirs.name
    for name in ("model/open_clip_model.safetensors", "identity.json", "budget.json", "model.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (ours, theirs)
    ]
    losses = [[record.get("train/loss") for record in log] for log in logs]
    assert losses[0] == losses[1]


def test_results_are_the_same_lines(both: Both) -> None:
    (theirs,) = (both.commands / "outputs" / "train").glob("*/eval_results.jsonl")
    lines = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (both.run.results, theirs)
    ]
    for of_one in lines:
        for line in of_one:
            line.pop("seconds", None)
    assert lines[0] == lines[1]
    frame = both.results.frame
    assert list(frame["task"]) == [line["key"] for line in lines[0]]
    assert "Summary of 4 tasks" in repr(both.results)
    assert both.results._repr_html_().startswith("<pre>")


def test_a_selection_can_be_looked_at(
    both: Both, python_pool: siftclip.Pool, tmp_path: Path
) -> None:
    selection = both.selection
    assert len(selection) == len(selection.ids) == len(python_pool) // 2
    assert selection.scores is not None
    assert selection.scores.shape == (len(selection),)
    assert list(selection.frame.columns) == ["uid", "multiplicity", "score", "row", "tar", "key"]
    written = selection.to_datacomp(tmp_path / "subset.npy")
    assert written.read_bytes() == (selection.folder / "selection.npy").read_bytes()
    shown = repr(selection)
    assert shown.startswith("PoolSelection(negcliploss: 120 samples of ")
    assert repr(python_pool).endswith("240 samples in 1 tars)")
    assert repr(both.run) == f"RunDir({str(both.run.path)!r}, finished)"
    assert both.run.metrics["step"].max() == 6


def test_scores_of_a_pool_are_those_of_its_arrays(both: Both, python_pool: siftclip.Pool) -> None:
    features = siftclip.Features(
        pool=python_pool,
        settings=both.selection.settings.features,
        folder=both.python / "features",
    )
    images, texts = features.arrays()
    of_pool = siftclip.score(
        python_pool,
        features,
        NegCLIPLoss(fraction=0.5),
        output_dir=both.python / "outputs",
        progress=False,
    )
    of_arrays = NegCLIPLoss(fraction=0.5, partition="global").scores(images, texts)
    np.testing.assert_allclose(
        NegCLIPLoss(fraction=0.5, partition="global").scores(images.copy(), texts), of_arrays
    )
    assert of_pool.shape == of_arrays.shape


def test_a_comparison_from_python(
    demo_data: DemoData, python_pool: siftclip.Pool, tmp_path: Path
) -> None:
    outcome = siftclip.compare(
        python_pool,
        None,
        {
            "random": lambda seed: Uniform(fraction=0.5, seed=seed),
            "all": {"selector": Uniform(fraction=1.0)},
        },
        VIT_TINY,
        tasks=demo_data.tasks,
        evaluation={"tasks": ["digit", "colour"], "resamples": 0},
        seeds=(0, 1),
        output_dir=tmp_path / "outputs",
        trainer=CPU,
        **TRAINING,
    )
    assert set(outcome.frame["arm"]) == {"random", "all"}
    assert outcome.report.is_file()
    assert "random" in repr(outcome)
    outcome.require_complete()
