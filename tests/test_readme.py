"""Commands of the README are run on a small pool; those of the guide to the selectors compose."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose

from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.checks import check_selector
from siftclip.trainer.builders.online_options import check_online
from siftclip.trainer.builders.selection import selector_from
from siftclip.trainer.cli.application import _named
from siftclip.trainer.cli.main import GROUPS
from siftclip.trainer.demo.pool import DemoData, write_demo_data
from siftclip.trainer.settings.budget import limit_from
from siftclip.trainer.settings.commands import COMMANDS, TrainCommand
from siftclip.trainer.settings.composed import plain_tree
from siftclip.trainer.settings.read_command import read_command
from siftclip.trainer.settings.store import composing
from siftclip.trainer.settings.unused import unused_options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SELECTORS = (ROOT / "docs" / "selectors.md").read_text(encoding="utf-8")
ONLINE = (ROOT / "docs" / "online.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
# What is too large or not there on a test machine, and what stands in for it.
MSCOCO = "retrieval-mscoco_2014_5k_test_image_text_retrieval"
# What words without = stand for
POSITIONAL = {
    "subset import": ["subset_import.path", "subset_import.name"],
    "subset export": ["subset_export.subset", "subset_export.path"],
    "subset show": ["subset_show.name"],
    "subset combine": [f"subset_combine.{word}" for word in ("name", "operation", "a", "b")],
    "subset verify": ["subset_verify.subset"],
    "reproduce": ["reproduce.run"],
    "runs list": ["runs_list.kinds"],
    "runs show": ["runs_show.run"],
    "runs rm": ["runs_rm.run"],
    "runs gc": ["runs_gc.kinds"],
}
SMALL_RUN = (
    "model=vit_tiny scale=tiny scale.samples_seen=64 scale.global_batch_size=16 logger=csv "
    "progress=false data.num_workers=0"
)


def commands(text: str = README) -> list[str]:
    """The lines of a text's bash blocks that are commands."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    sizes = {"classification_samples": 20, "count_samples": 10, "retrieval_samples": 10}
    root = tmp_path_factory.mktemp("readme")
    return write_demo_data(root, pool_samples=120, teacher_samples=20, progress=False, **sizes)


def test_readme_has_the_commands_that_are_tested_here() -> None:
    found = commands()
    assert found[:2] == ["make demo", "make test"]
    words = [line.split()[1] for line in found[2:]]
    assert words == [
        "embed",
        "select",
        "train",
        "eval",
        "compare",
        "target",
        "select",
        "train",
        "train",
        *["eval"] * 4,
    ]


@pytest.mark.parametrize("target", ["demo", "test", "test-all", "coverage"])
def test_make_knows_the_targets(target: str) -> None:
    result = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    expected = "siftclip demo" if target == "demo" else "pytest"
    assert expected in result.stdout
    assert ("not slow" in result.stdout) == (target == "test")
    assert ("--cov" in result.stdout) == (target == "coverage")


@pytest.mark.slow
def test_commands_for_ones_own_pool_run(
    data: DemoData, model_folder: Path, run_python: Any, tmp_path: Path
) -> None:
    evalsets = tmp_path / "evalsets"
    for name, known in (("digit", "mnist"), ("retrieval", MSCOCO)):
        shutil.copytree(data.tasks / f"wds_{name}", evalsets / f"wds_{known}_test")
    for line in commands()[2:]:
        if line.startswith("siftclip eval download"):
            continue  # tests/eval/download/test_tasks.py has a hub
        line = line.replace("/data/pool", str(data.pool)).replace("/data/tasks", str(data.tasks))
        line = line.replace("/data/evalsets", str(evalsets))
        line = line.replace("eval ViT-B-32 openai", f"eval {model_folder}")
        line = line.replace("features.model.pretrained=openai", "")
        line = line.replace("features.model.name=ViT-B-32", f"features.model.name={model_folder}")
        line = re.sub(r"\b(model=vit_b_32|scale=datacomp_small)\b", "", line)
        runs = sorted(tmp_path.glob("outputs/train/*"), key=lambda run: run.stat().st_ctime)
        for word, run in zip(("RUN", "OTHER"), runs, strict=False):
            line = line.replace(f"outputs/train/{word}", str(run))
        program, command, *options = shlex.split(line)
        assert program == "siftclip"
        small = shlex.split(SMALL_RUN)
        if command == "eval":
            small.remove("model=vit_tiny")
        if options[0] == "diff":
            small.append("diff.resamples=100")
        if command == "target":
            small.append("target.split=test")  # all that the demo's tasks have
        words = ["-m", "siftclip.trainer.cli", command, *options, *small]
        result = run_python(*words, cwd=tmp_path)
        assert result.returncode == 0, (line, result.stderr[-2000:])
    assert (tmp_path / "outputs/compare/random_clip_score/report.html").is_file()
    assert len(np.load(next(tmp_path.glob("outputs/selections/clip_score-*/selection.npy")))) == 36


