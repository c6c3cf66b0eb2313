"""Callbacks, loggers, plugins, a profiler and other arguments of the Trainer, by the user's own."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from doc_examples import bash_commands
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar
from lightning.pytorch.plugins.precision import Precision
from omegaconf import OmegaConf

from siftclip.errors import InputError
from siftclip.files import read_jsonl
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.extensions import extensions_identity
from siftclip.trainer.runtime.lightning_setup import make_trainer
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.fields.reader import read
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.lightning import TrainerSettings
from siftclip.trainer.settings.trainer_options import REFUSED
from siftclip.trainer.stages.evaluation import eval_stage
from siftclip.trainer.stages.export import export_stage
from siftclip.trainer.stages.train import train_stage

PASSING = {"benchmark", "detect_anomaly", "enable_model_summary"}

OWN_CALLBACK = '''
import json
from lightning.pytorch import Callback


class Count(Callback):
    """Counts steps, keeps the count in checkpoints, and writes it to a file."""

    def __init__(self, path, stop_at=None):
        self.path, self.stop_at, self.seen, self.order = path, stop_at, 0, []

    def on_train_batch_end(self, trainer, *args):
        self.seen += 1
        self.order = [type(callback).__name__ for callback in trainer.callbacks]

    def on_train_batch_start(self, trainer, *args):
        if self.stop_at == trainer.global_step:
            raise RuntimeError("stop here")

    def on_train_end(self, trainer, module):
        loggers = [type(logger).__name__ for logger in trainer.loggers]
        with open(self.path, "w") as file:
            json.dump({"seen": self.seen, "order": self.order, "loggers": loggers}, file)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
'''


def settings(**values: Any) -> TrainerSettings:
    return read(TrainerSettings, {"accelerator": "cpu", **values}, "trainer")


def trainer_of(options: TrainerSettings, folder: Path) -> lightning.Trainer:
    return make_trainer(options, folder=folder, callbacks=[], loggers=[])


# ---- a person's command -------------------------------------------------------------------------
def test_command_trains_with_callbacks_loggers_and_a_profiler(
    base: list[str], cli: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(OWN_CALLBACK)
    words = [
        "trainer.callbacks=[{_target_:mine.Count,path:count.json},"
        "{_target_:lightning.pytorch.callbacks.LearningRateMonitor}]",
        "trainer.loggers=[{_target_:lightning.pytorch.loggers.CSVLogger,save_dir:logs}]",
        "trainer.profiler._target_=lightning.pytorch.profilers.SimpleProfiler",
        "trainer.profiler.dirpath=.",
        "trainer.profiler.filename=times",
        "trainer.options.detect_anomaly=true",
    ]
    result = cli("train", *base, *words)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "\nINFO train: step 1 of 6" in result.stderr
    assert not {"\r", "\x1b"} & set(result.stderr)
    found = json.loads((tmp_path / "count.json").read_text())
    assert found == {
        "seen": 6,
        "order": [
            *("StopOnSignal", "TrainingProgress", "Count"),
            *("LearningRateMonitor", "StepCheckpoint"),
        ],
        "loggers": ["FileLogger", "CSVLogger"],
    }
    (table,) = (tmp_path / "logs").rglob("metrics.csv")
    header = table.read_text().splitlines()[0].split(",")
    assert {"train/loss", "selection/fraction"} <= set(header)
    assert any(name.startswith("lr-") for name in header)
    (times,) = tmp_path.glob("fit-times*")
    assert "run_training_batch" in times.read_text()
    (run,) = (tmp_path / "outputs" / "train").iterdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["options"] == {"detect_anomaly": True}
    assert config["trainer"]["callbacks"][0] == {"_target_": "mine.Count", "path": "count.json"}


def test_command_of_the_documentation(
    base: list[str], cli: Callable[..., Any], tmp_path: Path
) -> None:
    (command,) = (
        words for words in bash_commands("training.md") if "trainer.callbacks" in str(words)
    )
    assert command[:2] == ["siftclip", "train"]
    words = [word for word in command[2:] if not word.startswith(("pool.root", "selector="))]
    result = cli("train", *base, *words)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (tmp_path / "logs").is_dir()
    assert [*tmp_path.glob("fit-times*")]


def test_state_of_a_callback_resumes_with_the_run(
    base: list[str], cli: Callable[..., Any], tmp_path: Path
) -> None:
    # the file of the class says where to stop: an argument would make it another run
    stopping = OWN_CALLBACK.replace("stop_at=None", "stop_at=4")
    (tmp_path / "mine.py").write_text(stopping)
    words = ["trainer.callbacks=[{_target_:mine.Count,path:count.json}]"]
    words += ["trainer.checkpoint_every_n_steps=3"]
    result = cli("train", *base, *words)
    assert "stop here" in result.stderr
    (tmp_path / "mine.py").write_text(OWN_CALLBACK)
    result = cli("train", *base, *words)
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads((tmp_path / "count.json").read_text())["seen"] == 6
    (run,) = (tmp_path / "outputs" / "train").iterdir()
    assert "continuing from" in result.stderr
    assert [r["step"] for r in read_jsonl(run / "metrics.jsonl") if "train/loss" in r][-1] == 6


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "trainer.callbacks=[{_target_:lightning.pytorch.callbacks.LearningRateMonitr}]",
            r"trainer\.callbacks\.0\._target_ must be .*Did you mean .*LearningRateMonitor\?",
        ),
        ("trainer.loggers=[{save_dir:logs}]", r"trainer\.loggers needs a _target_"),
        ("trainer.callbacks=3", r"trainer\.callbacks must be a list of nodes with a _target_"),
        (
            "trainer.options.accumulate_grad_batches=2",
            r"trainer\.options\.accumulate_grad_batches is refused\..*trainer\.micro_batch_size",
        ),
        ("trainer.options.detect_anomly=true", r"Did you mean trainer\.options\.detect_anomaly\?"),
    ],
)
def test_command_refuses_at_once(
    word: str, message: str, base: list[str], cli: Callable[..., Any], tmp_path: Path
) -> None:
    result = cli("train", *base, word)
    assert result.returncode == 2
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "outputs").exists()


# ---- what is built, and what is not -------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("callbacks", "lightning.pytorch.loggers.CSVLogger", "must be a lightning.pytorch.Callb"),
        ("callbacks", "builtins.dict", r"callbacks\.0 must be .* Got builtins\.dict"),
        ("callbacks", "torch.nn.Linear", r"trainer\.callbacks\.0\.in_features must be given"),
        (
            "plugins",
            "lightning.pytorch.plugins.io.TorchCheckpointIO",
            "TorchCheckpointIO would write the checkpoints.*Leave it out",
        ),
    ],
)
def test_wrong_objects_are_refused(
    name: str, target: str, message: str, base: list[str], compose: Callable[..., Any]
) -> None:
    node = f"+trainer.{name}=[{{_target_:{target}}}]"
    if target.endswith("CSVLogger"):
        node = node.replace("}]", ",save_dir:logs}]")
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, node]))


def test_a_progress_bar_of_the_users_replaces_ours(
    base: list[str], compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Bar(RichProgressBar):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            super().on_train_start(trainer, module)
            seen.extend(type(callback).__name__ for callback in trainer.callbacks)

    monkeypatch.setattr("lightning.pytorch.callbacks.RichProgressBar", Bar)
    words = [
        "progress=true",
        "+trainer.callbacks=[{_target_:lightning.pytorch.callbacks.RichProgressBar}]",
    ]
    train_stage(compose("train", [*base, *words]))
    assert seen == ["StopOnSignal", "Bar", "StepCheckpoint"]


def test_arguments_reach_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # which Lightning sets
    try:
        plain = trainer_of(settings(), tmp_path)
        assert (plain._detect_anomaly, torch.backends.cudnn.benchmark) == (False, True)
        options = {"detect_anomaly": True, "enable_model_summary": True}
        changed = trainer_of(settings(options=options, deterministic=True), tmp_path)
        assert changed._detect_anomaly
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == (
            True,
            False,
        )
        assert any(isinstance(callback, ModelSummary) for callback in changed.callbacks)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_a_precision_among_the_plugins_replaces_ours(tmp_path: Path) -> None:
    name = "lightning.pytorch.plugins.precision.DoublePrecision"
    plugins = [{"_target_": name}]
    assert isinstance(trainer_of(settings(plugins=plugins), tmp_path).precision_plugin, Precision)
    assert trainer_of(settings(plugins=plugins), tmp_path).precision == "64-true"
    with pytest.raises(InputError, match=r"trainer\.precision=32-true and a precision among"):
        trainer_of(settings(plugins=plugins, precision="32-true"), tmp_path)


def test_every_argument_of_the_trainer_is_decided() -> None:
    known = set(inspect.signature(lightning.Trainer).parameters)
    assert known == REFUSED.keys() | PASSING
    for name in PASSING:
        assert settings(options={name: True}).options == {name: True}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusals_say_why_and_what_to_use(name: str) -> None:
    with pytest.raises(InputError, match=rf"^trainer\.options\.{name} is refused\. [A-Z].*\.$"):
        settings(options={name: 1})


def test_unknown_and_several_wrong_arguments() -> None:
    with pytest.raises(InputError, match=r"is no argument of lightning\.Trainer\. What passes is"):
        settings(options={"xyz": 1})
    with pytest.raises(InputError, match=r"max_steps is refused[^\n]*\n  .*barebones is refused"):
        settings(options={"max_steps": 1, "barebones": True})


# ---- what a run is known by ---------------------------------------------------------------------
def test_callbacks_and_plugins_make_another_run_and_the_rest_does_not(
    base: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    def run(*words: str) -> RunDir:
        return train_stage(compose("train", [*base, *words]))

    plain = run()
    observed = run(
        f"+trainer.loggers=[{{_target_:lightning.pytorch.loggers.CSVLogger,save_dir:{tmp_path}}}]",
        "+trainer.options={detect_anomaly:true}",
        "+trainer.profiler={_target_:lightning.pytorch.profilers.PassThroughProfiler}",
    )
    assert observed.path == plain.path
    other = run("+trainer.callbacks=[{_target_:lightning.pytorch.Callback}]")
    assert other.path != plain.path
    kept = other.identity()
    assert kept is not None
    assert kept["callbacks"] == [{"_target_": "lightning.pytorch.Callback"}]


def test_records_of_other_runs_stay_as_they_were() -> None:
    plain = settings()
    assert extensions_identity(plain) == {}
    new = {"callbacks", "loggers", "plugins", "profiler", "options"}
    assert not new & to_plain(plain).keys()
    nodes = [{"_target_": "a.B"}]
    used = settings(callbacks=nodes, plugins=nodes, loggers=nodes)
    assert extensions_identity(used) == {"callbacks": nodes, "plugins": nodes}


# ---- what a run's files say is never built ------------------------------------------------------
class Trap(Callback):
    """Built by nobody, if all is well."""

    def __init__(self) -> None:
        raise AssertionError("a file of a run has named what is executed")


def test_files_of_a_run_build_nothing(
    base: list[str],
    compose: Callable[..., Any],
    demo_data: DemoData,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("lightning.pytorch.callbacks.Timer", Trap)
    trap = {"_target_": "lightning.pytorch.callbacks.Timer"}
    words = [*base, "trainer.checkpoint_every_n_steps=3", "trainer.keep_checkpoints=2"]
    run = train_stage(compose("train", words))
    nodes = {"callbacks": [trap], "loggers": [trap], "plugins": [trap], "profiler": trap}
    config = OmegaConf.load(run.path / "config.yaml")
    for place in ("trainer", "model", "eval"):
        config[place] = {**config[place], **nodes}
    OmegaConf.save(OmegaConf.merge(config, nodes), run.path / "config.yaml")
    for name in ("model.json", "versions.json"):
        values = json.loads((run.path / name).read_text())
        (run.path / name).write_text(json.dumps({**values, **nodes, **trap}))
    # exported, evaluated, found as finished, and resumed from its first checkpoint
    export = [f"export.source={run.path}", f"export.path={tmp_path / 'model.pt'}"]
    export_stage(compose("export", export).export)
    assert train_stage(compose("train", words)).path == run.path
    of_eval = [f"model.name={run.path}", f"eval.root={demo_data.tasks}", "trainer.accelerator=cpu"]
    of_eval += ["progress=false", "data.num_workers=0", f"output_dir={tmp_path}"]
    eval_stage(compose("eval", of_eval), run.path, results_path=tmp_path / "results.jsonl")
    train_stage(compose("train", [*words, f"run_dir={tmp_path / 'other'}"]))
    other = tmp_path / "other"
    (other / "config.yaml").write_text((run.path / "config.yaml").read_text())
    (other / "summary.json").unlink()
    shutil.rmtree(other / "model")
    (other / "checkpoints" / "step-6.ckpt").unlink()
    resumed = train_stage(compose("train", [*words, f"run_dir={other}"]))
    assert resumed.summary is not None
