"""Runs that select at every step: against plain runs, a loop by hand, other ranks, and kills."""

from __future__ import annotations

import functools
import signal
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.streaming.batches import Batch, SampleDataset, StepBatch
from siftclip.datamodules.streaming.order import SampleOrder
from siftclip.errors import InputError
from siftclip.files import read_json, read_jsonl
from siftclip.trainer.builders.selection import select_stage
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.loop.module import ClipTraining
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients
from siftclip.trainer.optim.optimizer import make_optimizer
from siftclip.trainer.optim.schedules import lr_factor
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]
EVERY_STEP = [
    "selector=random",
    "selector.fraction=1",
    "online=every_step",
    "online.diagnostics.record_chosen=true",
]
JEST = [*EVERY_STEP, "online.selector.fraction=0.25"]
UNIFORM = [*EVERY_STEP, "selector@online.selector=random", "online.selector.fraction=0.5"]


def records(run: RunDir) -> dict[int, dict[str, float]]:
    """What was logged at each step; of steps that were repeated, the last."""
    found = read_jsonl(run.path / "metrics.jsonl")
    return {r["step"]: r for r in found if "train/loss" in r}


def losses(run: RunDir) -> dict[int, float]:
    return {step: record["train/loss"] for step, record in records(run).items()}


def chosen(run: RunDir) -> np.ndarray:
    return np.asarray(np.load(run.path / "chosen.npy"))


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return dict(load_clip_model(str(run.path)).model.state_dict())