def _selected(line: str, configs: Path) -> list[str]:
    """Compose a command, build its selector if it has one, and say which that is."""
    program, *words = shlex.split(line)
    if program == "torchrun":
        words = words[words.index("siftclip.trainer.cli") + 1 :]
    elif program != "siftclip":
        return []
    command, *options = words
    if "--config-dir=/data/my_configs" in options:
        options.remove("--config-dir=/data/my_configs")
        options.append(f"hydra.searchpath=[file://{configs}]")
    overrides = _named(command, options, ())
    config = compose(command, overrides=overrides)
    assert not list(unused_options(COMMANDS[command], overrides, config)), line
    if command != "select":
        return []
    built = selector_from(plain_tree(config)["selector"])
    assert isinstance(built.selector, Selector), line
    return [built.name]


def test_commands_of_the_guide_compose_and_their_selectors_build(tmp_path: Path) -> None:
    (own,) = re.findall(r"```yaml\n(.*?)```", SELECTORS, flags=re.DOTALL)
    (tmp_path / "selector").mkdir()
    (tmp_path / "selector" / "mine.yaml").write_text(own)
    with composing():
        seen = [name for line in commands(SELECTORS) for name in _selected(line, tmp_path)]
    assert {"mine", "clip_score", "vas_clip", "soft_cap", "external"} <= set(seen)


def test_commands_of_the_guide_to_the_loop_are_valid() -> None:
    lines = commands(ONLINE)
    assert len(lines) >= 7
    with composing():
        for line in lines:
            program, command, *options = shlex.split(line)
            assert (program, command) == ("siftclip", "train")
            found = read_command(TrainCommand, compose(command, overrides=options))
            check_online(found.online, found.selector, found.loss, found.trainer.strategy)
            limit_from(found.budget)


def test_commands_of_the_guide_to_evaluation_compose() -> None:
    lines = [line for line in commands(EVALUATION) if " ... " not in line]
    assert len(lines) >= 5
    with composing():
        for line in lines:
            program, *words = shlex.split(line)
            assert program == "siftclip"
            name = "_".join(words[:2]) if words[1] in ("watch", "diff", "download") else words[0]
            overrides = [word for word in words if "=" in word]
            reads = COMMANDS[name.replace("_", " ")]
            assert not list(unused_options(reads, overrides, compose(name, overrides=overrides)))


@pytest.mark.parametrize(("guide", "least"), [("subsets", 9), ("runs", 8)])
def test_commands_of_other_guides_compose(guide: str, least: int) -> None:
    lines = commands((ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8"))
    assert len(lines) >= least
    with composing():
        for line in lines:
            program, *words = shlex.split(line)
            assert program == "siftclip"
            command = " ".join(words[:2] if words[0] in GROUPS else words[:1])
            module = importlib.import_module(
                f"siftclip.trainer.cli.commands.{command.replace(' ', '_')}_command"
            )
            assert module.main
            positional = POSITIONAL.get(command, ())
            overrides = _named(command, words[len(command.split()) :], positional)
            config = compose(command.replace(" ", "_"), overrides=overrides)
            assert not list(unused_options(COMMANDS[command], overrides, config)), line
            if command != "reproduce":  # which has the rest from its run
                read_command(COMMANDS[command], config)


def test_guide_names_every_selector() -> None:
    names = {path.stem for path in (ROOT / "configs" / "selector").glob("*.yaml")}
    named = set(re.findall(r"\w+", SELECTORS.replace("`_30pct`", "`clip_score_b32_30pct`")))
    assert names - {"plugin"} <= named


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        (README, "CaptionLength", {"fraction": 0.3}),
        (SELECTORS, "RepeatedWords", {"fraction": 0.3}),
        (SELECTORS, "Unusual", {"fraction": 0.3}),
        (SELECTORS, "EverySecond", {}),
    ],
)
def test_selectors_of_the_texts_keep_the_contract(
    text: str, name: str, options: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (code,) = (block for block in blocks if f"class {name}(" in block)
    (tmp_path / f"package_of_{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(f"package_of_{name}")
    check_selector(lambda: getattr(module, name)(**options))
