"""The console script as a person meets it: help, wrong words, bad input, several runs at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig
from tiny_runs import without_model

from siftclip.datamodules.selection.selection import read_selection, read_subset
from siftclip.errors import InputError
from siftclip.files import read_jsonl
from siftclip.trainer.builders.selection import score_stage, select_stage
from siftclip.trainer.cli.main import COMMANDS, main
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.stages.selection_summary import clip_score_overlap, describe_selection
from siftclip.trainer.stages.train import train_stage

Cli = Callable[..., subprocess.CompletedProcess[str]]
Compose = Callable[..., DictConfig]


def test_no_command_prints_the_commands(cli: Cli) -> None:
    result = cli()
    assert result.returncode == 0
    for command in ("embed", "score", "select", "train", "eval", "compare", "demo"):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "--cfg", "job"]])
def test_a_reader_that_has_enough_ends_a_command_without_a_word(words: list[str]) -> None:
    """`siftclip ... | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "siftclip.trainer.cli", *words]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_a_broken_pipe_of_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> None:
        raise BrokenPipeError("a loader's")

    monkeypatch.setattr("siftclip.trainer.cli.main._run", fail)
    with pytest.raises(BrokenPipeError, match="a loader's"):
        main()


def test_misspelt_command_is_guessed(cli: Cli) -> None:
    result = cli("slect")
    assert result.returncode == 2
    assert "'slect' is not a command" in result.stderr
    assert "Did you mean select?" in result.stderr


def test_unknown_selector_lists_the_known(cli: Cli) -> None:
    result = cli("select", "selector=nope", "pool.root=x")
    assert result.returncode != 0
    for known in ("clip_score", "external", "plugin", "random"):
        assert known in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_option_is_named(cli: Cli) -> None:
    result = cli("select", "selector.fractoin=0.3", "pool.root=x")
    assert result.returncode != 0
    assert "selector.fractoin" in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_input_is_one_message_and_exit_status_2(new_cli: Cli, tmp_path: Path) -> None:
    result = new_cli("select", "pool.root=nowhere")
    assert result.returncode == 2
    expected = (
        "siftclip select: error: pool.root must be an existing folder or a URL. Got 'nowhere'."
    )
    assert result.stderr.strip().splitlines()[-1] == expected
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_missing_option_is_asked_for(cli: Cli) -> None:
    result = cli("select")
    assert result.returncode == 2
    assert "pool.root must name the folder of the pool" in result.stderr


@pytest.mark.slow
def test_multirun_makes_one_run_each(base: list[str], cli: Cli, tmp_path: Path) -> None:
    result = cli("train", "--multirun", *base, "selector=random,clip_score", "seed=0,1")
    assert result.returncode == 0, result.stderr[-2000:]
    runs = list((tmp_path / "outputs" / "train").glob("*/summary.json"))
    assert len(runs) == 4
    assert result.stdout.count("run        ") == 4
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


def test_eval_of_a_run_a_checkpoint_and_a_folder_agree(
    base: list[str], compose: Compose, cli: Cli, demo_data: DemoData, tmp_path: Path
) -> None:
    run = train_stage(compose("train", [*base, "trainer.checkpoint_every_n_steps=3"]))
    tasks = [*without_model(base), f"eval.root={demo_data.tasks}", "eval.tasks=[digit,retrieval]"]
    checkpoint = run.latest_checkpoint()
    results = []
    for number, model in enumerate(
        (
            [f"model.name={run.path}"],
            [f"model.name={run.model}"],
            [f"model.name={run.model}", f"model.pretrained={checkpoint}"],
        )
    ):
        output = f"output_dir={tmp_path / str(number)}"
        result = cli("eval", *tasks, *model, output)
        assert result.returncode == 0, result.stderr[-2000:]
        assert "digit" in result.stdout
        written = result.stdout.split("written")[1].strip()
        results.append([record["metrics"] for record in read_jsonl(Path(written))])
    assert results[0] == results[1] == results[2]


@pytest.mark.slow
def test_eval_refuses_random_weights(base: list[str], cli: Cli, demo_data: DemoData) -> None:
    result = cli(
        "eval", *without_model(base), f"eval.root={demo_data.tasks}", "model.name=ViT-B-32"
    )
    assert result.returncode == 2
    assert "No weights given: " in result.stderr


def test_score_then_select_reuses_the_scores(
    base: list[str], compose: Compose, tmp_path: Path
) -> None:
    scored = score_stage(compose("score", base))
    files = list(scored.folder.glob("*.npz"))
    times = [path.stat().st_mtime_ns for path in files]
    for fraction in (0.2, 0.5):
        outcome = select_stage(compose("select", [*base, f"selector.fraction={fraction}"]))
        assert len(outcome.selection) == int(240 * fraction)
    assert [path.stat().st_mtime_ns for path in files] == times
    assert len(list((tmp_path / "outputs" / "scores").iterdir())) == 1


def test_selection_is_described(base: list[str], compose: Compose) -> None:
    config = compose("select", [*base, "selector.fraction=0.3"])
    outcome = select_stage(config)
    text = describe_selection(outcome, clip_score_overlap(config.features.name, outcome))
    assert "overlap    100.0 % also kept by CLIP score" in text
    assert "cost       " in text
    assert "kept       72 samples (30.0 %)" in text
    assert "coverage   100.0 % of the pool's metadata is in its shards" in text
    assert "pool scores  q0 " in text
    assert "kept scores  q0 " in text


def test_overlap_with_clip_score(base: list[str], compose: Compose) -> None:
    config = compose("select", [*base, "selector=random", "selector.fraction=0.25"])
    outcome = select_stage(config)
    clip = select_stage(compose("select", [*base, "selector.fraction=0.25"]))
    expected = len(np.intersect1d(outcome.rows, clip.rows)) / len(outcome.rows)
    assert clip_score_overlap(config.features.name, outcome) == expected
    assert 0 < expected < 1
    other = compose("select", [*base, "selector=random", "features.name=none"])
    assert clip_score_overlap(other, select_stage(other)) is None


def test_selection_is_a_datacomp_subset_that_can_be_read_back(
    base: list[str], compose: Compose
) -> None:
    first = select_stage(compose("select", base))
    array = np.load(first.folder / "selection.npy")
    assert array.dtype == np.dtype("u8,u8")
    assert np.array_equal(array, np.sort(array))
    path = f"selector.path={first.folder / 'selection.npy'}"
    again = select_stage(compose("select", [*base, "selector=external", path]))
    assert again.selection.digest == first.selection.digest


def test_repetitions_of_a_subset_are_multiplicities(
    base: list[str], compose: Compose, demo_data: DemoData, tmp_path: Path
) -> None:
    subset = np.load(demo_data.oracle)
    repeated = np.sort(np.concatenate([subset, subset[:5], subset[:5]]))
    np.save(tmp_path / "repeated.npy", repeated)
    path = f"selector.path={tmp_path / 'repeated.npy'}"
    outcome = select_stage(compose("select", [*base, "selector=external", path]))
    assert len(outcome.selection) == len(repeated)
    assert len(outcome.rows) == len(repeated)
    assert read_selection(outcome.folder).multiplicities.max() == 3
    uids, counts = read_subset(outcome.folder / "selection.npy")
    assert len(uids) == len(subset)
    assert counts.sum() == len(repeated)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["selector.fraction=0"], r"selector.fraction must be a number in the range (0, 1]"),
        (["selector.fraction=1.5"], "Got 1.5"),
        (["selector.fraction=a"], "Got 'a'"),
        (["selector.threshold=0.2"], "selector: ClipScore needs exactly one of fraction, thr"),
        (["selector.fraction=null", "selector.threshold=9"], "keeps none of 240 samples"),
        (["selector=external"], "The selector needs selector.path="),
        (["selector=plugin", "selector.plugin=nope"], "selector.plugin must be one of"),
        (["features.name=l14"], "lacks the array 'l14_img'"),
        (["features.root=nowhere"], "No features (*.npz) in nowhere"),
        (["pool.max_bad_fraction=2"], "pool.max_bad_fraction must be in the range [0, 1]"),
    ],
)
def test_each_fault_has_its_message(
    overrides: list[str], message: str, base: list[str], compose: Compose
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        select_stage(compose("select", [*base, *overrides]))


def newly_imported(code: str) -> str:
    """The large packages that a new Python has imported after `code`."""
    code += "\nprint({'torch', 'lightning', 'open_clip', 'wandb', 'aiohttp'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_commands_start_without_large_packages() -> None:
    """Importing them takes up to 8 seconds, which every `--help` and wrong option would cost."""
    names = [command.replace(" ", "_") for command in COMMANDS]
    modules = ", ".join(f"siftclip.trainer.cli.commands.{name}_command" for name in names)
    assert newly_imported(f"import sys, {modules}") == "set()"


def test_stages_without_training_start_without_lightning() -> None:
    """What `index`, `score`, `select` and `data compact` import takes 2 seconds, not 8."""
    stages = ("stages", "pool_stages", "selection_summary")
    modules = ", ".join(f"siftclip.trainer.{name}" for name in stages)
    assert newly_imported(f"import sys, {modules}") == "{'torch'}"
