"""Selected pairs in training loops of others: Lightning's, open_clip's, Hugging Face's."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import open_clip
import pytest
import torch
from doc_examples import python_blocks, run_code
from torch import Tensor

from siftclip.datamodules.models.load import Tokenizer, Transform
from siftclip.errors import InputError

# what Lightning calls is deprecated in newer versions of torch
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

SCRIPT = Path(__file__).with_name("stranger.py")
Log = dict[int, list[Any]]


def read_log(folder: Path, rank: int) -> Log:
    """Uids and loss of each batch; of batches that were trained on twice, the last."""
    lines = (folder / f"log-{rank}.jsonl").read_text().splitlines()
    return {number: rest for number, *rest in map(json.loads, lines)}


@pytest.fixture
def run_stranger(
    make_samples: Any, write_pool: Any, run_python: Any, tmp_path: Path
) -> Callable[..., list[Log]]:
    """`run_stranger(name, stop_at=None, ...)`: the logs by rank of a run in a new folder."""
    root = write_pool(make_samples(20), shards=2)

    def run(
        name: str, *, stop_at: int | None = None, writes: str = "steps", ranks: int = 1
    ) -> list[Log]:
        folder = tmp_path / name
        folder.mkdir()
        words = [str(SCRIPT), str(root), str(folder), writes]
        launch = {"cwd": tmp_path, "ranks": None if ranks == 1 else ranks}
        if stop_at is not None:
            killed = run_python(*words, str(stop_at), **launch)
            assert killed.returncode != 0
            assert max(read_log(folder, 0)) == stop_at - 1
            assert (folder / "checkpoints" / "last.ckpt").exists()
        result = run_python(*words, **launch)
        assert result.returncode == 0, result.stderr[-4000:]
        assert "not resumable" not in result.stderr
        return [read_log(folder, rank) for rank in range(ranks)]

    return run


@pytest.mark.parametrize(
    ("writes", "stop_at"),
    # after one of three batches, at the end of an epoch, and twice in later epochs; where epochs
    # end; and while a batch is under way, which is then trained on again
    [
        ("steps", 2),
        ("steps", 5),
        ("steps", 7),
        ("steps", 8),
        ("epochs", 4),
        ("failures", 4),
        ("validations", 6),
    ],
)
def test_killed_lightning_run_continues_to_the_bit(
    run_stranger: Callable[..., list[Log]], writes: str, stop_at: int
) -> None:
    whole = run_stranger("whole")
    assert sorted(whole[0]) == list(range(9))
    assert len({loss for _, loss in whole[0].values()}) == 9
    assert run_stranger("killed", stop_at=stop_at, writes=writes) == whole


@pytest.mark.slow
def test_killed_lightning_run_on_two_ranks_continues_to_the_bit(
    run_stranger: Callable[..., list[Log]],
) -> None:
    alone = run_stranger("alone")
    whole = run_stranger("whole", ranks=2)
    assert run_stranger("killed", stop_at=4, ranks=2) == whole
    together = {n: whole[0][n][0] + whole[1][n][0] for n in range(9)}
    assert together == {n: uids for n, (uids, _) in alone[0].items()}


# ---- the examples in docs/streaming.md -----------------------------------------------------------
EXAMPLES = python_blocks("streaming.md")
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class Small(lightning.LightningModule):
    """Trains nothing to speak of, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.batches = torch.nn.Linear(3, 1), []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        images, _ = batch
        return self.layer(images.mean((2, 3))).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> Callable[..., lightning.Trainer]:
    def make(**options: Any) -> lightning.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return lightning.Trainer(
            accelerator="cpu", default_root_dir=tmp_path, **quiet, **{"max_epochs": 1, **options}
        )

    return make


@pytest.fixture
def names(
    make_samples: Any,
    write_pool: Any,
    load_pool: Any,
    transform: Transform,
    tokenizer: Tokenizer,
    quiet_trainer: Callable[..., lightning.Trainer],
    tmp_path: Path,
) -> dict[str, Any]:
    """What the examples call by name, of 20 samples: three batches an epoch."""
    torch.manual_seed(5)
    model = open_clip.CLIP(**ARCHITECTURE, output_dict=True)
    pool = load_pool(write_pool(make_samples(20), shards=2))
    seen: list[tuple[Tensor, Tensor]] = []
    return {
        "pool": pool,
        "selection": None,
        "transform": transform,
        "tokenizer": tokenizer,
        "trainer": quiet_trainer(),
        "module": Small(),
        "seen": seen,
        "train_on": lambda *batch: seen.append(batch),
        "model": model,
        "loss": open_clip.ClipLoss(),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "scheduler": lambda step: None,
        "folder": tmp_path / "state",
        "args": SimpleNamespace(
            device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True,
            grad_clip_norm=None, rank=0, world_size=1, local_rank=0, log_every_n_steps=1,
            batch_size=8, wandb=False, horovod=False,
        ),
    }  # fmt: skip


