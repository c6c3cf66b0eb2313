from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from siftclip.datamodules.models.load import ClipModel, load_clip_model
from siftclip.errors import InputError
from siftclip.eval.encoding.texts import check_tokens, encode_tokens, length_batches, token_lengths

LENGTH, VOCABULARY, EOS = 12, 100, 99
TEXT = {
    "context_length": LENGTH, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2,
}  # fmt: skip
BASE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
}
COCA = {
    **BASE,
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 32,
                       "heads": 2, "layers": 1},
}  # fmt: skip
CONFIGS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "clip": (open_clip.CLIP, {**BASE, "text_cfg": TEXT}),
    "clip, eos": (open_clip.CLIP, {**BASE, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 7}}),
    "tower": (open_clip.CustomTextCLIP, {**BASE, "text_cfg": TEXT}),
    "tower, eos": (
        open_clip.CustomTextCLIP,
        {**BASE, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 7}},
    ),
    "last": (open_clip.CustomTextCLIP, {**BASE, "text_cfg": {**TEXT, "pool_type": "last"}}),
    "siglip": (
        open_clip.CustomTextCLIP,
        {**BASE, "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True,
                              "proj_bias": True}},
    ),
    "bidirectional": (open_clip.CLIP, {**BASE, "text_cfg": {**TEXT, "no_causal_mask": True}}),
    "coca": (open_clip.CoCa, COCA),
}  # fmt: skip
SHORTENED = ("clip", "clip, eos", "tower", "tower, eos")


def build(name: str) -> nn.Module:
    kind, config = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = kind(**config)
        for parameter in model.parameters():  # some begin at 0, which would hide an error
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_tokens(end: int) -> torch.Tensor:
    """Texts of 1 to 10 tokens, an end token, and zeros; the last one has no end."""
    tokens = torch.randint(10, 90, (24, LENGTH), generator=torch.Generator().manual_seed(1))
    for row in range(23):
        length = 1 + row % 10
        tokens[row, length] = end
        tokens[row, length + 1 :] = 0
    return tokens


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_features_are_those_at_full_length(name: str) -> None:
    model = build(name)
    tokens = make_tokens(7 if "eos" in name else EOS)
    expected = model.encode_text(tokens, normalize=True)  # type: ignore[operator]
    lengths = token_lengths(model, tokens)
    assert (lengths is not None) == (name in SHORTENED)
    if lengths is None:
        found = encode_tokens(model, tokens)
        assert torch.equal(found, expected)
        return
    assert lengths[:23].tolist() == [2 + row % 10 for row in range(23)]
    for row, length in enumerate(lengths.tolist()):
        if row < 23:
            alone = encode_tokens(model, tokens[row : row + 1, :length])
            torch.testing.assert_close(alone[0], expected[row], atol=2e-6, rtol=0)
            torch.testing.assert_close(alone[0].norm(), torch.tensor(1.0))
            # one token less and the feature is another: the length is not too long
            cut = encode_tokens(model, tokens[row : row + 1, : length - 1])
            assert (cut[0] - expected[row]).abs().max() > 1e-3
    for rows in length_batches(lengths.numpy(), 5):
        part = tokens[rows, : int(lengths[rows[0]])]
        torch.testing.assert_close(encode_tokens(model, part), expected[rows], atol=2e-6, rtol=0)
    # the model is as it was
    assert torch.equal(model.encode_text(tokens, normalize=True), expected)  # type: ignore[operator]


@torch.no_grad()
def test_a_text_without_an_end_token() -> None:
    model = build("tower, eos")
    lengths = token_lengths(model, make_tokens(7))
    assert lengths is not None
    assert lengths[23] == LENGTH


@torch.no_grad()
def test_shortened_texts_under_autocast() -> None:
    model, tokens = build("clip"), make_tokens(EOS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short = encode_tokens(model, tokens[:1, :2])
        whole = model.encode_text(tokens[:1], normalize=True)  # type: ignore[operator]
    assert short.dtype == whole.dtype
    torch.testing.assert_close(short.float(), whole.float(), atol=0.03, rtol=0)


def test_batches_hold_all_rows_longest_first() -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 50)
    batches = length_batches(lengths, 8)
    assert [len(rows) for rows in batches] == [8] * 6 + [2]
    order = np.concatenate(batches)
    assert sorted(order.tolist()) == list(range(50))
    assert (np.diff(lengths[order]) <= 0).all()
    assert length_batches(np.empty(0, dtype=np.int64), 8) == []


@pytest.mark.parametrize("name", ["clip", "tower", "coca", "siglip"])
def test_a_tokenizer_of_another_model(name: str) -> None:
    model = build(name)
    check_tokens(model, make_tokens(EOS))
    with pytest.raises(InputError, match=r"gives the token 100, and the model has 100"):
        check_tokens(model, make_tokens(VOCABULARY))
    longer = torch.zeros(2, LENGTH + 1, dtype=torch.int64)
    with pytest.raises(InputError, match=r"gives 13 tokens a text, and the model takes 12"):
        check_tokens(model, longer)


def test_a_model_with_open_clips_own_tokenizer(session_clip: ClipModel) -> None:
    tokens = session_clip.tokenizer(["a cat", "a photo of a cat on a mat", ""])
    check_tokens(session_clip.model, tokens)
    lengths = token_lengths(session_clip.model, tokens)
    assert lengths is not None
    assert lengths.tolist() == [4, 10, 2]


def test_a_siglip_of_open_clip_is_not_shortened() -> None:
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    small = {"width": 32, "heads": 2, "layers": 1, "vocab_size": VOCABULARY}
    text = {k: v for k, v in config["text_cfg"].items() if k != "hf_tokenizer_name"} | small
    architecture = {**config, "embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    model = load_clip_model("small", architecture=architecture).model
    tokens = torch.ones(2, text["context_length"], dtype=torch.int64)
    assert token_lengths(model, tokens) is None
