"""A run whose last checkpoint is damaged continues from the one before, each step logged once."""

from __future__ import annotations

import logging
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from siftclip.datamodules.models.load import load_clip_model
from siftclip.errors import InputError
from siftclip.files import read_jsonl
from siftclip.trainer.loop.resuming import checkpoint_fault
from siftclip.trainer.runtime.loggers import FileLogger
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import train_stage

STEPS = ["scale.samples_seen=256", "trainer.checkpoint_every_n_steps=4"]  # 16 steps


class StoppedError(Exception):
    """In place of a kill."""


def records(run: RunDir) -> list[tuple[int, dict[str, Any]]]:
    """All that the log says, but for what is a matter of time."""
    return [
        (
            record["step"],
            {
                key: value
                for key, value in record.items()
                if not any(word in key for word in ("time", "second", "memory", "data_wait"))
            },
        )
        for record in read_jsonl(run.path / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def runs(base_of: Any, composing: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of 16 steps, whole, and the same stopped in step 11; and the options of both."""
    folder = tmp_path_factory.mktemp("runs")
    options = [*base_of(folder), *STEPS]
    original = FileLogger.log_metrics

    def stop(self: FileLogger, metrics: Any, step: int | None = None) -> None:
        if step == 11:
            raise StoppedError
        original(self, metrics, step)

    with composing() as compose:
        whole = train_stage(compose("train", [*options, f"run_dir={folder / 'whole'}"]))
        settings = compose("train", [*options, f"run_dir={folder / 'stopped'}"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FileLogger, "log_metrics", stop)
            with pytest.raises(StoppedError):
                train_stage(settings)
    stopped = RunDir(path=folder / "stopped")
    names = {path.name for path in stopped.checkpoints.iterdir()}
    assert names == {"step-4.ckpt", "step-8.ckpt"}
    return whole, stopped, options


@pytest.fixture
def run(runs: Any, tmp_path: Path) -> RunDir:
    """A copy of the stopped run."""
    return RunDir(path=Path(shutil.copytree(runs[1].path, tmp_path / "run")))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100_000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def blank_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[50_000:60_000] = bytes(10_000)
    path.write_bytes(data)


def other_content(path: Path) -> None:
    path.write_text("<html>404</html>")


class Intruder:
    """Would be made anew by code, when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Intruder()))


def pickle_in_it(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "extra": Intruder()}, path)


def changed(path: Path, **parts: Any) -> None:
    torch.save({**torch.load(path, weights_only=True), **parts}, path)


def other_step(path: Path) -> None:
    changed(path, global_step=3)


