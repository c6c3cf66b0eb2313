"""Weight decay, layer decay and settings against open_clip's own code and numbers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from siftclip.errors import InputError
from siftclip.trainer.optim.optimizer import (
    OptimSettings,
    clamp_logit_scale,
    is_decayed,
    make_optimizer,
    parameter_groups,
)
from siftclip.trainer.settings.store import STORED

REQUIRED: dict[str, Any] = {
    "lr": 5e-4,
    "beta1": 0.9,
    "beta2": 0.98,
    "eps": 1e-6,
    "weight_decay": 0.2,
    "warmup_steps": 10,
}
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "layers": 3,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "image_size": 32,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}


def settings(**changes: Any) -> OptimSettings:
    return OptimSettings(**{**REQUIRED, **changes})


def build(name: str) -> nn.Module:
    """open_clip's model of that name, without memory for its weights."""
    config = open_clip.get_model_config(name)
    custom = config.pop("custom_text", False) or "timm_model_name" in config["vision_cfg"]
    with torch.device("meta"):
        return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


def sizes(groups: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Tensors and values of each group."""
    return [(len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups]


def open_clip_3_exclude() -> Callable[[str, Any], bool]:
    """The rule as the installed open_clip_train states it, taken from its source."""
    spec = importlib.util.find_spec("open_clip_train.main")
    assert spec is not None
    assert spec.origin is not None
    (line,) = re.findall(r"exclude = (lambda n, p: .+)", Path(spec.origin).read_text())
    rule: Callable[[str, Any], bool] = eval(line)  # noqa: S307 (a line of open_clip's)
    return rule


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "ViT-B-16-SigLIP"])
def test_rule_of_open_clip_3_is_open_clips(name: str) -> None:
    exclude = open_clip_3_exclude()
    model = build(name)
    assert is_decayed(model, settings()) == {
        name: not exclude(name, parameter) for name, parameter in model.named_parameters()
    }


# Tensors and values without and with decay: open_clip 3.3's code, and open_clip 4's (commit
# 89fb801) run on the same model.
@pytest.mark.parametrize(
    ("rule", "name", "without", "decayed"),
    [
        ("open_clip_3", "ViT-B-32", (200, 204_545), (102, 151_072_768)),
        ("open_clip_4", "ViT-B-32", (202, 282_369), (100, 150_994_944)),
        ("open_clip_4", "RN50", (214, 180_737), (110, 101_826_400)),
        ("open_clip_4", "ViT-B-16-SigLIP", (209, 452_354), (105, 202_703_616)),
        ("open_clip_4", "convnext_base", (330, 288_769), (163, 151_230_080)),
    ],
)
def test_groups_have_the_sizes_of_open_clips(
    rule: str, name: str, without: tuple[int, int], decayed: tuple[int, int]
) -> None:
    groups = parameter_groups(build(name), settings(decay_rule=rule))
    assert sizes(groups) == [without, decayed]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2]
    assert [group["lr"] for group in groups] == [5e-4, 5e-4]


def test_modules_declare_names_patterns_and_keywords() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("table", "bias_table", "table_1", "plain"):
                setattr(self, name, nn.Parameter(torch.zeros(2, 2)))

        def no_weight_decay(self) -> set[str]:
            return {"table"}

        def no_weight_decay_patterns(self) -> list[str]:
            return ["table_*"]

        def no_weight_decay_keywords(self) -> set[str]:
            return {"s_table"}

    model = nn.ModuleDict({"a": Tower(), "b": nn.ModuleDict({"plain": nn.Linear(2, 2)})})
    decayed = is_decayed(model, settings(decay_rule="open_clip_4"))
    assert {name for name, value in decayed.items() if value} == {"a.plain", "b.plain.weight"}


def test_patterns_spare_more_parameters() -> None:
    model = open_clip.CLIP(**TINY)
    config = settings(no_decay=["visual.transformer.*", "token_embedding.weight"])
    decayed = {name for name, value in is_decayed(model, config).items() if value}
    before = {name for name, value in is_decayed(model, settings()).items() if value}
    gone = {n for n in before if n.startswith("visual.transformer.")} | {"token_embedding.weight"}
    assert decayed == before - gone


def test_a_pattern_without_parameters_is_refused() -> None:
    # Patterns cover whole names: a part of one is a likely mistake.
    with pytest.raises(InputError, match=r"optim\.no_decay: no parameter .*'token_embedding'"):
        parameter_groups(open_clip.CLIP(**TINY), settings(no_decay=["token_embedding"]))


def rates(model: nn.Module, config: OptimSettings) -> dict[str, float]:
    """The rate of each trained parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group["lr"]
        for group in parameter_groups(model, config)
        for parameter in group["params"]
    }


