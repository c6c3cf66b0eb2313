"""Counted operations against formulas written by hand, and open_clip's published profile."""

from __future__ import annotations

import logging
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP
from torch import nn

from siftclip.datamodules.models.load import load_clip_model
from siftclip.errors import InputError
from siftclip.trainer.online.flops import forward_flops, require_forward, training_flops
from siftclip.trainer.online.scoring_config import ScoringConfig

DIM, TOKENS, TEXT_WIDTH = 16, 12, 24
TEXT = {"context_length": TOKENS, "vocab_size": 64, "width": TEXT_WIDTH, "heads": 2, "layers": 3}
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 64}


def clip(vision: dict[str, Any], **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    model: nn.Module = CLIP(DIM, vision, {**TEXT, **changes}, output_dict=True)
    return model


def transformer_forward(tokens: int, width: int, layers: int) -> int:
    """Projections to q, k, v and out (8 w^2 a token), an MLP of 4 w (16 w^2), two products."""
    return layers * (24 * tokens * width**2 + 4 * tokens**2 * width)


def text_forward() -> int:
    return transformer_forward(TOKENS, TEXT_WIDTH, 3) + 2 * TEXT_WIDTH * DIM


def vit_forward(patches: int) -> int:
    embedding = 2 * patches * (3 * 8 * 8) * 32
    return embedding + transformer_forward(patches + 1, 32, 2) + 2 * 32 * DIM


def convolution(side: int, inputs: int, outputs: int, kernel: int) -> int:
    return 2 * side * side * inputs * outputs * kernel * kernel


def resnet_forward(image_size: int) -> int:
    side = image_size // 2
    total = convolution(side, 3, 4, 3) + convolution(side, 4, 4, 3) + convolution(side, 4, 8, 3)
    side //= 2
    inputs = 8
    for number, planes in enumerate((8, 16, 32, 64)):
        after = side if number == 0 else side // 2  # pooled behind the second convolution
        total += convolution(side, inputs, planes, 1) + convolution(side, planes, planes, 3)
        total += convolution(after, planes, 4 * planes, 1) + convolution(
            after, inputs, 4 * planes, 1
        )
        side, inputs = after, 4 * planes
    places, width = side * side + 1, 256  # all places ask, one answer is used
    return total + places * (6 * width**2 + 2 * width * DIM) + 4 * places**2 * width


def test_a_vision_transformer_against_the_formula() -> None:
    model = clip(VIT)
    assert forward_flops(model) == vit_forward(16) + text_forward()
    assert type(forward_flops(model)) is int


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({**VIT, "patch_size": 100}, {**TEXT, "vocab_size": 49408}, "Kernel size can't be greater"),
        (VIT, TEXT, "images of .*32.* pixels and captions of 12 tokens: index out of range"),
    ],
)
def test_a_model_that_cannot_compute_on_its_own_sizes(
    vision: dict[str, Any], text: dict[str, Any], message: str
) -> None:
    architecture = {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text}
    with pytest.raises(InputError, match=rf"(?s){message}.*Check model\.architecture"):
        require_forward(load_clip_model("own", architecture=architecture))


def test_a_model_that_can_compute_on_its_own_sizes() -> None:
    text = {**TEXT, "vocab_size": 49408}
    architecture = {"embed_dim": DIM, "vision_cfg": VIT, "text_cfg": text}
    require_forward(load_clip_model("own", architecture=architecture))


def test_a_resnet_against_the_formula() -> None:
    model = clip(RESNET)
    assert forward_flops(model) == resnet_forward(64) + text_forward()
    assert forward_flops(model, scoring=ScoringConfig(image_size=32)) == (
        resnet_forward(32) + text_forward()
    )


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_a_convolution_is_two_forwards_whatever_its_groups(
    groups: int, transposed: bool
) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    first, second = nn.Conv2d(3, 8, 1), kind(8, 16, 3, stride=2, groups=groups)
    model = clip(VIT)
    model.visual = Images(first, second)
    side = 32 if transposed else 15  # places that weights are multiplied with
    expected = 2 * side * side * 8 * 16 * 9 // groups
    alone = 2 * 32 * 32 * 3 * 8
    assert forward_flops(model) - text_forward() == expected + alone
    assert training_flops(model) - 3 * text_forward() == 3 * expected + 2 * alone


class Images(nn.Sequential):
    image_size = 32

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).mean(dim=(2, 3))  # type: ignore[no-any-return]


def test_other_inputs() -> None:
    model = clip(VIT)
    shorter = transformer_forward(5, TEXT_WIDTH, 3) + 2 * TEXT_WIDTH * DIM
    with pytest.raises(RuntimeError):  # a text tower with one position a token
        forward_flops(model, context_length=5)
    assert forward_flops(clip(VIT, context_length=5)) == vit_forward(16) + shorter
    for option in ("image_size", "context_length"):
        with pytest.raises(InputError, match=f"{option} must be an integer of at least 1"):
            forward_flops(model, **{option: 0})