def no_optimizer(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    del content["optimizer_states"]
    torch.save(content, path)


def wrong_keys(path: Path) -> None:
    state = torch.load(path, weights_only=True)["state_dict"]
    changed(path, state_dict={f"{key}_": value for key, value in state.items()})


def another_model(path: Path) -> None:
    state = torch.load(path, weights_only=True)["state_dict"]
    changed(path, state_dict={**state, "model.text_projection": torch.zeros(3, 3)})


def tensor_alone(path: Path) -> None:
    torch.save(torch.zeros(3), path)


DAMAGES: dict[Callable[[Path], None], str] = {
    cut: "it is cut off, or no checkpoint",
    empty: "it is empty",
    blank_middle: "the checksum of",
    other_content: "it is cut off, or no checkpoint",
    pickled: "it is cut off, or no checkpoint",
    pickle_in_it: "it holds more than tensors",
    other_step: "it is of step 3",
    no_optimizer: "it has no optimizer_states",
    wrong_keys: "missing",
    another_model: "it is of another model: text_projection has the shape",
    tensor_alone: "it is no checkpoint of a run",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damage_is_found(damage: Any, run: RunDir) -> None:
    path = run.checkpoints / "step-8.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    shapes = {k[6:]: v.shape for k, v in state.items() if k.startswith("model.")}
    assert checkpoint_fault(path, shapes) is None
    damage(path)
    fault = checkpoint_fault(path, shapes)
    assert fault is not None
    assert DAMAGES[damage] in fault
    assert "\n" not in fault


@pytest.mark.parametrize("damage", [cut, pickle_in_it, another_model])
def test_a_damaged_last_checkpoint_is_set_aside(
    damage: Any, runs: Any, run: RunDir, compose: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _, options = runs
    damaged = run.checkpoints / "step-8.ckpt"
    damage(damaged)
    content = damaged.read_bytes()
    with caplog.at_level(logging.WARNING):
        train_stage(compose("train", [*options, f"run_dir={run.path}"]))
    (said,) = [r.getMessage() for r in caplog.records if "cannot be continued from" in r.message]
    assert (
        "step-8.ckpt.damaged, and the run continues from the checkpoint before, of step 4" in said
    )
    assert (run.checkpoints / "step-8.ckpt.damaged").read_bytes() == content
    assert records(run) == records(whole)  # each step once, with the same numbers
    expected = load_clip_model(str(whole.path)).model.state_dict()
    found = load_clip_model(str(run.path)).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_a_whole_checkpoint_one_line_says_what_to_do(
    runs: Any, run: RunDir, compose: Any
) -> None:
    whole, _, options = runs
    cut(run.checkpoints / "step-4.ckpt")
    empty(run.checkpoints / "step-8.ckpt")
    before = sorted((path.name, path.stat().st_size) for path in run.path.rglob("*.*"))
    words = [*options, f"run_dir={run.path}"]
    for _ in range(2):  # the same each time
        with pytest.raises(InputError) as caught:
            train_stage(compose("train", words))
        assert "step-8.ckpt: it is empty; step-4.ckpt: it is cut off" in str(caught.value)
        assert "with reuse=false" in str(caught.value)
        assert "\n" not in str(caught.value)
        after = sorted((path.name, path.stat().st_size) for path in run.path.rglob("*.*"))
        assert [name for name, _ in after] == [name for name, _ in before]
    train_stage(compose("train", [*words, "reuse=false"]))
    assert records(run) == records(whole)
    (aside,) = run.path.parent.glob("run.replaced-*")
    assert (aside / "metrics.jsonl").is_file()


@pytest.mark.parametrize("content", ["", '{"step": 4}\n', None])
def test_a_run_whose_log_is_lost_at_its_end_says_what_to_do(
    content: str | None, runs: Any, compose: Any, tmp_path: Path
) -> None:
    whole, _, options = runs
    run = RunDir(path=tmp_path / "run")
    shutil.copytree(whole.path, run.path)
    (run.path / "summary.json").unlink()
    shutil.rmtree(run.model)
    log = run.path / "metrics.jsonl"
    log.unlink() if content is None else log.write_text(content)
    for _ in range(2):  # the same each time, and no summary that nobody can read
        with pytest.raises(InputError, match=r"metrics\.jsonl has no record of .* reuse=false"):
            train_stage(compose("train", [*options, f"run_dir={run.path}"]))
        assert not (run.path / "summary.json").exists()
    shutil.copy(whole.path / "metrics.jsonl", log)
    assert train_stage(compose("train", [*options, f"run_dir={run.path}"])).is_finished


def test_a_log_with_a_number_as_text_is_told(runs: Any, compose: Any, run: RunDir) -> None:
    _, _, options = runs
    (run.path / "metrics.jsonl").write_text('{"step": "4"}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, record 1, cannot be: step"):
        train_stage(compose("train", [*options, f"run_dir={run.path}"]))


def test_a_checkpoint_that_cannot_be_read_now_is_left_alone(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run.checkpoints / "step-8.ckpt"

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("siftclip.trainer.loop.resuming.zipfile.ZipFile", refuse)
    with pytest.raises(InputError, match=r"step-8\.ckpt cannot be read: Permission denied"):
        checkpoint_fault(path, {})
    assert path.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_ranks_fall_back_to_the_same_checkpoint(
    launcher: str,
    runs: Any,
    run: RunDir,
    cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    whole, _, options = runs
    cut(run.checkpoints / "step-8.ckpt")
    words = ["train", *options, f"run_dir={run.path}"]
    if launcher == "torchrun":
        result = cli(*words, ranks=2)
    else:
        result = cli(*words, "trainer.devices=2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("the run continues from the checkpoint before, of step 4") == 1
    assert result.stderr.count("continuing from") >= 1
    assert "step-8.ckpt\n" not in result.stderr
    losses = [
        {step: values["train/loss"] for step, values in records(each) if "train/loss" in values}
        for each in (run, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(records(run)) == len(records(whole))


@pytest.mark.slow
def test_sharded_runs_fall_back_too(
    runs: Any, cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run = RunDir(path=tmp_path / "run")
    words = ["train", *runs[2], f"run_dir={run.path}", "trainer.strategy=fsdp"]
    assert cli(*words, ranks=2).returncode == 0
    before = records(run)
    shutil.rmtree(run.model)
    (run.path / "summary.json").unlink()
    blank_middle(run.checkpoints / "step-16.ckpt")
    result = cli(*words, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("the run continues from the checkpoint before, of step 12") == 1
    assert records(run) == before


@pytest.mark.slow
def test_ranks_end_together_where_no_checkpoint_is_whole(
    runs: Any, run: RunDir, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    for path in run.checkpoints.iterdir():
        cut(path)
    result = cli("train", *runs[2], f"run_dir={run.path}", ranks=2)
    assert result.returncode != 0
    assert "none of its checkpoints is whole" in result.stderr
    assert "Traceback" not in result.stderr.partition("torch/distributed")[0]


@pytest.mark.parametrize(
    "name",
    [
        *("identity.json", "budget.json", "versions.json", "sessions.jsonl", "model.json"),
        *("wandb_id", "config.yaml", "selection.json", "metrics.jsonl", ".lock"),
    ],
)
@pytest.mark.parametrize("blank", [b"", bytes(300)])
def test_files_that_a_power_cut_left_blank_end_no_run(
    name: str, blank: bytes, runs: Any, run: RunDir, compose: Any
) -> None:
    whole, _, options = runs
    (run.path / name).write_bytes(blank)
    train_stage(compose("train", [*options, f"run_dir={run.path}"]))
    expected = records(whole)[8:] if name == "metrics.jsonl" else records(whole)
    assert records(run) == expected


def test_records_of_a_finished_training_stand_once(
    runs: Any, compose: Any, tmp_path: Path, demo_data: Any
) -> None:
    """Killed between the evaluation and the summary, which the next start writes."""
    whole, _, options = runs
    run = RunDir(path=Path(shutil.copytree(whole.path, tmp_path / "run")))
    words = [*options, f"run_dir={run.path}", f"eval.root={demo_data.tasks}"]
    for _ in range(2):
        (run.path / "summary.json").unlink()
        train_stage(compose("train", words))
    keys = [(step, key) for step, values in records(run) for key in values if key != "step"]
    assert len(keys) == len(set(keys))
    assert any(key.startswith("eval/") for _, key in keys)
    assert records(run)[:16] == records(whole)[:16]


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_whose_identity_is_lost_answers_for_its_own_options_alone(
    finished: bool, runs: Any, compose: Any, tmp_path: Path
) -> None:
    run = RunDir(path=tmp_path / "run")
    shutil.copytree(runs[0 if finished else 1].path, run.path)
    (run.path / "identity.json").unlink()
    words = [*runs[2], f"run_dir={run.path}"]
    with pytest.raises(InputError, match=r"identity\.json is lost, and its config.*options: optim"):
        train_stage(compose("train", [*words, "optim.lr=0.0123"]))
    train_stage(compose("train", words))
    assert records(run) == records(runs[0])