def depth_in_transformer(name: str, layers: int) -> int:
    """How many layers of open_clip 4's order lie above a parameter, from its name alone."""
    block = re.search(r"resblocks\.(\d+)\.", name)
    if block:
        return layers - int(block.group(1))
    if re.search(r"ln_(post|final)", name):
        return 1
    return 0 if re.search(r"(visual\.|text_)proj", name) else layers + 1


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_layer_decay_of_transformers_by_name(kind: type[nn.Module]) -> None:
    config = settings(image_layer_decay=0.5, text_layer_decay=0.7)
    for name, rate in rates(kind(**TINY), config).items():
        if name == "logit_scale":
            expected = 5e-4
        elif name.startswith("visual."):
            expected = 5e-4 * 0.5 ** depth_in_transformer(name, 3)
        else:
            expected = 5e-4 * 0.7 ** depth_in_transformer(name, 2)
        assert rate == pytest.approx(expected, rel=1e-12), name


# Values at each depth from the head, of the image tower and of all the rest, which the code of
# open_clip 4 (commit 89fb801, layer_decay_param_groups) gives for these models.
BLOCK = 7_087_872
TEXT = [262_145, 3_153_408, *[3_152_384] * 11, 25_336_320]
IMAGE = {
    "ViT-B-32": [393_216, 7_089_408, *[BLOCK] * 11, 2_400_000],
    "ViT-B-16-SigLIP": [7_087_104, 7_089_408, *[BLOCK] * 11, 741_120],
    "RN50": [14_789_632, 14_964_736, 7_098_368, 1_219_584, 215_808, 28_768],
    "convnext_base": [
        *[524_288, 2_048, 8_448_000, 8_448_000, 10_547_200],
        *[2_126_848] * 26,
        *[2_652_160, 539_136, 539_136, 670_720, 138_496, 138_496, 138_496, 6_528],
    ],
}
OTHERS = {
    "ViT-B-32": TEXT,
    "ViT-B-16-SigLIP": [590_594, 7_089_408, *[BLOCK] * 11, 24_625_152],
    "RN50": [524_289, *TEXT[1:]],
    "convnext_base": TEXT,
}


@pytest.mark.parametrize("name", IMAGE)
def test_layer_decay_has_the_layers_of_open_clip_4(name: str) -> None:
    model = build(name)
    image, others = [0] * len(IMAGE[name]), [0] * len(OTHERS[name])
    count = {key: parameter.numel() for key, parameter in model.named_parameters()}
    powers = {
        5e-4 * decay**depth: (depth, counts)
        for decay, counts in ((0.5, image), (0.7, others))
        for depth in range(1, len(counts))
    }
    config = settings(image_layer_decay=0.5, text_layer_decay=0.7)
    for key, rate in rates(model, config).items():
        top = (0, image if key.startswith("visual.") else others)
        depth, counts = top if rate == 5e-4 else powers[rate]
        counts[depth] += count[key]
    assert image == IMAGE[name]
    assert others == OTHERS[name]


def test_layer_decay_of_one_tower_leaves_the_other() -> None:
    found = rates(open_clip.CLIP(**TINY), settings(image_layer_decay=0.5))
    assert {rate for name, rate in found.items() if not name.startswith("visual.")} == {5e-4}
    assert found["visual.conv1.weight"] == 5e-4 * 0.5**4
    assert set(rates(open_clip.CLIP(**TINY), settings(image_layer_decay=1.0)).values()) == {5e-4}