def same_weights(first: RunDir, second: RunDir) -> bool:
    ours, theirs = weights(first), weights(second)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_filter_ratio_0_is_plain_training_to_the_bit(
    base: list[str], compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    whole = ["selector=random", "selector.fraction=1"]
    once = train_stage(compose("train", [*base, *whole]))
    assert "has no effect" not in caplog.text
    off = train_stage(compose("train", [*base, *JEST, "online.schedule.filter_ratio=0"]))
    assert "so that online.selector has no effect" in caplog.text
    assert losses(off) == losses(once)
    assert same_weights(off, once)
    late = ["online.schedule.warmup_steps=4", "trainer.log_every_n_steps=1"]
    warm = train_stage(compose("train", [*base, *JEST, *late]))
    first = {step: loss for step, loss in losses(once).items() if step <= 4}
    assert {step: loss for step, loss in losses(warm).items() if step <= 4} == first
    assert np.array_equal(chosen(warm)[:4], chosen(off)[:4])
    assert not np.array_equal(chosen(warm)[4:], chosen(off)[4:])


def test_only_the_chosen_are_kept_for_training(
    base: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: list[weakref.ref[torch.Tensor]] = []
    ends = []
    keep, end = StepBatch.keep, ClipTraining.on_train_batch_end

    def note_read(self: StepBatch, chosen: Sequence[Batch]) -> None:
        images[:] = [weakref.ref(part.images) for part in self.micro_batches]
        keep(self, chosen)

    def note_end(self: ClipTraining, outputs: Any, batch: StepBatch, batch_idx: int) -> None:
        trained = sum(len(part.images) for part in batch.micro_batches)
        ends.append((batch.samples, trained, sum(image() is not None for image in images)))
        end(self, outputs, batch, batch_idx)

    monkeypatch.setattr(StepBatch, "keep", note_read)
    monkeypatch.setattr(ClipTraining, "on_train_batch_end", note_end)
    train_stage(compose("train", [*base, *JEST]))
    # 64 in four parts are read, 16 are trained on; the loader still has the part that came last
    assert ends[-1] == (64, 16, 1)


def test_uniform_choice_equals_training_on_that_subset(base: list[str], compose: Compose) -> None:
    """The rows of each step, recorded by the run, trained on in a loop written by hand."""
    config = compose("train", [*base, *UNIFORM, "optim.eps=1e-4"])
    run = train_stage(config)
    selected = select_stage(config)
    torch.manual_seed(config.common.seed)
    clip = load_clip_model("twin", architecture=to_plain(config.model.architecture))
    clip.model.output_dict = True  # type: ignore[assignment]
    dataset = SampleDataset(
        reader=SampleReader(pool=selected.pool, max_image_pixels=10**6),
        transform=clip.train_transform,
        tokenizer=clip.tokenizer,
        seed=config.common.seed,
        substitutes=selected.rows,
    )
    order = SampleOrder(rows=selected.rows, seed=config.common.seed, global_batch=32)
    optim = config.optim
    optimizer = make_optimizer(clip.model, optim, fused=True)
    found = []
    for step, kept in enumerate(chosen(run)):
        positions, rows = order.batch(step)
        at = np.flatnonzero(np.isin(rows, kept))
        assert len(at) == 16
        requests = list(zip(positions[at].tolist(), rows[at].tolist(), strict=True))
        batch = StepBatch([dataset.__getitems__(requests)])
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * lr_factor(optim, step, 6)
        optimizer.zero_grad()
        clip.model.train()
        terms = compute_gradients(
            clip.model, Objective(loss=SoftmaxLoss()), batch.micro_batches, StepContext()
        )
        optimizer.step()
        found.append(terms["loss"].item())
    assert list(losses(run).values()) == pytest.approx(found, rel=1e-5)
    # different samples at every step, half of what was drawn
    assert len(np.unique(chosen(run))) > 80
    last = records(run)[6]
    assert [last[f"cost/{name}_samples"] for name in ("drawn", "loaded", "scored", "trained")] == [
        192, 96, 0, 96,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(JEST, id="jest"),
        pytest.param(
            [*EVERY_STEP, "selector@online.selector=learnability",
             "online.schedule.temperature=0.5", "online.schedule.uniform_fraction=0.25"],
            id="learnability, sampled",
        ),
        pytest.param(
            [*EVERY_STEP, "selector@online.selector=negcliploss", "online.selector.fraction=0.5"],
            id="negcliploss",
        ),
        pytest.param(
            [*EVERY_STEP, "selector@online.selector=running_vas", "online.selector.fraction=0.5"],
            id="running covariance",
        ),
        pytest.param(
            [*JEST, "online.weights=ema", "optim.ema_decay=0.9", "online.scoring.image_size=24",
             "online.scoring.precision=bf16", "trainer.micro_batch_size=4"],
            id="jest, cheap scoring by the average",
        ),
        pytest.param(
            [*JEST, "online.selector.learner.name=scorer", "online.scorer.name=tiny",
             "+online.scorer.architecture=${model.architecture}"],
            id="small scorer",
        ),
    ],
)  # fmt: skip
def test_methods_choose_equal_shares_and_continue(
    options: list[str], base: list[str], compose: Compose, tmp_path: Path
) -> None:
    """Stopped after step 5, the checkpoint of step 3 gives the same ids and losses."""
    shared = [*base, *options, "trainer.checkpoint_every_n_steps=3"]
    whole = train_stage(compose("train", [*shared, f"run_dir={tmp_path / 'whole'}"]))
    rows = chosen(whole)
    assert rows.shape == (6, 16)
    assert (rows >= 0).all()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(RuntimeError, match="stop here"):
            train_stage(compose("train", [*shared, f"run_dir={tmp_path / 'cut'}"]))
    continued = train_stage(compose("train", [*shared, f"run_dir={tmp_path / 'cut'}"]))
    assert np.array_equal(chosen(continued), rows)
    assert losses(continued) == losses(whole)
    assert same_weights(continued, whole)
    for name in ("online/unique_samples", "online/score_chosen_q50", "online/scorer_loss"):
        assert records(continued)[6].get(name) == records(whole)[6].get(name)
    seconds = whole.summary
    assert seconds is not None
    parts = ("data_wait_seconds", "scoring_seconds", "selection_seconds")
    assert 0 < sum(seconds[part] for part in parts) < seconds["train_seconds"]


def stop_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let a run fail when it logs a step."""
    from siftclip.trainer.runtime.loggers import FileLogger

    original = FileLogger.log_metrics

    def fail(self: FileLogger, metrics: Any, step_now: int | None = None, **named: Any) -> None:
        number = named.get("step", step_now)
        if number == step:
            raise RuntimeError("stop here")
        original(self, metrics, number)

    patch.setattr(FileLogger, "log_metrics", fail)


def wait_for_checkpoint(folder: Path, step: int, process: Any) -> None:
    """Wait until a run below `folder` has the checkpoint of a step, while its process lives."""
    deadline = time.monotonic() + 120
    while not any(folder.glob(f"train/*/checkpoints/step-{step}.ckpt")):
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_run_continues_with_the_same_choices(
    base: list[str],
    compose: Compose,
    start_cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    options = [*base, *JEST, "scale.samples_seen=640", "trainer.checkpoint_every_n_steps=7"]
    whole = train_stage(compose("train", [*options, f"output_dir={tmp_path / 'whole'}"]))
    process = start_cli("train", *options)
    wait_for_checkpoint(tmp_path / "outputs", 14, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    continued = train_stage(compose("train", [*options, "data.num_workers=1"]))
    assert np.array_equal(chosen(continued), chosen(whole))
    assert losses(continued) == losses(whole)
    assert same_weights(continued, whole)


def test_scoring_forward_is_reused_by_micro_batches(
    base: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = [*base, *JEST, "trainer.micro_batch_size=8"]
    reusing = train_stage(compose("train", [*options, f"run_dir={tmp_path / 'reusing'}"]))
    monkeypatch.setattr(
        "siftclip.trainer.builders.online_setup.scoring_is_forward", lambda *_: False
    )
    twice = train_stage(compose("train", [*options, f"run_dir={tmp_path / 'twice'}"]))
    assert np.array_equal(chosen(reusing), chosen(twice))
    assert losses(reusing) == pytest.approx(losses(twice), rel=1e-5)


ON_RANKS = {
    "jest": JEST,
    "learnability": [
        *EVERY_STEP,
        "selector@online.selector=learnability",
        "online.selector.loss=softmax",
        "online.selector.fraction=0.25",
        "online.schedule.uniform_fraction=0.5",
    ],
    "uniform": UNIFORM,
    "scorer": [
        *JEST,
        "online.selector.learner.name=scorer",
        "online.scorer.name=tiny",
        "+online.scorer.architecture=${model.architecture}",
    ],
    "running covariance": [
        *EVERY_STEP,
        "selector@online.selector=running_vas",
        "online.selector.fraction=0.5",
    ],
    "again": [
        "selector=random",
        "selector.fraction=0.9",
        "online=every_n_steps",
        "online.every_n_steps=2",
        "online.pool_fraction=0.5",
        "online.selector.fraction=0.2",
    ],
    "infobatch": [
        "selector=random",
        "selector.fraction=0.2",
        "scale.samples_seen=160",
        "online=every_epoch",
    ],
}


SHARED = ["optim.eps=1e-3", "trainer.micro_batch_size=4"]


def options_on_ranks(name: str) -> list[str]:
    """With equally many groups; micro-batches, so that every forward has the same shape."""
    own = ON_RANKS[name]
    groups = ["online.groups=4"] if "online=every_step" in own else []
    return [*SHARED, *own, *groups]


@pytest.fixture(scope="module")
def alone(
    base_of: Any, composing: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], RunDir]:
    """`alone(name)`: what one rank makes of a method."""
    root = tmp_path_factory.mktemp("alone")

    @functools.cache
    def train(name: str) -> RunDir:
        with composing() as compose:
            options = [*base_of(root / name), *options_on_ranks(name)]
            return train_stage(compose("train", options))

    return train


# Every method on one number of ranks, and one that scores and one that selects anew on both; all on
# all in a nightly run
ON_SO_MANY = {
    2: ("jest", "running covariance", "again", "infobatch"),
    4: ("jest", "learnability", "uniform", "scorer", "again"),
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ON_SO_MANY)
def test_choices_do_not_depend_on_the_ranks(
    ranks: int, launch_methods: Callable[[Sequence[str], int], None]
) -> None:
    assert {*ON_SO_MANY[2], *ON_SO_MANY[4]} == {*ON_RANKS}
    launch_methods(ON_SO_MANY[ranks], ranks)


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", ON_SO_MANY)
def test_no_choice_depends_on_the_ranks(
    ranks: int, launch_methods: Callable[[Sequence[str], int], None]
) -> None:
    launch_methods([*ON_RANKS], ranks)


@pytest.fixture
def launch_methods(
    alone: Callable[[str], RunDir],
    base: list[str],
    compose_tree: Callable[..., DictConfig],
    train_on_ranks: Callable[[list[Any], int], None],
    tmp_path: Path,
) -> Callable[[Sequence[str], int], None]:
    """`launch_methods(names, ranks)`: methods on so many ranks, compared with one."""

    def launched(names: Sequence[str], ranks: int) -> None:
        configs = [
            OmegaConf.to_container(
                compose_tree(
                    "train", [*base, *options_on_ranks(name), f"run_dir='{tmp_path / name}'"]
                )
            )
            for name in names
        ]
        train_on_ranks(configs, ranks)
        for name in names:
            compare_choices(name, alone(name), RunDir(path=tmp_path / name))

    return launched


def compare_choices(name: str, expected: RunDir, run: RunDir) -> None:
    """Require the same losses, the same samples of each step, and the same selections."""
    assert losses(run) == pytest.approx(losses(expected), rel=1e-4), name
    if (expected.path / "chosen.npy").is_file():
        assert np.array_equal(np.sort(chosen(run)), np.sort(chosen(expected))), name
    for manifest in expected.path.glob("selections/*/selection.json"):
        same = run.path / manifest.relative_to(expected.path)
        assert read_json(same)["digest"] == read_json(manifest)["digest"], name


def test_cached_selectors_choose_before_anything_is_read(
    base: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = SampleReader.read

    def spy(reader: SampleReader, rows: np.ndarray) -> Any:
        read.extend(np.asarray(rows).tolist())
        return original(reader, rows)

    monkeypatch.setattr(SampleReader, "read", spy)
    early = [
        "selector@online.selector=easy_reference",
        "online.selector.loss=softmax",
        "online.selector.fraction=0.25",
        "online.diagnostics.record_chosen=false",
    ]
    run = train_stage(compose("train", [*base, *EVERY_STEP, *early]))
    assert len(read) == 96
    last = records(run)[6]
    assert last["cost/drawn_samples"] == 4 * 96
    assert last["cost/loaded_samples"] == last["cost/trained_samples"] == 96
    assert last["cost/scoring_flops"] == 0


def test_first_stage_narrows_what_is_scored(base: list[str], compose: Compose) -> None:
    first = ["selector@online.first_stage.selector=easy_reference"]
    options = [*JEST, *first, "online.first_stage.filter_ratio=0.5"]
    options.append("online.first_stage.selector.loss=softmax")
    last = records(train_stage(compose("train", [*base, *options])))[6]
    names = ("drawn", "loaded", "scored", "trained")
    found = [last[f"cost/{name}_samples"] for name in names]
    assert found == [8 * 96, 4 * 96, 4 * 96, 96]


def test_truth_and_clusters_are_described(
    base: list[str], compose: Compose, demo_data: DemoData
) -> None:
    options = [*JEST, f"online.diagnostics.truth={demo_data.truth}", "selector=clip_score"]
    last = records(train_stage(compose("train", [*base, *options])))[6]
    shares = {k: v for k, v in last.items() if k.startswith("online/share_")}
    offered = [value for name, value in shares.items() if name.endswith("_offered")]
    assert sum(offered) == pytest.approx(1)
    assert sum(shares.values()) == pytest.approx(2)
    assert 0 <= last["online/offline_overlap"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["online.cadence=often"], r"online\.cadence must be one of"),
        (["online.groups=3"], r"online\.groups must be a multiple of the devices and divide"),
        (["online.weights=ema"], r"online\.weights=ema needs an average"),
        (["online.schedule.filter_ratio=1"], r"online\.schedule\.filter_ratio"),
        (["selector@online.selector=vas_d", "online.selector.fraction=0.2"],
         r"decides by itself how many samples"),
        (["online.selector.learner.name=scorer"], r"name a small model with online\.scorer\.name"),
        (["online.reference.features.name=unknown"], r"'unknown_img'"),
        (["online.scoring.image_size=25"], r"online\.scoring\.image_size"),
        (["selector@online.first_stage.selector=negcliploss"], r"which nobody has before"),
        (["budget.flops=1e9", "budget.seconds=3"], r"Only one of budget"),
        (["budget.seconds=-1"], r"budget\.seconds"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(
    options: list[str], message: str, base: list[str], compose: Compose
) -> None:
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, *EVERY_STEP, *options]))
