"""Weights from files: whole models and single towers, of every layout, against open_clip's own."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.models.weights import (
    load_tower_weights,
    load_weights,
    read_config,
    read_weights,
)
from siftclip.errors import InputError

VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
CLIP: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
CUSTOM = {**CLIP, "custom_text": True}
BIASED = {**CUSTOM, "init_logit_bias": -10.0, "nonscalar_logit_scale": True}
LARGER = {
    **CLIP,
    "vision_cfg": {**VISION, "image_size": 48},
    "text_cfg": {**TEXT, "context_length": 11},
}
RESNET = {**CLIP, "vision_cfg": {**VISION, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}}

State = dict[str, Tensor]


@functools.cache
def built(architecture: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return load_clip_model("x", architecture=json.loads(architecture)).model


def build(architecture: dict[str, Any], seed: int = 0) -> Any:
    """A random model that the caller may change."""
    return copy.deepcopy(built(json.dumps(architecture), seed))


def assert_same(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.fixture(scope="module")
def state() -> State:
    """Of the built-in CLIP."""
    return dict(build(CLIP, 1).state_dict())


# ---- whole models -------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("architecture", [CLIP, CUSTOM, BIASED, LARGER])
def test_conversions_are_those_of_open_clip(
    state: State, architecture: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, path)
    else:
        save_file(state, path)
    ours, theirs = build(architecture, 2), build(architecture, 3)
    load_weights(ours, path)
    open_clip.load_checkpoint(theirs, str(path))
    assert_same(ours.state_dict(), theirs.state_dict())


def test_checkpoint_of_open_clips_training_gives_its_features(tmp_path: Path) -> None:
    """As `open_clip_train` writes it: with the optimizer, after some steps, epoch and name."""
    model = build(CLIP, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(0, 99, (2, 8))
    for _ in range(2):
        image, text, scale = model(images, tokens)
        (-scale * (image * text).sum()).backward()
        optimizer.step()
    content = {
        "epoch": 1,
        "name": "2026_01_01-model_x",
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }
    torch.save(content, tmp_path / "epoch_1.pt")
    again: Any = load_clip_model(
        "x", architecture=CLIP, pretrained=str(tmp_path / "epoch_1.pt")
    ).model
    with torch.no_grad():
        for ours, theirs in zip(
            again.eval()(images, tokens), model.eval()(images, tokens), strict=True
        ):
            assert torch.equal(ours, theirs)


def lightning(state: State, *, average: State | None) -> dict[str, Any]:
    """A checkpoint of ours: the model, what else the module holds, and what Lightning adds."""
    found = {f"model.{key}": value for key, value in state.items()}
    found.update({"loss.memory": torch.zeros(3), "teacher.visual.proj": torch.zeros(2)})
    if average is not None:
        found.update({f"ema.averaged.{key}": value for key, value in average.items()})
    return {"state_dict": found, "global_step": 7, "pytorch-lightning_version": "2.6"}


@pytest.mark.parametrize(("weights", "added"), [("auto", 1), ("ema", 1), ("raw", 0)])
def test_lightning_checkpoint_with_average(
    state: State, weights: Any, added: int, tmp_path: Path
) -> None:
    average = {key: value + 1 for key, value in state.items()}
    torch.save(lightning(state, average=average), tmp_path / "step-7.ckpt")
    found = load_clip_model(
        "x", architecture=CLIP, pretrained=str(tmp_path / "step-7.ckpt"), weights=weights
    ).model.state_dict()
    assert_same(dict(found), {key: value + added for key, value in state.items()})


def test_lightning_checkpoint_without_average(state: State, tmp_path: Path) -> None:
    path = tmp_path / "step-7.ckpt"
    torch.save(lightning(state, average=None), path)
    assert_same(read_weights(path), state)
    assert_same(read_weights(path, weights="raw"), state)
    with pytest.raises(InputError, match=r"step-7.ckpt holds no moving average .* raw or auto"):
        read_weights(path, weights="ema")


def test_choice_of_weights_needs_a_file() -> None:
    with pytest.raises(
        InputError,
        match=r"weights chooses within a checkpoint file, .* Got 'raw' and pretrained=None",
    ):
        load_clip_model("x", architecture=CLIP, weights="raw")


def test_a_message_names_five_keys(state: State, tmp_path: Path) -> None:
    torch.save({key: value for key, value in state.items() if "visual" in key}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"1\d missing \((\S+, ){5}\.\.\.\)$"):
        load_weights(build(CLIP), tmp_path / "x.pt")
    torch.save({**state, "other": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"this model: 1 unexpected \(other\)$"):
        load_weights(build(CLIP), tmp_path / "x.pt")
    wide = {**CLIP, "vision_cfg": {**VISION, "width": 64}}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"(?s)size mismatch for visual\.") as caught:
        load_weights(build(wide), tmp_path / "x.pt")
    assert len(str(caught.value).splitlines()) <= 7


class Intruder:
    """Makes a folder when it is unpickled; a stand-in for `os.system`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("option", ["pretrained", "pretrained_image", "pretrained_text"])
