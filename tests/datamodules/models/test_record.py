"""A model is known by all that decides about its answers."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from siftclip.datamodules.models.load import ClipModel, load_clip_model, save_model_folder
from siftclip.datamodules.models.record import fingerprint, model_record

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "red", "blue", "seven"]
TEXT = {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": TEXT,
}


def build(**options: Any) -> ClipModel:
    torch.manual_seed(0)
    return load_clip_model("x", architecture=SMALL, options=options)


@pytest.fixture
def worded(tmp_path: Path) -> Path:
    """A model folder with a tokenizer of Hugging Face."""
    folder = tmp_path / "worded"
    save_model_folder(build(), folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "org/words"
    path.write_text(json.dumps(config))
    write_tokenizer(folder, WORDS)
    return folder


def write_tokenizer(folder: Path, words: list[str]) -> None:
    rules = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    rules.pre_tokenizer = Whitespace()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=rules, **names).save_pretrained(str(folder))


def test_the_record_says_what_was_built() -> None:
    record = model_record(build(force_quick_gelu=True, image_mean=[0.5, 0.4, 0.3]))
    assert record["activation"] == "QuickGELU"
    assert record["architecture"]["quick_gelu"] is True
    assert tuple(record["preprocessing"]["mean"]) == (0.5, 0.4, 0.3)
    assert record["tokenizer"] == {
        "class": "SimpleTokenizer",
        "context_length": 8,
        "sha256": None,
    }
    assert model_record(build())["activation"] == "GELU"
    json.dumps(record)


def test_equal_weights_are_other_models_by_activation_and_preprocessing() -> None:
    options: list[dict[str, Any]] = [
        {},
        {"force_quick_gelu": True},
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0.5]},
        {"image_interpolation": "bilinear"},
        {"image_resize_mode": "squash"},
    ]
    prints = [fingerprint(build(**chosen)) for chosen in options]
    assert len(set(prints)) == len(options)
    assert fingerprint(build()) == prints[0]
    assert fingerprint(build(force_quick_gelu=False)) == prints[0]


def test_other_weights_are_another_model() -> None:
    clip = build()
    before = fingerprint(clip)
    with torch.no_grad():
        clip.model.get_parameter("visual.proj")[3, 3] += 1e-6
    assert fingerprint(clip) != before


def test_other_words_are_another_model(worded: Path, tmp_path: Path) -> None:
    clip = load_clip_model(str(worded))
    before = fingerprint(clip)
    assert clip.tokenizer(["red seven"]).shape == (1, 8)
    assert fingerprint(clip) == before  # a call leaves its padding in the tokenizer
    assert fingerprint(load_clip_model(str(worded))) == before

    saved = tmp_path / "saved"
    save_model_folder(clip, saved)
    assert fingerprint(load_clip_model(str(saved))) == before

    other = Path(shutil.copytree(worded, tmp_path / "other"))
    changed = copy.copy(WORDS)
    changed[-1], changed[-2] = changed[-2], changed[-1]
    write_tokenizer(other, changed)
    assert fingerprint(load_clip_model(str(other))) != before
    assert model_record(load_clip_model(str(other))) != model_record(clip)
