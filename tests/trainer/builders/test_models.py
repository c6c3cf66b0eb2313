"""The `model` node of a configuration becomes a model: options, weights in their order, locks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.models.options import OPTIONS
from siftclip.errors import InputError
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.models.towers import LockConfig
from siftclip.trainer.settings.fields.reader import read
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.model import EmbeddingModel, ModelSettings
from siftclip.trainer.settings.store import composing

SMALL = [
    "model=vit_tiny",
    "model.architecture.vision_cfg.layers=1",
    "model.architecture.text_cfg.vocab_size=99",
]


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    """The model node of a tiny ViT, as `siftclip train` composes it."""
    GlobalHydra.instance().clear()
    with composing():
        node: DictConfig = hydra.compose("train", overrides=SMALL).model
    return node


@pytest.fixture
def node(composed: DictConfig) -> Callable[..., ModelSettings]:
    """`node("lock.image=true", ...)`: the same with some options, which must be among its own."""

    def make(*options: str) -> ModelSettings:
        made = OmegaConf.merge(composed, OmegaConf.from_dotlist(list(options)))
        values: Any = OmegaConf.to_container(made)
        return read(ModelSettings, values, "model")

    return make


def state_of(node: ModelSettings, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(clip_model_from(node).model.state_dict())


def save(state: dict[str, torch.Tensor], path: Path) -> str:
    torch.save(state, path)
    return str(path)


def test_configuration_has_all_options_and_changes_nothing(
    node: Callable[..., ModelSettings],
) -> None:
    config = node()
    assert set(to_plain(config.options)) == set(OPTIONS)
    assert LockConfig(**to_plain(config.lock)) == LockConfig()
    torch.manual_seed(0)
    clip = load_clip_model("vit_tiny", architecture=to_plain(config.architecture))
    expected, found = clip.model.state_dict(), state_of(config)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_node_with_little_in_it(node: Callable[..., ModelSettings]) -> None:
    """Such as `features.model`, and configurations of older runs."""
    config = read(EmbeddingModel, {"name": "x", "architecture": to_plain(node().architecture)})
    assert clip_model_from(config).config["model_cfg"] == config.architecture


def test_options_reach_the_model(node: Callable[..., ModelSettings]) -> None:
    config = node("options.force_image_size=16", "options.init_logit_bias=-10")
    clip = clip_model_from(config)
    assert tuple(clip.model.visual.image_size) == (16, 16)  # type: ignore[union-attr, arg-type]
    assert clip.config["model_cfg"]["init_logit_bias"] == -10


def test_towers_come_after_the_whole_model(
    node: Callable[..., ModelSettings], tmp_path: Path
) -> None:
    first, second, third = (state_of(node(), seed) for seed in (1, 2, 3))
    found = state_of(
        node(
            f"pretrained={save(first, tmp_path / '1.pt')}",
            f"pretrained_image={save(second, tmp_path / '2.pt')}",
            f"pretrained_text={save(third, tmp_path / '3.pt')}",
        )
    )
    for key, value in found.items():
        source = second if key.startswith("visual.") else third
        assert torch.equal(value, (first if key == "logit_scale" else source)[key]), key


@pytest.mark.parametrize(("weights", "added"), [("auto", 1), ("raw", 0)])
def test_weights_of_a_checkpoint_are_chosen(
    node: Callable[..., ModelSettings], weights: str, added: int, tmp_path: Path
) -> None:
    state = state_of(node(), 1)
    content = {
        **{f"model.{key}": value for key, value in state.items()},
        **{f"ema.averaged.{key}": value + 1 for key, value in state.items()},
    }
    torch.save({"state_dict": content}, tmp_path / "x.ckpt")
    found = state_of(node(f"pretrained={tmp_path / 'x.ckpt'}", f"weights={weights}"))
    assert all(torch.equal(found[key], state[key] + added) for key in state)


def test_locks_are_set_after_the_weights_are_loaded(
    node: Callable[..., ModelSettings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(node(), 1)
    path = save(state, tmp_path / "x.pt")
    with caplog.at_level(logging.WARNING):
        config = node(f"pretrained_image={path}", "lock.image=true", "lock.image_unlocked_groups=1")
        model = clip_model_from(config).model
    assert not caplog.records
    for name, parameter in model.named_parameters():
        locked = name.startswith("visual.") and name != "visual.proj"
        assert parameter.requires_grad is not locked, name
        if name.startswith("visual."):
            assert torch.equal(parameter, state[name])


def test_locking_random_weights_is_warned_about(
    node: Callable[..., ModelSettings], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        clip_model_from(node("lock.text=true"))
    assert [record.message for record in caplog.records] == [
        "model.lock.text keeps the random weights of that tower"
    ]


def test_random_weights_are_refused_where_nobody_wants_them(
    node: Callable[..., ModelSettings], tmp_path: Path
) -> None:
    path = save(state_of(node(), 1), tmp_path / "x.pt")
    for some in ([], [f"pretrained_image={path}"]):
        with pytest.raises(
            InputError, match=r"No weights given: model.name=.* model.pretrained is not set"
        ):
            clip_model_from(node(*some), trained=True)
    both: Any = [f"pretrained_image={path}", f"pretrained_text={path}"]
    clip_model_from(node(*both), trained=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "weights=best",
            r"model.weights must be one of \['auto', 'ema', 'raw'\]. Got 'best'",
        ),
        ("lock.text_unlocked_layers=1", r"model.lock.text must be true, or text_unlocked_layers"),
        ("options.force_image_size=x", r"force_image_size must be a number of pixels"),
    ],
)
def test_wrong_options_are_named(
    node: Callable[..., ModelSettings], option: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        clip_model_from(node(option))


def test_unknown_option_is_named(node: Callable[..., ModelSettings]) -> None:
    values = to_plain(node())
    values["options"]["quick_gelu"] = True  # as `+model.options.quick_gelu=true` does
    with pytest.raises(InputError, match=r"model.options.quick_gelu is not an option\. Did you"):
        read(ModelSettings, values, "model")
