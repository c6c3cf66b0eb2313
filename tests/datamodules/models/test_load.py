"""Models are open_clip's: built by name or configuration, written and read bit for bit."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from siftclip.datamodules.models.load import (
    ClipModel,
    holds_weights,
    load_clip_model,
    save_model_folder,
)
from siftclip.errors import InputError

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
CAPTIONS = ["a red seven", "two blue ones on a ground"]


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    torch.manual_seed(0)
    clip = load_clip_model("tiny", architecture=ARCHITECTURE)
    torch.nn.init.constant_(clip.model.get_parameter("logit_scale"), 1.2345)
    return clip


@pytest.fixture(scope="module")
def saved(clip: ClipModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a model folder."""
    run_dir = tmp_path_factory.mktemp("run")
    save_model_folder(clip, run_dir / "model")
    return run_dir


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@torch.no_grad()
def encode(model: Any, transform: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    image = transform(Image.radial_gradient("L").convert("RGB"))[None]
    model.eval()
    return model.encode_image(image), model.encode_text(tokenizer(CAPTIONS))


def test_model_folder_round_trip_is_exact(clip: ClipModel, saved: Path) -> None:
    for name in (str(saved), str(saved / "model"), f"local-dir:{saved / 'model'}"):
        again = load_clip_model(name)
        assert_same_weights(again.model, clip.model)
        assert again.config["model_cfg"] == clip.config["model_cfg"]
        for ours, theirs in zip(
            encode(again.model, again.eval_transform, again.tokenizer),
            encode(clip.model, clip.eval_transform, clip.tokenizer),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_model_folder_loads_in_open_clip_itself(clip: ClipModel, saved: Path) -> None:
    source = f"local-dir:{saved / 'model'}"
    model, _, transform = open_clip.create_model_and_transforms(source)
    assert_same_weights(model, clip.model)
    for ours, theirs in zip(
        encode(clip.model, clip.eval_transform, clip.tokenizer),
        encode(model, transform, open_clip.get_tokenizer(source)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_model_folder_of_a_loaded_model_is_the_same(saved: Path, tmp_path: Path) -> None:
    save_model_folder(load_clip_model(str(saved)), tmp_path / "again")
    for path in (saved / "model").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_architecture_is_built_and_not_modified(clip: ClipModel) -> None:
    architecture = json.loads(json.dumps(ARCHITECTURE))
    built = load_clip_model("label", architecture=architecture)
    assert architecture == ARCHITECTURE
    assert built.tokenizer(CAPTIONS).shape == (2, 8)
    assert built.eval_transform(Image.new("RGB", (30, 20))).shape == (3, 16, 16)
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}


def test_augmentation_reaches_the_train_transform() -> None:
    image = Image.linear_gradient("L").convert("RGB")  # black at the top, white at the bottom

    def contrast(augmentation: dict[str, Any] | None) -> float:
        clip = load_clip_model("x", architecture=ARCHITECTURE, augmentation=augmentation)
        view = clip.train_transform(image)[0]
        return float(view.max() - view.min())

    # a hundredth of the area is about a tenth of the height
    assert contrast({"scale": [0.01, 0.01]}) < 0.3 * contrast(None)


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "safetensors"])
def test_checkpoint_is_loaded(clip: ClipModel, saved: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"last.{suffix}"
    state = clip.model.state_dict()
    if suffix == "ckpt":  # Lightning's, of our module
        prefixed = {f"model.{key}": value for key, value in state.items()}
        torch.save({"state_dict": prefixed, "global_step": 7}, path)
    elif suffix == "pt":  # open_clip's own
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 3, "name": "x", "state_dict": wrapped}, path)
    else:
        save_file(state, path)
    built = load_clip_model("x", architecture=ARCHITECTURE, pretrained=str(path))
    assert_same_weights(built.model, clip.model)

    other = tmp_path / "folder"  # the file counts, not the weights of the folder
    shutil.copytree(saved / "model", other)
    weights = load_file(other / "open_clip_model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, other / "open_clip_model.safetensors")
    assert_same_weights(load_clip_model(str(other), pretrained=str(path)).model, clip.model)


def test_checkpoint_that_says_what_it_is_of_needs_no_name(clip: ClipModel, tmp_path: Path) -> None:
    path = tmp_path / "step-4.ckpt"
    state = {f"model.{key}": value for key, value in clip.model.state_dict().items()}
    torch.save({"state_dict": state, "open_clip_config": clip.config}, path)
    built = load_clip_model(str(path))
    assert holds_weights(str(path))
    assert_same_weights(built.model, clip.model)
    assert built.config == clip.config
    assert torch.equal(built.tokenizer(["a cat"]), clip.tokenizer(["a cat"]))


@pytest.mark.parametrize("config", [None, 3, [], {}, {"model_cfg": 3}, {"model_cfg": {"x": 1}}])
def test_checkpoint_that_does_not_say_what_it_is_of(
    config: Any, clip: ClipModel, saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "step-4.ckpt"
    state = {f"model.{key}": value for key, value in clip.model.state_dict().items()}
    torch.save({"state_dict": state, "open_clip_config": config}, path)
    with pytest.raises(InputError, match=r"step-4\.ckpt"):
        load_clip_model(str(path))
    weights = saved / "model" / "open_clip_model.safetensors"
    with pytest.raises(InputError, match=rf"Give name {saved / 'model'}, and the file as pretr"):
        load_clip_model(str(weights))


def test_checkpoint_also_counts_for_a_model_of_the_hub(
    clip: ClipModel, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("create_model_and_transforms", "get_tokenizer", "get_model_config"):
        real = getattr(open_clip, name)

        def offline(source: str, real: Any = real, **options: Any) -> Any:
            assert source == "hf-hub:org/repo"
            return real(f"local-dir:{saved / 'model'}", **options)

        monkeypatch.setattr(open_clip, name, offline)
    assert_same_weights(load_clip_model("hf-hub:org/repo").model, clip.model)
    state = {key: value + 1 for key, value in clip.model.state_dict().items()}
    save_file(state, tmp_path / "other.safetensors")
    built = load_clip_model("hf-hub:org/repo", pretrained=str(tmp_path / "other.safetensors"))
    assert torch.equal(built.model.state_dict()["logit_scale"], state["logit_scale"])


def test_unknown_name_suggests_others() -> None:
    with pytest.raises(InputError, match=r"name must be one of .*Got 'ViT-B32'.*ViT-B-32"):
        load_clip_model("ViT-B32")
    with pytest.raises(InputError, match=r"Got 'zzzzzz'\.$"):
        load_clip_model("zzzzzz")


@pytest.mark.parametrize("tag", ["laion2b", "no/such/file.pt", "no_such_file.ckpt"])
def test_unknown_tag_lists_those_of_the_model(tag: str) -> None:
    with pytest.raises(InputError, match=r"existing file or one of \[.*'openai'.*for ViT-B-32"):
        load_clip_model("ViT-B-32", pretrained=tag)


def test_missing_checkpoint_is_named() -> None:
    with pytest.raises(
        InputError,
        match=r"pretrained must be a tag of open_clip or an existing file. Got 'gone.pt'",
    ):
        load_clip_model("x", architecture=ARCHITECTURE, pretrained="gone.pt")


def test_folder_that_is_no_model(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"folder with open_clip_config.json. Got .* Neither was found"
    ):
        load_clip_model(str(tmp_path))
    with pytest.raises(InputError, match=r"Neither was found there: has its training finished\?"):
        load_clip_model(f"local-dir:{tmp_path / 'nowhere'}")
    shutil.copy(saved / "model" / "open_clip_config.json", tmp_path)
    with pytest.raises(InputError, match=r"holds no weights"):
        load_clip_model(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(InputError, match=r"model.safetensors is not a readable safetensors file"):
        load_clip_model(str(tmp_path))


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "safetensors"])
def test_weights_of_another_model_are_refused(clip: ClipModel, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"other.{suffix}"
    state = dict(clip.model.state_dict())
    del state["text_projection"]
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    with pytest.raises(
        InputError, match=r"does not hold the weights of this model: (?s:.*)text_proj"
    ):
        load_clip_model("x", architecture=ARCHITECTURE, pretrained=str(path))


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"damaged" * 99])
def test_damaged_checkpoint_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged.*does not hold the weights of this model"):
        load_clip_model("x", architecture=ARCHITECTURE, pretrained=str(path))


class Intruder:
    """Makes a folder when it is unpickled; a stand-in for `os.system`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


def write_malicious(path: Path, proof: Path, *, bare: bool) -> None:
    if bare:
        path.write_bytes(pickle.dumps({"state_dict": Intruder(proof)}, protocol=2))
    else:
        torch.save({"state_dict": {"model.logit_scale": Intruder(proof)}}, path)


def test_malicious_checkpoint_would_run(tmp_path: Path) -> None:
    """So that the tests below can fail."""
    write_malicious(tmp_path / "evil.pt", tmp_path / "proof", bare=False)
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize("bare", [True, False], ids=["pickle", "torch"])
@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin", "npz", "npy"])
def test_malicious_checkpoint_is_refused_and_not_run(
    tmp_path: Path, suffix: str, bare: bool
) -> None:
    path, proof = tmp_path / f"evil.{suffix}", tmp_path / "proof"
    write_malicious(path, proof, bare=bare)
    with pytest.raises(InputError, match="evil"):
        load_clip_model("x", architecture=ARCHITECTURE, pretrained=str(path))
    with pytest.raises(InputError, match="evil"):
        load_clip_model(str(path))
    assert not proof.exists()


def test_malicious_checkpoint_for_a_built_in_model_is_not_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "evil.pt", tmp_path / "proof"
    write_malicious(path, proof, bare=False)
    with pytest.raises(InputError, match=r"evil.pt"):
        load_clip_model("ViT-S-32-alt", pretrained=str(path))
    assert not proof.exists()


@pytest.mark.parametrize("bare", [True, False], ids=["pickle", "torch"])
def test_malicious_model_folder_is_not_run(saved: Path, tmp_path: Path, bare: bool) -> None:
    proof, folder = tmp_path / "proof", tmp_path / "model"
    folder.mkdir()
    shutil.copy(saved / "model" / "open_clip_config.json", folder)
    write_malicious(folder / "open_clip_pytorch_model.bin", proof, bare=bare)
    with pytest.raises(InputError, match="could not be built by open_clip"):
        load_clip_model(str(folder))
    assert not proof.exists()


def test_folders_and_hubs_bring_weights_along(saved: Path) -> None:
    assert holds_weights("hf-hub:org/repo")
    assert holds_weights(f"local-dir:{saved}")
    assert holds_weights(str(saved))
    assert not holds_weights("ViT-B-32")


def test_random_weights_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    load_clip_model("x", architecture=ARCHITECTURE)
    assert caplog.records == []
    logging.warning("still heard")
    assert "still heard" in caplog.text


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_weights(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "model", tmp_path / "model")
    weights = tmp_path / "model" / "open_clip_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(InputError, match="it is a named pipe, not a file"):
        load_clip_model(str(tmp_path / "model"))