def test_cheap_scoring_is_cheaper_by_the_formula() -> None:
    model = clip(VIT)
    smaller = forward_flops(model, scoring=ScoringConfig(image_size=16))
    assert smaller == vit_forward(4) + text_forward()
    dropped = forward_flops(model, scoring=ScoringConfig(patch_dropout=0.75))
    missing = transformer_forward(17, 32, 2) - transformer_forward(5, 32, 2)
    assert dropped == vit_forward(16) - missing + text_forward()
    assert forward_flops(model, scoring=ScoringConfig(precision="bf16")) == forward_flops(model)
    assert forward_flops(model, scoring=ScoringConfig(mode="train")) == forward_flops(model)


@pytest.mark.parametrize("vision", [VIT, RESNET])
def test_training_is_three_forwards_less_the_gradient_of_the_images(vision: dict[str, Any]) -> None:
    model = clip(vision)
    first = convolution(32, 3, 4, 3) if vision is RESNET else 2 * 16 * (3 * 8 * 8) * 32
    assert training_flops(model) == 3 * forward_flops(model) - first


def test_what_is_locked_needs_no_backward() -> None:
    model = clip(VIT)
    model.visual.requires_grad_(False)  # type: ignore[union-attr]
    assert training_flops(model) == vit_forward(16) + 3 * text_forward()
    model.requires_grad_(False)
    assert training_flops(model) == forward_flops(model)


def test_gradient_checkpointing_and_patch_dropout_count() -> None:
    model = clip(VIT)
    plain = training_flops(model)
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    # Checkpoints stop early: the last product of an MLP is not computed again.
    again = transformer_forward(17, 32, 2) + transformer_forward(TOKENS, TEXT_WIDTH, 3)
    last = 2 * 8 * 17 * 32**2 + 3 * 8 * TOKENS * TEXT_WIDTH**2
    assert plain + again - last <= training_flops(model) <= plain + again
    dropping = clip({**VIT, "patch_dropout": 0.5})
    assert forward_flops(dropping) == forward_flops(model)
    assert training_flops(dropping) < 0.9 * plain


def test_a_caption_decoder_counts_in_training_only() -> None:
    torch.manual_seed(3)
    vision = {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    decoder = {**TEXT, "mlp_ratio": 4, "dim_head": 16, "n_queries": 4, "attn_pooler_heads": 2}
    model = CoCa(32, decoder | {"width": 32}, text | {"width": 32}, vision)
    with torch.no_grad():
        model.text_decoder.text_projection.normal_()  # open_clip leaves it undefined
    assert training_flops(model) > 3.5 * forward_flops(model)


@pytest.mark.parametrize("count", [forward_flops, training_flops])
def test_the_model_is_left_as_it_was(count: Any) -> None:
    model = clip(RESNET)
    model.train()
    model.visual.layer1.eval()  # type: ignore[union-attr]
    model.logit_scale.grad = torch.tensor(7.0)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    torch.backends.mha.set_fastpath_enabled(True)
    count(model)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert float(model.logit_scale.grad) == 7.0  # type: ignore[arg-type]
    others = [p.grad for name, p in model.named_parameters() if name != "logit_scale"]
    assert others == [None] * len(others)


@pytest.mark.parametrize(
    "count", [training_flops, lambda m: forward_flops(m, scoring=ScoringConfig(mode="train"))]
)
def test_a_failure_leaves_the_model_as_it_was(count: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = clip(RESNET).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(*args: Any, **named: Any) -> None:
        raise RuntimeError("not this tower")

    monkeypatch.setattr(model, "encode_text", fail)  # called after the image tower
    with pytest.raises(RuntimeError, match="not this tower"):
        count(model)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_tuples_and_half_precision() -> None:
    model = clip(VIT)
    whole = forward_flops(model), training_flops(model)
    model.output_dict = False  # type: ignore[assignment]
    assert training_flops(model) == whole[1]
    assert (forward_flops(model.bfloat16()), training_flops(model)) == whole


@pytest.mark.parametrize(("name", "published"), [("ViT-S-32-alt", 3.56), ("ViT-S-32", 5.66)])
def test_the_published_profile(name: str, published: float) -> None:
    """open_clip `docs/model_profile.csv`, in 1e9, rounded there to two digits."""
    logging.disable(logging.WARNING)  # of random weights
    try:
        model = open_clip.create_model(name)
    finally:
        logging.disable(logging.NOTSET)
    assert round(forward_flops(model) / 1e9, 2) == published
