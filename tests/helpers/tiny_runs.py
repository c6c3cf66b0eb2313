"""Arguments of runs that take a second, for commands and for Siftclip's Python face."""

from __future__ import annotations

from typing import Any

# Of vit_tiny the text tower, a quarter as wide: of 49,408 tokens, three million weights become 0.8
TEXT_WIDTH = 16
VIT_TINY: dict[str, Any] = {
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
            "width": TEXT_WIDTH,
            "heads": 2,
            "layers": 1,
        },
    },
}
NARROW_TEXT = f"model.architecture.text_cfg.width={TEXT_WIDTH}"
WHOLE_TEXT = "model.architecture.text_cfg.width=64"
CPU = {"accelerator": "cpu", "log_every_n_steps": 1}
QUICK: dict[str, Any] = {"progress": False, "data": {"num_workers": 0}}
TRAINING: dict[str, Any] = {
    "samples_seen": 96,
    "global_batch_size": 16,
    "optim": {"lr": 2e-3, "warmup_steps": 2},
    "logger": "csv",
    **QUICK,
}


def without_model(words: list[str]) -> list[str]:
    """The words of a run but for those about its model."""
    return [word for word in words if not word.startswith(("model=", "model."))]
