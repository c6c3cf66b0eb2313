"""A stranger's module and Trainer on SelectedPairs; test_strangers.py runs it as a process.

    python stranger.py POOL FOLDER WRITES [STOP_AT]

It trains nine batches in three epochs, writes what each batch held and cost to FOLDER, and
continues where it was if FOLDER has a checkpoint. With STOP_AT it kills itself while it trains that
batch, or fails if WRITES says that failures are what checkpoints are written at.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from siftclip.datamodules import LocalStorage, SelectedPairs, as_dict, open_pool

GLOBAL_BATCH = 8
warnings.filterwarnings("ignore", ".*does not have many workers.*|.*smaller than the logging.*")


def tokens_of(captions: list[str]) -> Tensor:
    """The letters of the end of each caption."""
    return torch.tensor([list(caption.encode().rjust(8)[-8:]) for caption in captions])


class Stranger(lightning.LightningModule):
    """Automatic optimisation, a scheduler, and a loss of its own."""

    def __init__(
        self, pairs: SelectedPairs, log: Path, stop_at: int | None, *, fails: bool
    ) -> None:
        super().__init__()
        self.image = nn.Linear(3 * 16 * 16, 12)
        self.text = nn.EmbeddingBag(256, 12)
        self.pairs, self.log_path = pairs, log
        self.stop_at, self.fails = stop_at, fails

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        number = self.current_epoch * 3 + batch_idx
        if number == self.stop_at:
            if self.fails:
                raise RuntimeError("stop here")
            os.kill(os.getpid(), signal.SIGKILL)
        image = F.normalize(self.image(batch["images"].flatten(1)), dim=-1)
        logits = 10 * image @ F.normalize(self.text(batch["tokens"]), dim=-1).T
        loss = F.cross_entropy(logits, torch.arange(len(logits)))
        uids = self.pairs.uids(batch["rows"])
        with self.log_path.open("a") as file:
            print(json.dumps([number, uids, float(loss).hex()]), file=file)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("validated", float(self.global_step))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def writer(writes: str, folder: Path) -> Callback:
    """What writes `last.ckpt`: a callback of Lightning's own."""
    if writes == "failures":
        return OnExceptionCheckpoint(folder, filename="last")
    if writes == "validations":  # in the middle of a pass
        return ModelCheckpoint(folder, save_last=True, monitor="validated", mode="max")
    steps = 2 if writes == "steps" else None
    return ModelCheckpoint(folder, every_n_train_steps=steps, save_last=True, monitor=None)


def main(root: str, folder: Path, writes: str, stop_at: int | None) -> None:
    """Train, or continue."""
    lightning.seed_everything(1, verbose=False)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    pool = open_pool(
        LocalStorage(root), cache_dir=folder / "cache", max_bad_fraction=0, progress=False
    )
    pairs = SelectedPairs(
        pool,
        range(20),
        batch_size=GLOBAL_BATCH // ranks,
        transform=v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(16, antialias=True),
                v2.ToDtype(torch.float32, scale=True),
            ]
        ),
        tokenizer=tokens_of,
        seed=3,
        num_workers=1,
        form=as_dict,
    )
    log = folder / f"log-{os.environ.get('RANK', '0')}.jsonl"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    validates = writes == "validations"
    trainer = lightning.Trainer(
        max_epochs=3,
        val_check_interval=2 if validates else None,
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else "ddp",
        callbacks=[writer(writes, checkpoint.parent)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if validates:
        pairs.val_dataloader = lambda: DataLoader(torch.zeros(2))  # type: ignore[method-assign]
    trainer.fit(
        Stranger(pairs, log, stop_at, fails=writes == "failures"),
        datamodule=pairs,
        ckpt_path=checkpoint if checkpoint.exists() else None,
        weights_only=True,
    )


if __name__ == "__main__":
    main(
        sys.argv[1],
        Path(sys.argv[2]),
        sys.argv[3],
        int(sys.argv[4]) if len(sys.argv) > 4 else None,
    )