@pytest.fixture
def run_example(names: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """`run_example(part)`: the names after the first example and the one with `part` in it."""

    def run(part: str) -> dict[str, Any]:
        if "pairs" not in names:
            run_code(EXAMPLES[0], names)
        (example,) = (example for example in EXAMPLES if part in example)
        run_code(example, names)
        return names

    return run


@pytest.fixture
def run_twin(names: dict[str, Any]) -> Callable[[int], Any]:
    """`run_twin(batches)`: the model after as many batches, in a loop as plain as can be."""

    def run(batches: int) -> Any:
        model = copy.deepcopy(names["model"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = names["pairs"].loader()
        for images, tokens in islice(chain.from_iterable(loader for _ in range(9)), batches):
            optimizer.zero_grad()
            names["loss"](**model(images, tokens)).backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
        return model.state_dict()

    return run


def assert_same_weights(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_examples_for_lightning_and_without(run_example: Any) -> None:
    names = run_example("train_on(")
    assert len(names["seen"]) == 6
    for given, expected in zip(names["module"].batches, names["seen"][:3], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert names["state"]["given"] == 6


def test_open_clips_own_loop_trains_on_pairs(
    names: dict[str, Any], run_example: Any, run_twin: Callable[[int], Any]
) -> None:
    run_code(EXAMPLES[0], names)
    expected = run_twin(6)
    assert_same_weights(run_example("train_one_epoch")["model"].state_dict(), expected)


def test_accelerate_trains_on_pairs_and_resumes(
    names: dict[str, Any], run_example: Any, run_twin: Callable[[int], Any]
) -> None:
    run_code(EXAMPLES[0], names)
    expected = run_twin(3)
    start = copy.deepcopy(names["model"].state_dict())
    (example,) = (example for example in EXAMPLES if "Accelerator" in example)
    interrupted = example + "    if loader.given == 2:\n        break\n"
    run_code(interrupted, names)
    names["model"].load_state_dict(start)  # as in a new process
    continued = example.replace("for images", "accelerator.load_state(folder)\nfor images")
    run_code(continued, names)
    assert names["loader"].given == 3
    scale = "logit_scale"  # which open_clip's loop bounds, and this one does not
    found = names["model"].state_dict()
    assert_same_weights(found | {scale: expected[scale]}, expected)


def test_transformers_trainer_trains_on_pairs(run_example: Any, names: dict[str, Any]) -> None:
    import transformers

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    text = {**tower, "vocab_size": 49408, "max_position_embeddings": 12}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    names["clip"] = clip = transformers.CLIPModel(config)
    names["args"] = transformers.TrainingArguments(
        str(names["folder"]), num_train_epochs=2, use_cpu=True, report_to="none",
        per_device_train_batch_size=8, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    before = clip.visual_projection.weight.clone()
    run_example("transformers")
    assert not torch.equal(clip.visual_projection.weight, before)


def test_limits_and_accumulation_continue_the_stream(
    names: dict[str, Any], quiet_trainer: Callable[..., lightning.Trainer]
) -> None:
    options = {"limit_train_batches": 2, "max_epochs": 4, "accumulate_grad_batches": 2}
    names["trainer"] = quiet_trainer(**options)
    run_code(EXAMPLES[0], names)
    loader = names["pairs"].loader()
    expected = [images for _ in range(3) for images, _ in loader][:8]
    found = [images for images, _ in names["module"].batches]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_overfitting_batches_is_refused(
    names: dict[str, Any], quiet_trainer: Callable[..., lightning.Trainer]
) -> None:
    names["trainer"] = quiet_trainer(overfit_batches=2)
    with pytest.raises(InputError, match="SelectedPairs gives other batches in each epoch"):
        run_code(EXAMPLES[0], names)