def test_groups_are_ordered_by_rate_and_then_decay() -> None:
    config = settings(image_layer_decay=0.5, text_layer_decay=0.5)
    groups = parameter_groups(open_clip.CLIP(**TINY), config)
    keys = [(-group["lr"], group["weight_decay"]) for group in groups]
    assert keys == sorted(set(keys))
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_layer_decay_of_an_unknown_tower_is_refused(tower: str) -> None:
    model = open_clip.CustomTextCLIP(**TINY)
    setattr(model, {"image": "visual", "text": "text"}[tower], nn.Linear(2, 2))
    with pytest.raises(InputError, match=rf"{tower}_layer_decay.* is a Linear\. Set .*=null"):
        parameter_groups(model, settings(**{f"{tower}_layer_decay": 0.5}))


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    (group,) = parameter_groups(model, settings())
    assert group["params"] == [model.bias]
    model.bias.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter of the model is trainable"):
        parameter_groups(model, settings())


def test_optimizer_takes_the_settings() -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), settings(), fused=True)
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["eps"] == 1e-6
    assert optimizer.defaults["fused"]
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-4]


@pytest.mark.parametrize(("start", "end"), [(-1.0, 0.0), (9.0, 4.605170), (2.6593, 2.6593)])
def test_scale_is_clamped(start: float, end: float) -> None:
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor(start))
    clamp_logit_scale(model)
    assert model.logit_scale.item() == pytest.approx(end)


def test_defaults_are_those_of_the_configuration() -> None:
    (adamw,) = (stored for stored in STORED if stored.group == "optim")
    values = adamw.node()
    assert set(values) == set(OptimSettings.__slots__) - {"timm"}  # which is not listed
    config = OptimSettings(**{name: values[name] for name in REQUIRED})
    for name, value in values.items():
        default = getattr(config, name)
        assert (list(default) if isinstance(value, list) else default) == value, name


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("lr", 0.0, "above 0"),
        ("lr", float("nan"), "finite"),
        ("beta2", 1.0, r"\[0, 1\)"),
        ("weight_decay", -0.1, "at least 0"),
        ("warmup_steps", 1.5, "integer"),
        ("grad_clip_norm", 0, "above 0, or null"),
        ("schedule", "linear", r"one of \['cosine', 'const', 'cooldown'\]"),
        ("cooldown_power", 0.0, "above 0"),
        ("cooldown_end_lr", -1e-5, "at least 0"),
        ("decay_rule", "timm", r"one of \['open_clip_3', 'open_clip_4'\]"),
        ("no_decay", "visual.proj", "a list of patterns"),
        ("no_decay", [""], "a list of patterns"),
        ("image_layer_decay", 0.0, r"\(0, 1\]"),
        ("text_layer_decay", 1.1, r"\(0, 1\]"),
        ("ema_decay", 1.0, r"\(0, 1\), or null"),
    ],
)
def test_bad_settings_name_option_rule_and_value(name: str, value: Any, rule: str) -> None:
    pattern = rf"optim\.{name} must be .*{rule}.*Got {re.escape(repr(value))}"
    with pytest.raises(InputError, match=pattern):
        settings(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cooldown_steps": 5}, r"cooldown_steps=5 has no effect with optim\.schedule=cosine"),
        ({"schedule": "const", "cooldown_power": 2.0}, "cooldown_power=2.0 has no effect"),
        ({"cooldown_end_lr": 1e-5}, "cooldown_end_lr=1e-05 has no effect"),
        (
            {"schedule": "cooldown"},
            "cooldown_steps is not set. It must be an integer of at least 1 with",
        ),
        ({"schedule": "cooldown", "cooldown_steps": 0}, "cooldown_steps must be an integer"),
        (
            {"schedule": "cooldown", "cooldown_steps": 5, "cooldown_end_lr": 5e-4},
            r"cooldown_end_lr must be below optim\.lr=0\.0005\. Got 0\.0005",
        ),
        ({"no_decay": ["*"], "weight_decay": 0.0}, "has no effect with optim.weight_decay=0"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**changes)
