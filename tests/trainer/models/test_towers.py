"""Locked towers and gradient checkpointing, against what open_clip documents of them."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from siftclip.datamodules.models.load import load_clip_model, save_model_folder
from siftclip.errors import InputError
from siftclip.trainer.models.towers import (
    LockConfig,
    enable_grad_checkpointing,
    lock_towers,
    text_parameters,
)

VISION = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 2}
CLIP: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
CUSTOM = {**CLIP, "custom_text": True, "init_logit_bias": -10.0}
RESNET = {**CLIP, "vision_cfg": {**VISION, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}}
TIMM = {**CLIP, "vision_cfg": {"timm_model_name": "test_vit", "image_size": 64}}
COCA = {
    **CUSTOM,
    "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2}
    | {"attn_pooler_queries": 4, "output_tokens": True},
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
}


@functools.cache
def built(architecture: str) -> Any:
    torch.manual_seed(0)
    return load_clip_model("x", architecture=json.loads(architecture)).model


def build(architecture: dict[str, Any]) -> Any:
    """A random model that the caller may change; always with the same weights."""
    return copy.deepcopy(built(json.dumps(architecture)))


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def changed_by_training(model: Any, size: int = 32) -> set[str]:
    """The names of the weights that three steps with weight decay change."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], weight_decay=0.1
    )
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        image, text, scale, *bias = model(
            torch.randn(4, 3, size, size, generator=generator),
            torch.randint(1, 99, (4, 8), generator=generator),
        )
        logits = scale * image @ text.T + sum(bias)
        torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        optimizer.step()
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize("architecture", [CLIP, CUSTOM])
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_locked_towers_do_not_change(architecture: dict[str, Any], image: bool, text: bool) -> None:
    model = build(architecture)
    lock_towers(model, LockConfig(image=image, text=text))
    changed = changed_by_training(model)
    visual = {name for name in changed if name.startswith("visual.")}
    logit = {name for name in changed if name.startswith("logit_")}
    assert bool(visual) is not image
    assert bool(changed - visual - logit) is not text
    assert "logit_scale" in logit  # with both locked, the scale (and bias) is all that trains
    assert changed <= trainable(model)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_last_groups_of_the_image_tower_stay_trainable(groups: int) -> None:
    model = build(CLIP)
    lock_towers(model, LockConfig(image=True, image_unlocked_groups=groups))
    parts = ["visual.proj", ("visual.transformer.resblocks.2.", "visual.ln_post.")]
    parts += ["visual.transformer.resblocks.1.", "visual.transformer.resblocks.0."]
    expected = {
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(part) for part in parts[:groups])
    }
    assert {name for name in trainable(model) if name.startswith("visual.")} == expected


@pytest.mark.parametrize(("architecture", "prefix"), [(CLIP, ""), (CUSTOM, "text.")])
def test_last_layers_of_the_text_tower_stay_trainable(
    architecture: dict[str, Any], prefix: str
) -> None:
    model = build(architecture)
    lock_towers(model, LockConfig(text=True, text_unlocked_layers=2))
    last = (f"{prefix}transformer.resblocks.1.", f"{prefix}ln_final.", f"{prefix}text_projection")
    others = {name for name in trainable(model) if not name.startswith(("visual.", "logit_"))}
    assert others == {name for name, _ in model.named_parameters() if name.startswith(last)}


@pytest.mark.parametrize("architecture", [CLIP, CUSTOM])
def test_text_parameters_are_those_of_the_text_tower(architecture: dict[str, Any]) -> None:
    model = build(architecture)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)].removeprefix("text.") for parameter in text_parameters(model)}
    assert found == {
        name
        for name, _ in open_clip.model.TextTransformer(
            layers=2, width=16, heads=2, vocab_size=9
        ).named_parameters()
    }


