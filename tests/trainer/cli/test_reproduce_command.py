"""`siftclip reproduce` as a person types it, also on a run that means harm."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.stages.train import train_stage

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def trained(
    base_of: Callable[[Path], list[str]],
    composing: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run that no test may change."""
    with composing() as compose:
        words = [*base_of(tmp_path_factory.mktemp("original")), "selector.fraction=0.5"]
        return Path(train_stage(compose("train", words)).path)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "colleague"))


@pytest.fixture
def here(demo_data: DemoData) -> list[str]:
    """What every test types: where this machine keeps its index, and no wandb."""
    return [f"pool.cache_dir={demo_data.root / 'cache'}", "logger=csv", "progress=false"]


def change(run: Path, place: str, value: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    *parents, last = place.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_what_differs_is_said_before_and_after(run: Path, here: list[str], typed: Cli) -> None:
    result = typed("reproduce", "colleague", *here, "optim.lr=0.001")
    assert result.returncode == 0, result.stderr
    before, _, after = result.stdout.partition("\n\n")
    lines = before.splitlines()
    assert lines[0] == "run        colleague (finished)"
    assert "differs    optim.lr: 0.002 there, 0.001 here" in lines
    assert "differs    what the weights depend on: the optimiser (lr)" in lines
    assert "same       selection, 120 samples" in lines
    assert lines[-1].startswith("trains in  outputs/train/clip_score-s0-")
    assert "differs    losses: from step 2 on" in after
    assert "differs    weights: " in after


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
def test_in_processes_of_their_own(ranks: int | None, run: Path, here: list[str], cli: Cli) -> None:
    result = cli("reproduce", str(run), *here, ranks=ranks)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("what the weights depend on") <= 1
    assert result.stdout.count("trains in") == 1
    assert "same       all options and files that the weights depend on" in result.stdout
    if ranks is None:
        assert "same       weights, to the bit" in result.stdout
    else:
        assert "differs    ranks: 1 there, 2 here" in result.stdout


PLANTED = "planted_by_a_colleague"


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A module beside the run, in the folder in which the command is typed."""
    told = tmp_path / "executed"
    code = f"import pathlib\npathlib.Path({str(told)!r}).touch()\nclass Class:\n    pass\n"
    for folder in (tmp_path, tmp_path / "colleague"):
        (folder / f"{PLANTED}.py").write_text(code)
    return told


HARM: list[tuple[str, Any, str]] = [
    ("selector._target_", f"{PLANTED}.Class", f"selector._target_ is {PLANTED}.Class in"),
    ("selector._target_", "os.system", "no class of siftclip.selectors"),
    ("trainer.callbacks", [{"_target_": f"{PLANTED}.Class"}], f"trainer.callbacks names {PLANTED}"),
    ("trainer.plugins", [{"_target_": f"{PLANTED}.Class"}], "trainer.plugins=null to do without"),
    ("pool.root", "http://127.0.0.1:9/pool", "does not decide which server is asked"),
    ("model.name", "${oc.env:HOME}", "model.name has a reference"),
    ("selector.defaults", ["/hydra/launcher: basic"], "is no parameter of a selector"),
    ("loss.name", "\x1b[2Jmagic", r"loss.name is \x1b[2Jmagic, which this version does not know"),
    ("model.architecture", {"_target_": "os.system"}, "model.architecture has the class os.system"),
    ("seed", "1; rm -rf /", "seed must be a whole number"),
]


@pytest.mark.parametrize(("place", "value", "message"), HARM, ids=[place for place, *_ in HARM])
def test_a_run_that_means_harm_is_one_message(
    place: str, value: Any, message: str, run: Path, planted: Path, here: list[str], typed: Cli
) -> None:
    change(run, place, value)
    result = typed("reproduce", "colleague", *here)
    assert result.returncode == 2
    assert message in result.stderr
    assert "\x1b" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert not planted.exists()
    assert not Path("outputs").exists()


def test_nothing_is_written_where_a_run_says(
    run: Path, here: list[str], typed: Cli, tmp_path: Path
) -> None:
    place = tmp_path / "precious"
    place.mkdir()
    for option in ("output_dir", "run_dir", "eval.cache_dir"):
        change(run, option, str(place))
    change(run, "hydra", {"run": {"dir": str(place)}, "output_subdir": "x"})
    change(run, "logger", {"wandb": True, "mode": "online", "project": "theirs"})
    change(run, "trainer.loggers", [{"_target_": f"{PLANTED}.Class"}])
    result = typed("reproduce", "colleague", *here)
    assert result.returncode == 0, result.stderr
    assert "left out   trainer.loggers is this machine's own" in result.stdout
    assert "same       weights, to the bit" in result.stdout
    assert not list(place.iterdir())


def test_what_the_message_advises_is_accepted(run: Path, here: list[str], typed: Cli) -> None:
    change(run, "selector._target_", f"{PLANTED}.Class")
    change(run, "trainer.callbacks", [{"_target_": f"{PLANTED}.Class"}])
    result = typed("reproduce", "colleague", *here)
    assert result.stderr.startswith("siftclip reproduce: error: 2 options must be typed:")
    advice = ["selector._target_=siftclip.selectors.ClipScore", "trainer.callbacks=null"]
    accepted = typed("reproduce", "colleague", *here, *advice)
    assert accepted.returncode == 0, accepted.stderr
    assert "differs    selector._target_: planted_by_a_colleague.Class there" in accepted.stdout
    assert "same       weights, to the bit" in accepted.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "reproduce.run must name a run directory: siftclip reproduce RUN"),
        (["nowhere"], "reproduce.run='nowhere' must be the directory of a run"),
        (["damaged"], "damaged/config.yaml is not the configuration of a run"),
        (["colleague", "optim.lrr=3"], "optim.lrr is not an option. Did you mean optim.lr?"),
        (["colleague", "pool.root=nowhere"], "pool.root must be an existing folder or a URL"),
        (["colleague", "run_dir=colleague"], "run_dir='colleague' is the run that is repeated"),
        (["colleague", "another"], "too many words without '='"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words(
    words: list[str], message: str, run: Path, here: list[str], typed: Cli, tmp_path: Path
) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text("a: [")
    result = typed("reproduce", *words, *here)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_help_needs_no_run(typed: Cli) -> None:
    assert "siftclip reproduce: repeats a run" in typed("reproduce", "--help").stdout
