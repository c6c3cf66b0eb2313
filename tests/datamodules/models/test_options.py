"""open_clip's options do what they do in open_clip, and the written folder remembers them."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from model_outputs import CAPTIONS, VOCABULARY, outputs

from siftclip.datamodules.models.load import ClipModel, load_clip_model, save_model_folder
from siftclip.datamodules.models.options import OPTIONS
from siftclip.errors import InputError

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 8, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 1}
CLIP = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP = {**CLIP, "custom_text": True, "init_logit_bias": -10, "init_logit_scale": 2.3}
COCA = {
    "embed_dim": 16,
    "custom_text": True,
    "vision_cfg": {
        **VISION,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 4,
        "output_tokens": True,
    },
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
}
RESNET = {**CLIP, "vision_cfg": {**VISION, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}}

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (CLIP, {}),
    (SIGLIP, {}),
    (COCA, {}),
    (COCA, {"force_context_length": 5}),
    (CLIP, {"force_quick_gelu": True}),
    (CLIP, {"force_custom_text": True, "init_logit_bias": -10.0, "nonscalar_logit_scale": True}),
    (CLIP, {"force_image_size": 48}),
    (CLIP, {"force_image_size": [48, 32]}),
    (RESNET, {"force_image_size": 64}),
    (CLIP, {"force_context_length": 5}),
    (CLIP, {"force_patch_dropout": 0.5}),
    (
        CLIP,
        {
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.5, 0.6, 0.7],
            "image_interpolation": "bilinear",
            "image_resize_mode": "squash",
            "init_logit_scale": 1.5,
        },
    ),
]


@functools.cache
def built(architecture: str, options: str) -> ClipModel:
    torch.manual_seed(0)
    clip = load_clip_model("x", architecture=json.loads(architecture), options=json.loads(options))
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return clip


def build(architecture: dict[str, Any], options: dict[str, Any]) -> ClipModel:
    """A model whose weights differ from the initial ones everywhere; not to be changed."""
    return built(json.dumps(architecture), json.dumps(options))


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_folder_gives_open_clip_the_same_outputs(
    architecture: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    clip = build(architecture, options)
    save_model_folder(clip, tmp_path)
    source = f"local-dir:{tmp_path}"
    model, _, transform = open_clip.create_model_and_transforms(source)
    assert_equal(
        outputs(model, transform, open_clip.get_tokenizer(source)),
        outputs(clip.model, clip.eval_transform, clip.tokenizer),
    )


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_options_mean_what_they_mean_in_open_clip(
    architecture: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    clip = build(architecture, options)
    config = {"model_cfg": architecture, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    source = f"local-dir:{tmp_path}"
    theirs = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    model, train_transform, transform = open_clip.create_model_and_transforms(source, **theirs)
    model.load_state_dict(clip.model.state_dict())
    length = options.get("force_context_length")
    tokenizer = open_clip.get_tokenizer(source, context_length=length)
    assert type(model) is type(clip.model)
    assert repr(model) == repr(clip.model)
    assert repr(train_transform) == repr(clip.train_transform)
    assert_equal(
        outputs(model, transform, tokenizer),
        outputs(clip.model, clip.eval_transform, clip.tokenizer),
    )


@pytest.mark.parametrize(("architecture", "options"), [case for case in CASES if case[1]])
def test_every_option_changes_something(
    architecture: dict[str, Any], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    plain = load_clip_model("x", architecture=architecture)
    torch.manual_seed(0)
    changed = load_clip_model("x", architecture=architecture, options=options)
    same = repr(plain.model) == repr(changed.model) and all(
        torch.equal(first, second) if first.shape == second.shape else False
        for first, second in zip(
            outputs(plain.model, plain.eval_transform, plain.tokenizer),
            outputs(changed.model, changed.eval_transform, changed.tokenizer),
            strict=False,
        )
    )
    assert not same


def test_all_options_are_tested() -> None:
    assert {name for _, options in CASES for name in options} == set(OPTIONS)


def test_options_of_null_change_nothing() -> None:
    architecture = copy.deepcopy(SIGLIP)
    clip = load_clip_model("x", architecture=architecture, options=dict.fromkeys(OPTIONS))
    assert architecture == SIGLIP
    assert clip.config["model_cfg"] == SIGLIP


def test_tokens_have_the_forced_length() -> None:
    clip = load_clip_model("x", architecture=CLIP, options={"force_context_length": 5})
    assert clip.tokenizer(CAPTIONS).shape == (2, 5)
    assert clip.model.get_parameter("positional_embedding").shape[0] == 5


def test_patch_dropout_trains_but_is_not_saved() -> None:
    clip = build(CLIP, {"force_patch_dropout": 0.5})
    image = torch.randn(1, 3, 32, 32)
    clip.model.train()
    encode: Any = clip.model.encode_image
    assert not torch.equal(encode(image), encode(image))
    assert "patch_dropout" not in clip.config["model_cfg"]["vision_cfg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quick_gelu": True}, r"options.quick_gelu is unknown. The options are force_quick_gelu,"),
        ({"force_quick_gelu": 1}, r"force_quick_gelu must be true or false. Got 1\."),
        ({"force_patch_dropout": 1.0}, r"must be a number in the range \[0, 1\). Got 1.0"),
        ({"force_patch_dropout": True}, r"must be a number in the range \[0, 1\). Got True"),
        ({"force_image_size": 0}, r"a number of pixels, or \[height, width\]. Got 0"),
        ({"force_image_size": [8, 8, 8]}, r"a number of pixels, or \[height, width\]"),
        ({"force_context_length": 0}, r"a number of tokens, at least 1. Got 0"),
        ({"image_mean": 0.5}, r"image_mean must be three numbers, for R, G and B. Got 0.5"),
        ({"image_std": [1, 1, 0]}, r"image_std must be three numbers above 0"),
        ({"image_interpolation": "cubic"}, r"must be bicubic, bilinear or random. Got 'cubic'"),
        ({"image_resize_mode": "crop"}, r"must be shortest, longest or squash. Got 'crop'"),
        ({"init_logit_bias": float("nan")}, r"init_logit_bias must be a finite number. Got nan"),
        ({"init_logit_scale": "x"}, r"init_logit_scale must be a finite number. Got 'x'"),
        ({"nonscalar_logit_scale": "yes"}, r"must be true or false. Got 'yes'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_clip_model("x", architecture=CLIP, options=options)


def test_options_that_a_model_cannot_use_are_refused() -> None:
    with pytest.raises(InputError, match=r"force_patch_dropout has no effect: .* is a ResNet"):
        load_clip_model("x", architecture=RESNET, options={"force_patch_dropout": 0.5})
    with pytest.raises(InputError, match=r"must be at most 8, the context .* decoder. Got 9"):
        load_clip_model("x", architecture=COCA, options={"force_context_length": 9})


def test_random_coca_has_no_undefined_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def undefined(*size: Any, **options: Any) -> torch.Tensor:
        return real(*size, **options).fill_(1e30)  # what lies in memory, made visible

    monkeypatch.setattr(torch, "empty", undefined)
    model = load_clip_model("x", architecture=COCA).model
    assert all(float(value.abs().max()) < 20 for value in model.state_dict().values())
    projection = model.get_parameter("text_decoder.text_projection")
    assert float(projection.detach().std()) == pytest.approx(16**-0.5, rel=0.2)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    clip = load_clip_model("x", architecture=CLIP)
    with torch.no_grad():
        clip.model.get_parameter("visual.proj")[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"the weights 'visual.proj' hold NaN or infinity"):
        save_model_folder(clip, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_other_weights_can_be_written(tmp_path: Path) -> None:
    clip = build(CLIP, {})
    average = {key: value + 1 for key, value in clip.model.state_dict().items()}
    save_model_folder(clip, tmp_path, average)
    found = load_clip_model(str(tmp_path)).model.state_dict()
    assert found.keys() == average.keys()
    assert all(torch.equal(found[key], average[key]) for key in average)
