"""Arguments of runs that take a second, for functions of Siftclip's Python face."""

from __future__ import annotations

from typing import Any

VIT_TINY = {
    "name": "vit_tiny",
    "architecture": {
        "embed_dim": 64,
        "vision_cfg": {
            "layers": 2,
            "width": 64,
            "head_width": 32,
            "patch_size": 8,
            "image_size": 32,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 1,
        },
    },
}
CPU = {"accelerator": "cpu", "log_every_n_steps": 1}
QUICK: dict[str, Any] = {"progress": False, "data": {"num_workers": 0}}
TRAINING: dict[str, Any] = {
    "samples_seen": 96,
    "global_batch_size": 16,
    "optim": {"lr": 2e-3, "warmup_steps": 2},
    "logger": "csv",
    **QUICK,
}
