"""Scoring forwards against open_clip's own, whole and rebuilt at a lower resolution."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, resize_pos_embed
from open_clip.transformer import PatchDropout
from torch import Tensor, nn

from siftclip.errors import InputError
from siftclip.trainer.online.scoring import (
    check_scoring,
    resized_positions,
    scoring_features,
    scoring_is_forward,
)
from siftclip.trainer.online.scoring_config import ScoringConfig

SAMPLES = 6
TEXT = {"context_length": 12, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2}
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 64}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 96}
DECODER = {**TEXT, "mlp_ratio": 4, "dim_head": 16, "n_queries": 4, "attn_pooler_heads": 2}
FULL = ScoringConfig()
HALF_SIZE = ScoringConfig(image_size=32)


def clip(vision: dict[str, Any], **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    model: nn.Module = CLIP(16, {**vision, **changes}, TEXT, output_dict=True)
    for module in model.modules():  # statistics that are not those of a fresh batch norm
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for name, weight in model.named_parameters():
        if name.endswith("bn3.weight"):  # zero at the start, so that blocks would do nothing
            nn.init.uniform_(weight, 0.5, 1.0)
    return model


def coca() -> nn.Module:
    torch.manual_seed(3)
    vision = {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TEXT, "width": 32, "embed_cls": True, "output_tokens": True}
    return CoCa(32, {**DECODER, "width": 32}, text, vision)


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(SAMPLES, 3, size, size, generator=generator)
    return images, torch.randint(1, 64, (SAMPLES, 12), generator=generator)


def own_features(model: nn.Module, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return (
            model.encode_image(images, normalize=True),  # type: ignore[operator]
            model.encode_text(tokens, normalize=True),  # type: ignore[operator]
        )


def assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [lambda: clip(VIT), lambda: clip(RESNET), coca])
@pytest.mark.parametrize("training", [True, False])
def test_plain_scoring_is_open_clips_own_bit_for_bit(make: Any, training: bool) -> None:
    model = make().train(training)
    images, tokens = batch(96 if "attnpool" in dict(model.visual.named_children()) else 64)
    found = scoring_features(model, images, tokens, FULL, 0)
    assert_equal(found, own_features(model.eval(), images, tokens))
    assert all(part.dtype == torch.float32 and not part.requires_grad for part in found)


def test_lower_resolution_is_open_clip_rebuilt_at_that_size() -> None:
    model, smaller = clip(VIT), clip(VIT, image_size=32)
    state = model.state_dict()
    resize_pos_embed(state, smaller)
    smaller.load_state_dict(state)
    images, tokens = batch(64)
    small = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    found = scoring_features(model, images, tokens, HALF_SIZE, 0)
    expected = own_features(smaller.eval(), small, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found[0], scoring_features(model, images, tokens, FULL, 0)[0])


def test_a_resnets_attention_pool_is_resized() -> None:
    model, smaller = clip(RESNET), clip(RESNET, image_size=64)
    state = model.state_dict()
    name = "visual.attnpool.positional_embedding"
    rows = state[name]
    grid = rows[1:].reshape(3, 3, -1).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=(2, 2), mode="bicubic", antialias=True)[0]
    state[name] = torch.stack([rows[0], *(grid[:, i, j] for i in range(2) for j in range(2))])
    smaller.load_state_dict(state)
    images, tokens = batch(96)
    small = F.interpolate(images, size=(64, 64), mode="bilinear", antialias=True)
    found = scoring_features(model, images, tokens, ScoringConfig(image_size=64), 0)
    expected = own_features(smaller.eval(), small, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_lower_resolution_of_coca_and_positions_made_once() -> None:
    model = coca()
    images, tokens = batch(64)
    found = scoring_features(model, images, tokens, HALF_SIZE, 0)
    once = resized_positions(model, HALF_SIZE)
    assert [tuple(value.shape) for value in once.values()] == [(17, 32)]
    assert_equal(scoring_features(model, images, tokens, HALF_SIZE, 0, positions=once), found)
    other = {name: torch.zeros_like(value) for name, value in once.items()}
    zeros = scoring_features(model, images, tokens, HALF_SIZE, 0, positions=other)
    assert not torch.allclose(zeros[0], found[0])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_patch_dropout_keeps_as_many_patches_as_open_clip(mode: Any) -> None:
    model = clip(VIT)
    model.double()  # so that which patches are left decides, not rounding
    images, tokens = batch(64)
    seen: list[Tensor] = []
    model.visual.ln_pre.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda module, arguments, output: seen.append(arguments[0])
    )
    scoring_features(model, images, tokens, FULL, 0)
    (whole,) = seen
    for probability in (0.1, 0.5, 0.75, 0.999):
        seen.clear()
        config = ScoringConfig(patch_dropout=probability, mode=mode)
        scoring_features(model, images, tokens, config, 5)
        assert seen[0].shape == PatchDropout(probability).train()(whole).shape
        for sample in range(SAMPLES):
            assert torch.equal(seen[0][sample, 0], whole[sample, 0])  # the class token
            kept = [
                int((whole[sample, 1:] == patch).all(-1).nonzero()) for patch in seen[0][sample, 1:]
            ]
            assert len(set(kept)) == len(kept)
    assert isinstance(model.visual.patch_dropout, nn.Identity)  # type: ignore[union-attr]


def test_patch_dropout_leaves_out_each_patch_equally_often() -> None:
    model = clip(VIT, layers=1)
    seen: list[Tensor] = []
    model.visual.ln_pre.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda module, arguments, output: seen.append(arguments[0])
    )
    with torch.no_grad():  # a patch tells its place
        model.visual.conv1.weight.zero_()  # type: ignore[union-attr]
        model.visual.positional_embedding.copy_(  # type: ignore[union-attr, operator]
            torch.arange(-1.0, 64.0)[:, None].expand(-1, 32)
        )
    images, tokens = torch.zeros(400, 3, 64, 64), torch.ones(400, 12, dtype=torch.int64)
    scoring_features(model, images, tokens, ScoringConfig(patch_dropout=0.75), 1)
    counts = torch.bincount(seen[0][:, 1:, 0].long().flatten(), minlength=64)
    expected = 400 * 16 / 64
    assert float(((counts - expected) ** 2 / (expected * 0.75)).sum()) < 110  # 63 on average


def test_the_seed_decides_and_global_random_state_stays() -> None:
    model = clip(VIT, patch_dropout=0.5).train()
    images, tokens = batch(64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for config in (ScoringConfig(patch_dropout=0.5), ScoringConfig(mode="train")):
        first = scoring_features(model, images, tokens, config, 7)
        torch.rand(3)
        assert_equal(scoring_features(model, images, tokens, config, 7), first)
        other = scoring_features(model, images, tokens, config, 8)
        assert not torch.allclose(other[0], first[0])
        torch.set_rng_state(before)
        scoring_features(model, images, tokens, config, 9)
        assert torch.equal(torch.get_rng_state(), before)
    # the model's own patch dropout is for training
    assert_equal(
        scoring_features(model, images, tokens, FULL, 7), own_features(model.eval(), images, tokens)
    )


def test_training_mode_sees_the_chunk_and_keeps_running_statistics() -> None:
    model = clip(RESNET).eval()
    images, tokens = batch(96)
    state = copy.deepcopy(model.state_dict())
    found = scoring_features(model, images, tokens, ScoringConfig(mode="train"), 0)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert_equal(found, own_features(copy.deepcopy(model).train(), images, tokens))
    assert not torch.allclose(found[0], scoring_features(model, images, tokens, FULL, 0)[0])


@pytest.mark.parametrize("config", [FULL, ScoringConfig(mode="train", patch_dropout=0.5)])
def test_the_model_is_left_as_it_was(config: ScoringConfig) -> None:
    model = clip(VIT).train()
    model.visual.transformer.resblocks[0].eval()  # type: ignore[union-attr, index]
    modes = [module.training for module in model.modules()]
    names = [name for name, _ in model.named_modules()]
    images, tokens = batch(64)
    scoring_features(model, images, tokens, config, 0)
    with pytest.raises((IndexError, RuntimeError)):  # also after a failure
        scoring_features(model, images, tokens + 100, config, 0)
    assert modes == [module.training for module in model.modules()]
    assert names == [name for name, _ in model.named_modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_is_close_and_of_unit_norm() -> None:
    model = clip(VIT)
    images, tokens = batch(64)
    whole = scoring_features(model, images, tokens, FULL, 0)
    half = scoring_features(model, images, tokens, ScoringConfig(precision="bf16"), 0)
    for exact, rough in zip(whole, half, strict=True):
        assert rough.dtype == torch.float32
        assert 1e-5 < float((exact - rough).abs().max()) < 0.05
        torch.testing.assert_close(rough.norm(dim=1), torch.ones(SAMPLES), rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(scoring_features(model, images, tokens, FULL, 0), half)
    pure = scoring_features(model.bfloat16(), images, tokens, HALF_SIZE, 0)
    assert [part.dtype for part in pure] == [torch.float32] * 2


def test_a_compiled_tower_notices_patch_dropout() -> None:
    model = clip(VIT, layers=1)
    images, tokens = batch(64)
    config = ScoringConfig(patch_dropout=0.5, image_size=32)
    expected = [scoring_features(model, images, tokens, one, 3) for one in (FULL, config, FULL)]
    model.visual.compile(backend="eager")  # type: ignore[union-attr]
    for one, features in zip((FULL, config, FULL), expected, strict=True):
        found = scoring_features(model, images, tokens, one, 3)
        torch.testing.assert_close(found, features, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "online.scoring.image_size must be an integer of at least 1"),
        ({"patch_dropout": 1}, r"online.scoring.patch_dropout must be in the range \[0, 1\)"),
        ({"patch_dropout": None}, "online.scoring.patch_dropout must be a finite number"),
        ({"precision": "fp16"}, "online.scoring.precision must be bf16, or null"),
        ({"mode": "test"}, "online.scoring.mode must be one of eval, train"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScoringConfig(**values)


def test_what_a_tower_cannot_do_is_refused() -> None:
    vit, resnet = clip(VIT), clip(RESNET)
    for model, size in ((vit, 32), (vit, 56), (resnet, 32), (resnet, 64)):
        check_scoring(model, ScoringConfig(image_size=size))
    for model, size, cell in ((vit, 36, 8), (vit, 64, 8), (vit, 72, 8), (resnet, 48, 32)):
        with pytest.raises(InputError, match=rf"image_size={size} must be a multiple of {cell} "):
            check_scoring(model, ScoringConfig(image_size=size))
    wide = clip(VIT, image_size=(64, 32))
    with pytest.raises(InputError, match="image_size=32 needs square images"):
        check_scoring(wide, HALF_SIZE)
    check_scoring(vit, ScoringConfig(patch_dropout=0.5))
    with pytest.raises(InputError, match=r"patch_dropout=0.5 needs a vision .* ModifiedResNet"):
        check_scoring(resnet, ScoringConfig(patch_dropout=0.5))
    timm = timm_clip()
    check_scoring(timm, ScoringConfig(precision="bf16", mode="train"))
    for config in (HALF_SIZE, ScoringConfig(patch_dropout=0.5)):
        with pytest.raises(InputError, match="The image tower is a TimmModel"):
            check_scoring(timm, config)


def timm_clip() -> nn.Module:
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    return CLIP(16, {**vision, "image_size": 160}, TEXT, output_dict=True)


def test_where_the_scoring_forward_is_the_training_forward() -> None:
    vit = clip(VIT).train()
    images, tokens = batch(64)
    for mode in ("eval", "train"):
        config = ScoringConfig(mode=mode)  # type: ignore[arg-type]
        assert scoring_is_forward(vit, config)
        outputs = vit(images, tokens)
        found = scoring_features(vit, images, tokens, config, 0)
        torch.testing.assert_close(found[0], outputs["image_features"].detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1], outputs["text_features"].detach(), rtol=0, atol=1e-6)
    for config in (HALF_SIZE, ScoringConfig(patch_dropout=0.1), ScoringConfig(precision="bf16")):
        assert not scoring_is_forward(vit, config)
    for model in (clip(RESNET), clip(VIT, patch_dropout=0.1), timm_clip()):
        assert not scoring_is_forward(model, FULL)
        assert not scoring_is_forward(model, ScoringConfig(mode="train"))
    with_dropout = clip(VIT)
    with_dropout.visual.transformer.resblocks[1].attn.dropout = 0.1  # type: ignore[union-attr, index]
    assert not scoring_is_forward(with_dropout, FULL)
    with_dropout = clip(VIT)
    with_dropout.visual.ln_pre = nn.Dropout(0.1)  # type: ignore[union-attr]
    assert not scoring_is_forward(with_dropout, FULL)