@pytest.mark.parametrize(
    "write", [torch.save, lambda value, at: at.write_bytes(pickle.dumps(value, 2))]
)
def test_code_in_a_file_is_named_and_not_run(
    option: str, write: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    path, proof = tmp_path / "evil.pt", tmp_path / "proof"
    write({"state_dict": Intruder(proof)}, path)
    arguments: dict[str, Any] = {option: str(path)}
    with pytest.raises(InputError, match=r"evil\.pt does not hold") as caught:
        load_clip_model("x", architecture=CLIP, **arguments)
    assert not proof.exists()
    assert "weights_only" not in str(caught.value)  # PyTorch's message tells how to run it
    assert "holds more than tensors (posix.mkdir), and reading that could run" in str(caught.value)


# ---- single towers ------------------------------------------------------------------------------
def image_tower(state: State) -> State:
    return {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}


def text_tower(state: State) -> State:
    others = ("visual.", "logit_")
    return {k: v for k, v in state.items() if not k.startswith(others)}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


# What a file may hold, as a function of the state of a built-in CLIP.
LAYOUTS: list[Callable[[State], Any]] = [
    lambda state: state,
    lambda state: {"state_dict": prefixed("module.", state), "epoch": 1, "name": "x"},
    lambda state: lightning({k: v - 1 for k, v in state.items()}, average=state),
    lambda state: {
        **prefixed("visual.", image_tower(state)),
        **prefixed("text.", text_tower(state)),
        "logit_scale": state["logit_scale"],
    },
]


@pytest.mark.parametrize("architecture", [CLIP, CUSTOM])
@pytest.mark.parametrize("layout", [*LAYOUTS, image_tower])
def test_image_tower_is_taken_from_a_file(
    state: State, architecture: dict[str, Any], layout: Any, tmp_path: Path
) -> None:
    torch.save(layout(state), tmp_path / "x.pt")
    torch.manual_seed(2)
    model: Any = load_clip_model(
        "x", architecture=architecture, pretrained_image=str(tmp_path / "x.pt")
    ).model
    own = build(architecture, 2).state_dict()
    assert_same(dict(model.visual.state_dict()), image_tower(state))
    for key, value in model.state_dict().items():
        if not key.startswith("visual."):
            assert torch.equal(value, own[key])


@pytest.mark.parametrize("architecture", [CLIP, CUSTOM])
@pytest.mark.parametrize(
    "layout", [*LAYOUTS, text_tower, lambda state: prefixed("text.", text_tower(state))]
)
def test_text_tower_is_taken_from_a_file(
    state: State, architecture: dict[str, Any], layout: Any, tmp_path: Path
) -> None:
    torch.save(layout(state), tmp_path / "x.pt")
    torch.manual_seed(2)
    model = load_clip_model(
        "x", architecture=architecture, pretrained_text=str(tmp_path / "x.pt")
    ).model
    own, expected = build(architecture, 2).state_dict(), text_tower(state)
    taken = 0
    for key, value in model.state_dict().items():
        name = key.removeprefix("text.")
        taken += name in expected
        assert torch.equal(value, expected.get(name, own[key])), key
    assert taken == len(expected)


@pytest.mark.parametrize("custom", [False, True])
def test_towers_are_resized_as_whole_models_are(state: State, custom: bool, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pt")
    larger = {**LARGER, "custom_text": custom}
    whole, parts = build(larger, 2), build(larger, 2)
    open_clip.load_checkpoint(whole, str(tmp_path / "x.pt"))
    torch.save(image_tower(state), tmp_path / "image.pt")
    save_file(text_tower(state), tmp_path / "text.safetensors")
    load_tower_weights(parts, "image", tmp_path / "image.pt")
    load_tower_weights(parts, "text", tmp_path / "text.safetensors")
    with torch.no_grad():
        parts.logit_scale.copy_(whole.logit_scale)
    assert_same(dict(parts.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize(
    ("tower", "change", "message"),
    [
        (
            "image",
            lambda s: {k: v for k, v in s.items() if k != "visual.proj"},
            r"1 missing \(proj\)",
        ),
        ("image", text_tower, r"the image tower: \d+ missing .*; \d+ unexpected"),
        ("image", lambda s: {"epoch": 1}, r"it is not a state dict"),
        ("text", lambda s: {k: v for k, v in s.items() if "proj" not in k}, r"\d missing"),
        ("text", image_tower, r"the text tower: \d+ missing .*; \d+ unexpected .*class_emb"),
        ("text", lambda s: {**text_tower(s), "logit_scale": s["logit_scale"]}, r"1 unexpected"),
        ("text", lambda s: {**s, "positional_embedding": torch.zeros(8, 4)}, r"width changed"),
    ],
)
def test_towers_that_do_not_fit_are_refused(
    state: State, tower: Any, change: Callable[[State], Any], message: str, tmp_path: Path
) -> None:
    """open_clip loads what fits and says so in the log."""
    torch.save(change(state), tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        load_tower_weights(build(CLIP), tower, tmp_path / "x.pt")


def test_tower_of_another_architecture_is_refused(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x.pt does not hold .* image tower"):
        load_clip_model("x", architecture=RESNET, pretrained_image=str(tmp_path / "x.pt"))
    with pytest.raises(InputError, match=r"gone.pt is not a file"):
        load_clip_model("x", architecture=RESNET, pretrained_text="gone.pt")


def test_built_in_name_and_a_file(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(
        InputError, match=r"does not hold the weights of this model: 240 missing \("
    ):
        load_clip_model("ViT-S-32-alt", pretrained=str(tmp_path / "x.pt"))


def test_no_files_and_long_messages(tmp_path: Path) -> None:
    pipe = tmp_path / "a.pt"
    os.mkfifo(pipe)
    assert read_config(pipe) is None  # it does not wait for somebody who writes
    with pytest.raises(InputError, match=r"a\.pt is not a file"):
        read_weights(pipe)
    path = tmp_path / "b.safetensors"
    header = json.dumps({"a" * 9000: {"dtype": "b" * 9000}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError) as caught:
        read_weights(path)
    assert len(str(caught.value)) < 1000


def test_an_archive_of_several_disks_says_nothing(state: State, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(state, path)
    data = bytearray(path.read_bytes())
    locator = data.rfind(b"PK\x06\x07")  # of the large archives that PyTorch writes
    assert locator > 0
    data[locator + 16 : locator + 20] = b"\x09\0\0\0"
    path.write_bytes(data)
    assert read_config(path) is None
