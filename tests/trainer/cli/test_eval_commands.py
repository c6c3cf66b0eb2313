"""`siftclip eval` and what belongs to it, as they are typed."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from siftclip.errors import InputError
from siftclip.eval.results.files import read_results
from siftclip.trainer.cli.application import _named
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.stages.evaluation import results_path_for, tasks_from

Cli = Callable[..., subprocess.CompletedProcess[str]]

QUIET = ["progress=false", "trainer.accelerator=cpu", "data.num_workers=0", "eval.resamples=50"]


@pytest.fixture
def tasks(demo_data: DemoData, tmp_path: Path) -> Path:
    """A copy of the tasks that a test may damage."""
    return Path(shutil.copytree(demo_data.tasks, tmp_path / "tasks"))


@pytest.fixture
def results_of(tmp_path: Path, model_folder: Path) -> Callable[[], Path]:
    def find() -> Path:
        (path,) = (tmp_path / "outputs" / "eval").glob("*/eval_results.jsonl")
        return path

    return find


def test_a_model_by_its_bare_name(
    cli: Cli, model_folder: Path, tasks: Path, results_of: Callable[[], Path]
) -> None:
    extra = ["eval.details=true", "eval.predictions=true", "+eval.groups.all=[digit,colour]"]
    arguments = [str(model_folder), f"eval.root={tasks}", *QUIET, *extra]
    result = cli("eval", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "all" in result.stdout
    path = results_of()
    results = read_results(path)
    assert {r.key for r in results} == {"colour", "count", "digit", "retrieval"}
    with path.with_suffix(".csv").open() as file:
        assert {row["task"] for row in csv.DictReader(file)} >= {"digit", "average/all"}
    names = {file.name for file in path.parent.rglob("*.*")}
    assert {"digit_predictions.parquet", "digit_classes.csv", "digit_confusion.csv"} <= names
    shutil.rmtree(path.parent / "eval_results_details")
    assert cli("eval", *arguments).returncode == 0  # what is missing is made again
    assert (path.parent / "eval_results_details" / "digit_predictions.parquet").is_file()
    assert len(read_results(path)) == 4


def test_two_ranks_find_what_one_finds(
    cli: Cli, model_folder: Path, tasks: Path, results_of: Callable[[], Path], tmp_path: Path
) -> None:
    arguments = [str(model_folder), f"eval.root={tasks}", *QUIET, "eval.batch_size=7"]
    assert cli("eval", *arguments).returncode == 0
    alone = read_results(results_of())
    shutil.rmtree(tmp_path / "outputs")
    result = cli("eval", *arguments, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    together = read_results(results_of())
    assert [(r.key, r.metrics, r.interval) for r in together] == [
        (r.key, r.metrics, r.interval) for r in alone
    ]
    assert result.stdout.count("written ") == 1


def test_a_damaged_task_leaves_the_others_alone(
    cli: Cli, model_folder: Path, tasks: Path, results_of: Callable[[], Path]
) -> None:
    tar = next(tasks.glob("wds_digit/test/0.tar"))
    tar.write_bytes(tar.read_bytes()[:3000])
    (tasks / "wds_count" / "zeroshot_classification_templates.txt").write_text("no placeholder\n")
    result = cli("eval", str(model_folder), f"eval.root={tasks}", *QUIET)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "2 tasks failed" in result.stderr
    said = " ".join(result.stdout.split())  # without the breaks of long lines
    assert "a template must contain {c}" in said
    assert "0.tar ends after 3000 bytes" in said
    assert {r.key for r in read_results(results_of())} == {"colour", "retrieval"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["eval.protocols=[few_shot]", "eval.probe.train_split=test"],
         r"eval\.probe\.train_split must not be the split"),
        (["eval.protocols=[few_shot]"], r"in .* has the split 'train' \(eval\.probe\.train_split"),
        (["eval.protocols=[zero_shot,few_shots]"],
         r"eval\.protocols must be some of .* Got \['zero_shot', 'few_shots'\]"),
        (["eval.protocols=[]"], r"eval\.protocols must be some of .* Got \[\]"),
        (["+eval.classnames.digits=a.txt"],
         r"eval\.classnames must name tasks that are evaluated: .*'digit'.* Got 'digits'"),
        (["+eval.templates.digit=a.txt"],
         r"eval\.templates\.digit must be a text file\. Got 'a\.txt'"),
        (["eval.root=null"], r"eval\.root must name a folder of tasks"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_evaluated(
    options: list[str],
    message: str,
    model_folder: Path,
    tasks: Path,
    compose: Callable[..., DictConfig],
) -> None:
    options = [f"model.name={model_folder}", f"eval.root={tasks}", *options]
    with pytest.raises(InputError, match=message):
        tasks_from(compose("eval", options).eval)


def test_a_suite_that_is_there_in_part(cli: Cli, model_folder: Path, tasks: Path) -> None:
    (tasks / "wds_digit").rename(tasks / "wds_mnist_test")
    result = cli("eval", str(model_folder), "eval=datacomp", f"eval.root={tasks}", *QUIET)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "partial: 1 of 38 tasks" in result.stdout
    assert "vtab/caltech101" in result.stdout
    nothing = cli("eval", str(model_folder), "eval=vtab", f"eval.root={tasks}", *QUIET)
    assert nothing.returncode == 2
    assert "none of the 13 tasks of eval=vtab" in nothing.stderr


def test_a_difference_of_two_runs(
    cli: Cli, model_folder: Path, tasks: Path, results_of: Callable[[], Path], tmp_path: Path
) -> None:
    assert cli("eval", str(model_folder), f"eval.root={tasks}", *QUIET).returncode == 0
    path = str(results_of())
    result = cli("eval", "diff", path, path, "diff.resamples=200")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "digit" in result.stdout
    missing = cli("eval", "diff", path, str(tmp_path / "nowhere.jsonl"))
    assert missing.returncode == 2
    assert "nowhere.jsonl does not exist" in missing.stderr
    alone = cli("eval", "diff", path)
    assert alone.returncode == 2
    assert "diff.b must name" in alone.stderr


def test_download_without_a_network(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = cli("eval", "download", str(tmp_path / "sets"), "eval.tasks=[mnist]", "progress=false")
    assert result.returncode == 2
    assert "failed   mnist" in result.stdout
    assert "Traceback" not in result.stderr
    unknown = cli("eval", "download", str(tmp_path / "sets"), "eval.tasks=[nope]")
    assert "eval.tasks must name tasks of DataComp" in unknown.stderr


def test_bare_words_stand_for_options() -> None:
    assert _named("eval", ["a b", "x=1", "--cfg", "job", "tag"], ["m.name", "m.tag"]) == [
        "m.name='a b'",
        "x=1",
        "--cfg",
        "job",
        "m.tag='tag'",
    ]
    assert _named("train", ["word"], []) == ["word"]
    assert _named("eval", ["it's\\x"], ["m"]) == ["m='it\\'s\\\\x'"]
    with pytest.raises(SystemExit):
        _named("eval", ["a", "b"], ["m"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["model.name=RUN"], r"RUN/eval_results.jsonl"),
        (["model.name=RUN", "eval.precision=bf16"], r"RUN/eval/model-bf16/eval_results.jsonl"),
        (["model.name=RUN", "model.pretrained=RUN/checkpoints/step-7.ckpt", "model.weights=raw"],
         r"RUN/eval/step-7-raw/eval_results.jsonl"),
        (["model.name=RUN", "+eval.templates.digit=TEXT"],
         r"RUN/eval/model-prompts-\w{8}/eval_results.jsonl"),
        (["model.name=ViT-B-32", "model.pretrained=openai"],
         r"out/eval/ViT-B-32-openai/eval_results.jsonl"),
        (["model.name=FOLDER"], r"out/eval/some-model-\w{8}/eval_results.jsonl"),
    ],
)  # fmt: skip
def test_each_way_to_ask_a_model_has_its_own_file(
    options: list[str], expected: str, compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    run, folder, text = tmp_path / "run", tmp_path / "some model", tmp_path / "text.txt"
    (run / "model").mkdir(parents=True)
    (run / "model" / "open_clip_config.json").write_text("{}")
    folder.mkdir()
    text.write_text("the {c}\n")
    places = {"RUN": run, "FOLDER": f"'{folder}'", "TEXT": text}
    for word, place in places.items():
        options = [option.replace(word, str(place)) for option in options]
    config = compose("eval", [*options, f"output_dir={tmp_path / 'out'}"])
    found = results_path_for(config).relative_to(tmp_path).as_posix()
    assert re.fullmatch(expected.replace("RUN", "run"), found), found
