"""What a loaded model is: architecture and activation, preprocessing, tokenizer and weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.models.weight_needs import activation_name


def model_record(clip: ClipModel) -> dict[str, Any]:
    """Describe a model, to be written beside what it made. Cheap: the weights are left out.

    With the `fingerprint`, which covers all of it and the weights, it is the identity of a model:
    where one of these differs, it is another model.
    """
    model_cfg = clip.config["model_cfg"]
    return {
        "activation": activation_name(bool(model_cfg.get("quick_gelu"))),
        "architecture": model_cfg,
        "preprocessing": clip.config["preprocess_cfg"],
        "tokenizer": tokenizer_record(clip.tokenizer),
    }


def tokenizer_record(tokenizer: Any) -> dict[str, Any]:
    """Describe what decides about the tokens of a text, beside the settings in `text_cfg`.

    Returns:
        The class of open_clip's, the number of tokens, and the SHA-256 of the rules and words of a
        tokenizer from Hugging Face, whose files may change; null for open_clip's own.
    """
    inner = getattr(tokenizer, "tokenizer", None)
    return {
        "class": type(tokenizer).__name__,
        "context_length": tokenizer.context_length,
        "sha256": None if inner is None else _contents_hash(inner),
    }


def fingerprint(clip: ClipModel) -> str:
    """Hash what decides a model's answers (SHA-256): its configuration, tokenizer and weights.

    The configuration counts because two models with equal weights differ by activation function
    (`quick_gelu`) or by preprocessing.
    """
    digest = hashlib.sha256(json.dumps(clip.config, sort_keys=True, default=str).encode())
    contents = tokenizer_record(clip.tokenizer)["sha256"]
    if contents is not None:
        digest.update(contents.encode())
    for name, tensor in clip.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _contents_hash(tokenizer: Any) -> str:
    """Hash what a tokenizer of Hugging Face does to a text (SHA-256)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = {"vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # of the last call, not of the tokenizer
            rules.pop(state, None)
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