def test_frozen_statistics_of_batch_norm(tmp_path: Path) -> None:
    model, frozen = build(RESNET), build(RESNET)
    lock_towers(model, LockConfig(image=True))
    lock_towers(frozen, LockConfig(image=True, image_freeze_bn_stats=True))
    assert {name.rpartition(".")[2] for name in changed_by_training(model) if "visual" in name} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert not {name for name in changed_by_training(frozen) if "visual" in name}
    # and the written model is a usual one
    clip = load_clip_model("x", architecture=RESNET)
    clip.model.load_state_dict(frozen.state_dict())
    lock_towers(clip.model, LockConfig(image=True, image_freeze_bn_stats=True))
    save_model_folder(clip, tmp_path)
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval().encode_image(image), frozen.eval().encode_image(image))
    assert again.visual.bn1.training is False


@pytest.mark.parametrize("groups", [0, 1])
def test_timm_tower_keeps_its_projection_trainable(groups: int) -> None:
    model = build(TIMM)
    lock_towers(model, LockConfig(image=True, image_unlocked_groups=groups))
    visual = {name for name in trainable(model) if name.startswith("visual.")}
    assert {name for name in visual if name.startswith("visual.head.")}
    assert bool({name for name in visual if name.startswith("visual.trunk.")}) is (groups > 0)


def test_nothing_is_locked_by_default() -> None:
    model = build(COCA)
    lock_towers(model, LockConfig())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        (COCA, {"image": True}, r"cannot lock the towers of CoCa models"),
        (CLIP, {"image": True, "image_freeze_bn_stats": True}, r"no effect: .* no batch norm"),
        (
            RESNET,
            {"image": True, "image_unlocked_groups": 1},
            r"image cannot be true: .*partial locking not",
        ),
        (CLIP, {"image": True, "image_unlocked_groups": 5}, r"less than the number .* Got 5"),
        (CLIP, {"text": True, "text_unlocked_layers": 4}, r"less than the number .* Got 4"),
        (
            CLIP,
            {"text": True, "text_freeze_layer_norm": False},
            r"text cannot be true: .*LayerNorm",
        ),
        (
            CUSTOM,
            {"text": True, "text_freeze_layer_norm": False},
            r"text cannot be true: .*LayerNorm",
        ),
    ],
)
def test_locks_that_a_model_does_not_have(
    architecture: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        lock_towers(build(architecture), LockConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": 1}, r"LockConfig: image must be true or false. Got 1"),
        ({"image": True, "image_unlocked_groups": -1}, r"integer of at least 0. Got -1"),
        ({"text": True, "text_unlocked_layers": 1.5}, r"integer of at least 0. Got 1.5"),
        ({"image_unlocked_groups": 1}, r"image must be true, or image_unlocked_groups and"),
        ({"image_freeze_bn_stats": True}, r"image must be true, or .* image_freeze_bn_stats"),
        (
            {"image": True, "text_unlocked_layers": 1},
            r"text must be true, or text_unlocked_layers and text_fre",
        ),
        (
            {"text_freeze_layer_norm": False},
            r"text must be true, or text_unlocked_layers and text_fre",
        ),
    ],
)
def test_wrong_locks_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LockConfig(**options)


@pytest.mark.parametrize(("architecture", "size"), [(CLIP, 32), (CUSTOM, 32), (TIMM, 64)])
def test_gradient_checkpointing_gives_the_same_gradients(
    architecture: dict[str, Any], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = torch.utils.checkpoint.checkpoint
    for module in ("open_clip.transformer", "timm.models._manipulate"):
        monkeypatch.setattr(
            f"{module}.checkpoint", lambda *args, **kw: calls.append(1) or real(*args, **kw)
        )
    plain, recomputed = build(architecture), build(architecture)
    enable_grad_checkpointing(recomputed)
    image, tokens = torch.randn(4, 3, size, size), torch.randint(1, 99, (4, 8))
    for model in (plain, recomputed):
        assert not calls
        first, second, scale, *_ = model(image, tokens)
        (scale * first @ second.T).square().mean().backward()
    assert calls
    for (name, ours), theirs in zip(recomputed.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradient_checkpointing_that_open_clip_skips_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=r"grad_checkpointing cannot be true: .* ModifiedResNet"):
        enable_grad_checkpointing(build(RESNET))
    model = build(TIMM)

    def unsupported(enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"

    monkeypatch.setattr(model.visual.trunk, "set_grad_checkpointing", unsupported)
    with pytest.raises(InputError, match=r"a tower .* \(gradient checkpointing not supported"):
        enable_grad_checkpointing(model)
