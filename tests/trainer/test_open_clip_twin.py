"""Step by step what open_clip's own program trains: its main(), on the same weights and batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import open_clip
import open_clip_train.main as reference
import pytest
import torch
from torch import Tensor

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.streaming.batches import Batch, StepBatch
from siftclip.files import read_jsonl
from siftclip.trainer.loop.module import ClipTraining
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.optim.gradients import Objective
from siftclip.trainer.runtime.loggers import FileLogger
from siftclip.trainer.settings.optim import OptimSettings

STEPS = 50
BATCH = 16
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 512, "width": 32, "heads": 2, "layers": 2},
}
# The gradient of a key's bias is nothing but rounding; a smaller eps blows it up to the rate.
SETTINGS = {"lr": 2e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-4}


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(BATCH, 3, 32, 32, generator=generator),
            torch.randint(1, 512, (BATCH, 16), generator=generator),
        )
        for _ in range(STEPS)
    ]


class OpenClipLoader:
    """The batches, as open_clip's loop wants them."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.num_batches = len(batches)
        self.num_samples = len(batches) * BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


class OurLoader:
    """The batches, as ours come from the stream."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]], micro_batches: int) -> None:
        self.batches = batches
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[StepBatch]:
        size = BATCH // self.micro_batches
        for images, tokens in self.batches:
            yield StepBatch(
                [
                    Batch(
                        images=images[at : at + size],
                        tokens=tokens[at : at + size],
                        rows=torch.arange(size),
                        valid=torch.ones(size, dtype=torch.bool),
                    )
                    for at in range(0, BATCH, size)
                ]
            )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model configuration that open_clip knows, and weights to start from."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "siftclip_twin.json").write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(folder / "siftclip_twin.json")
    torch.manual_seed(7)
    model = open_clip.create_model("siftclip_twin")
    torch.save(model.state_dict(), folder / "start.pt")
    return folder


def train_with_open_clip(
    start: Path,
    batches: list[tuple[Tensor, Tensor]],
    options: Sequence[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    losses: list[float] = []
    make_loss = reference.create_loss

    def create_loss(args: Any) -> Any:
        loss = make_loss(args)
        loss.register_forward_hook(
            lambda module, inputs, outputs: losses.append(sum(outputs.values()).item())
        )
        return loss

    stream = SimpleNamespace(dataloader=OpenClipLoader(batches), set_epoch=lambda epoch: None)
    monkeypatch.setattr(reference, "create_loss", create_loss)
    monkeypatch.setattr(reference, "setup_logging", lambda *args: None)  # of all libraries
    monkeypatch.setattr(reference, "get_data", lambda *args, **kwargs: {"train": stream})
    reference.main(
        [
            *("--model", "siftclip_twin", "--pretrained", str(start / "start.pt")),
            *("--dataset-type", "synthetic", "--train-num-samples", "1", "--epochs", "1"),
            *("--batch-size", str(BATCH), "--precision", "fp32", "--device", "cpu"),
            *("--lr", str(SETTINGS["lr"]), "--wd", "0.2", "--warmup", "10"),
            *("--beta1", "0.9", "--beta2", "0.98", "--eps", "1e-4"),
            *("--logs", str(folder), "--name", "run", "--workers", "0"),
            *options,
        ]
    )
    checkpoint = torch.load(folder / "run/checkpoints/epoch_1.pt", weights_only=True)
    return losses, checkpoint["state_dict"], checkpoint["optimizer"]


def train_with_siftclip(
    start: Path,
    batches: list[tuple[Tensor, Tensor]],
    changes: dict[str, Any],
    folder: Path,
    micro_batches: int = 1,
) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    clip = load_clip_model("twin", architecture=ARCHITECTURE, pretrained=str(start / "start.pt"))
    optim = {
        **SETTINGS,
        "weight_decay": 0.2,
        "warmup_steps": 10,
        "grad_clip_norm": None,
        **changes,
    }
    module = ClipTraining(
        clip.model,
        objective=Objective(loss=SoftmaxLoss()),
        optim=OptimSettings(**optim),
        total_steps=STEPS,
        global_batch_size=BATCH,
        seed=0,
        log_every_n_steps=1,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=[FileLogger(folder)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, train_dataloaders=OurLoader(batches, micro_batches))
    losses = [record["train/loss"] for record in read_jsonl(folder / "metrics.jsonl")]
    return losses, clip.model.state_dict(), trainer.optimizers[0].state_dict()


VARIANTS = {
    "cosine": ([], {}),
    "clipped": (["--grad-clip-norm", "0.5"], {"grad_clip_norm": 0.5}),
    "constant": (["--lr-scheduler", "const"], {"schedule": "const"}),
}


# Lightning's, of torch's tree functions; our own commands filter it in make_trainer
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_fifty_steps_equal_open_clips(
    variant: str,
    micro_batches: int,
    start: Path,
    batches: list[tuple[Tensor, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, changes = VARIANTS[variant]
    losses, weights, optimizer = train_with_open_clip(
        start, batches, options, tmp_path, monkeypatch
    )
    our_losses, our_weights, our_optimizer = train_with_siftclip(
        start, batches, changes, tmp_path, micro_batches
    )
    assert len(our_losses) == len(losses) == STEPS
    assert our_losses == pytest.approx(losses, rel=2e-5)
    assert our_weights.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(
            our_weights[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text
        )
    groups, our_groups = optimizer["param_groups"], our_optimizer["param_groups"]
    for group, our_group in zip(groups, our_groups, strict=True):
        for key in ("lr", "betas", "eps", "weight_decay", "params"):
            assert our_group[key] == pytest.approx(group[key]), key
