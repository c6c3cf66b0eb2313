"""ClipTraining in anybody's Trainer: its defaults, and batches of any loader."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import open_clip
import pytest
import torch
from doc_examples import python_blocks, run_code
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from siftclip.datamodules import LoaderOptions, SelectedPairs, StreamDataModule, as_dict
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.streaming.batches import Batch
from siftclip.errors import InputError, ParameterError
from siftclip.trainer import ClipTraining, SoftmaxLoss
from siftclip.trainer.loop.plain_batches import step_batch_of
from siftclip.trainer.optim.gradients import Objective
from siftclip.trainer.settings.optim import OptimSettings

# Lightning's, of torch's tree functions
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

SCRIPT = Path(__file__).with_name("clip_on_ranks.py")
BATCH, STEPS = 8, 6
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
STREAM = {
    "transform": v2.Compose(
        [v2.PILToTensor(), v2.RandomResizedCrop(16), v2.ToDtype(torch.float32, scale=True)]
    ),
    "tokenizer": open_clip.SimpleTokenizer(context_length=12),
    "seed": 0,
}


@pytest.fixture
def pool(make_samples: Any, write_pool: Any, load_pool: Any) -> Pool:
    return load_pool(write_pool(make_samples(20), shards=2))


@pytest.fixture
def pairs(pool: Pool) -> SelectedPairs:
    return SelectedPairs(pool, batch_size=BATCH, num_workers=0, **STREAM)


@pytest.fixture
def stream(pool: Pool) -> StreamDataModule:
    return StreamDataModule(
        pool=pool,
        rows=torch.arange(20).numpy(),
        global_batch_size=BATCH,
        total_steps=STEPS,
        loader=LoaderOptions(num_workers=0),
        max_image_pixels=10_000,
        max_bad_fraction=0.0,
        **STREAM,
    )


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(3)
    return open_clip.CLIP(**ARCHITECTURE)


@pytest.fixture
def fit(model: torch.nn.Module, tmp_path: Path) -> Callable[..., ClipTraining]:
    """`fit(data, options of ClipTraining, ckpt_path=..., options of the Trainer)`: the module."""

    def train(
        data: Any, options: Any = None, *, ckpt_path: Path | None = None, **of_trainer: Any
    ) -> ClipTraining:
        module = ClipTraining(copy.deepcopy(model), **(options or {}))
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = lightning.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            **{"enable_checkpointing": False, **quiet, **of_trainer},
        )
        given = {"datamodule" if hasattr(data, "train_dataloader") else "train_dataloaders": data}
        trainer.fit(module, **given, ckpt_path=ckpt_path, weights_only=True)
        return module

    return train


def assert_same_weights(first: ClipTraining, second: ClipTraining) -> None:
    one, other = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_defaults_are_open_clips_recipe_for_the_trainers_steps(
    fit: Callable[..., ClipTraining], stream: StreamDataModule, pairs: SelectedPairs
) -> None:
    told = {
        "objective": Objective(loss=SoftmaxLoss()),
        "optim": OptimSettings(),
        "total_steps": STEPS,
        "global_batch_size": BATCH,
        "seed": 0,
        "log_every_n_steps": 1,
    }
    expected = fit(stream, told, max_steps=STEPS, max_epochs=-1)
    found = fit(pairs, max_steps=STEPS)
    assert (found.total_steps, found.global_batch_size) == (STEPS, BATCH)
    assert_same_weights(found, expected)
    assert_same_weights(fit(stream, max_steps=STEPS), expected)
    named = SelectedPairs(pairs.pool, batch_size=BATCH, num_workers=0, form=as_dict, **STREAM)
    assert_same_weights(fit(named, max_epochs=2), expected)  # of three batches each
    (stopped, whole) = (fit(stream, max_steps=steps) for steps in (2, 99))
    assert (stopped.total_steps, whole.total_steps) == (2, STEPS)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_any_loader_of_pairs(fit: Callable[..., ClipTraining], pairs: SelectedPairs) -> None:
    stream = pairs.loader()
    batches = [batch for _ in range(2) for batch in stream]
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is enough
    assert_same_weights(fit(loader, max_epochs=1), fit(pairs, max_epochs=2))


def test_example_of_the_documentation(
    model: torch.nn.Module, pairs: SelectedPairs, fit: Callable[..., ClipTraining], tmp_path: Path
) -> None:
    (example,) = (code for code in python_blocks("training.md") if "ClipTraining(model)" in code)
    quiet = "logger=False, enable_checkpointing=False, accelerator='cpu', max_steps"
    names: dict[str, Any] = {"model": copy.deepcopy(model), "pairs": pairs}
    run_code(example.replace("max_steps", quiet), names)
    assert_same_weights(names["module"], fit(pairs, max_steps=STEPS))


# Lightning's, which looks for a state of its own before the step
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_run_in_a_strangers_trainer_resumes_in_the_middle_of_a_pass(
    fit: Callable[..., ClipTraining], pairs: SelectedPairs, tmp_path: Path
) -> None:
    def options() -> dict[str, Any]:
        saver = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4, save_top_k=-1)
        return {"max_steps": STEPS, "callbacks": [saver], "enable_checkpointing": True}

    whole = fit(pairs, **options())
    (kept,) = (tmp_path / "kept").iterdir()
    assert_same_weights(fit(pairs, ckpt_path=kept, **options()), whole)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_a_strangers_checkpoint_may_be_of_weights_alone(
    fit: Callable[..., ClipTraining], pairs: SelectedPairs, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4, save_weights_only=True)
    fit(pairs, max_steps=STEPS, callbacks=[saver], enable_checkpointing=True)
    (path,) = (tmp_path / "kept").iterdir()
    kept = torch.load(path, weights_only=True)
    assert kept["state_dict"]
    assert "optimizer_states" not in kept


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_records_go_to_the_trainers_loggers_as_often_as_it_says(
    fit: Callable[..., ClipTraining], pairs: SelectedPairs, tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(pairs, max_steps=STEPS, logger=logger, log_every_n_steps=4)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert [line for line in lines[0].split(",") if line == "train/loss"]
    steps = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [row["step"] for row in steps] == ["4", "6"]
    assert float(steps[-1]["train/samples_seen"]) == STEPS * BATCH


def test_bad_samples_are_in_the_records_and_told_at_the_end(
    fit: Callable[..., ClipTraining],
    make_samples: Any,
    write_pool: Any,
    load_pool: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = make_samples(20)
    samples[3].caption = b""
    pool = load_pool(write_pool(samples, folder="spoilt"))
    pairs = SelectedPairs(pool, batch_size=BATCH, num_workers=0, max_bad_fraction=0.1, **STREAM)
    latest = fit(pairs, max_epochs=1).latest
    assert (latest["data/bad_samples"], latest["data/copies_fraction"]) == (1.0, 0.0)
    assert "training replaced 1 bad samples: 1 with an empty caption" in caplog.text


@pytest.mark.slow
def test_two_ranks_train_as_one(
    make_samples: Any, write_pool: Any, run_python: Callable[..., Any], tmp_path: Path
) -> None:
    root = write_pool(make_samples(20), shards=2)
    for ranks in (None, 2):
        result = run_python(str(SCRIPT), str(root), str(tmp_path), cwd=tmp_path, ranks=ranks)
        assert result.returncode == 0, result.stderr[-4000:]
    one, two = (json.loads((tmp_path / f"of-{ranks}.json").read_text()) for ranks in (1, 2))
    assert one["global_batch_size"] == 8
    assert two == pytest.approx(one, rel=1e-4)


def test_a_trainer_without_an_end_is_refused(
    fit: Callable[..., ClipTraining], pairs: SelectedPairs
) -> None:
    with pytest.raises(InputError, match=r"Got inf\. Give Trainer\(max_steps=\.\.\.\)"):
        fit(pairs, max_epochs=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every_n_steps": 0}, "ClipTraining: log_every_n_steps must be an integer of at"),
        ({"max_skipped_fraction": 2}, r"ClipTraining: max_skipped_fraction must be in .*Got 2"),
    ],
)
def test_numbers_are_checked(model: torch.nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ClipTraining(model, **options)


@pytest.mark.parametrize("batch", ["abc", (1,), ([1], [2]), {"images": 1}, {"pixel_values": 1}])
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    with pytest.raises(InputError, match=r"A batch must be a tuple \(images, tokens\), or a map"):
        step_batch_of(batch)


def test_pixels_of_pairs_train_as_floats_do(fit: Callable[..., ClipTraining], pool: Pool) -> None:
    transform = open_clip.image_transform(16, is_train=False)
    options = {"batch_size": BATCH, "num_workers": 0, **STREAM, "transform": transform}
    floats, pixels = (
        SelectedPairs(pool, finished=finished, **options) for finished in (True, False)
    )
    assert_same_weights(fit(pixels, max_steps=2), fit(floats, max_steps=2))
    batch = next(iter(pixels.loader()))
    assert batch[0].dtype == torch.uint8
    with pytest.raises(
        InputError, match=r"images of a batch must be floats, normalised\. Got uint8"
    ):
        step_batch_of(batch)


def test_rows_and_weights_are_taken_over() -> None:
    images, tokens = torch.rand(2, 3, 4, 4), torch.ones(2, 5, dtype=torch.int64)
    plain: dict[str, Tensor] = {"images": images, "tokens": tokens}
    (part,) = step_batch_of(plain).micro_batches
    assert (part.rows.tolist(), part.copies, part.weights) == ([-1, -1], False, None)
    more = {"rows": torch.tensor([4, 4]), "weights": torch.tensor([1.0, 2.0])}
    (part,) = step_batch_of({**plain, **more}).micro_batches
    assert isinstance(part, Batch)
    assert (part.rows.tolist(), part.copies) == ([4, 4], True)
    assert part.weights is more["weights"]
