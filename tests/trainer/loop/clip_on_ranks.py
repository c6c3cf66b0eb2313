"""ClipTraining on SelectedPairs in a plain Trainer; run by test_module.py on one rank and on two.

    python clip_on_ranks.py POOL FOLDER

Writes the metrics of each step to FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import lightning
import open_clip
import torch
from lightning.pytorch.loggers import CSVLogger
from torchvision.transforms import v2

from siftclip.datamodules import LocalStorage, SelectedPairs, open_pool
from siftclip.trainer import ClipTraining

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def main(root: str, folder: Path) -> None:
    """Train five steps of eight samples, whatever the ranks."""
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(4)
    pool = open_pool(
        LocalStorage(root), cache_dir=folder / "cache", max_bad_fraction=0, progress=False
    )
    pairs = SelectedPairs(
        pool,
        batch_size=8 // ranks,
        transform=v2.Compose(
            [v2.PILToTensor(), v2.RandomResizedCrop(16), v2.ToDtype(torch.float32, scale=True)]
        ),
        tokenizer=open_clip.SimpleTokenizer(context_length=12),
        num_workers=0,
    )
    module = ClipTraining(open_clip.CLIP(**ARCHITECTURE))
    trainer = lightning.Trainer(
        max_steps=5,
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else "ddp",
        logger=CSVLogger(folder),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=pairs)
    if trainer.is_global_zero:
        kept = {name: module.latest[f"train/{name}"] for name in ("loss", "grad_norm", "lr")}
        kept["global_batch_size"] = module.global_batch_size
        (folder / f"of-{ranks}.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
