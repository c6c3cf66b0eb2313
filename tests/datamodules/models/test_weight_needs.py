"""Models are built as their weights were trained: the activation, and what images look like."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from torch import nn

from siftclip.datamodules.models.load import ClipModel, load_clip_model, save_model_folder
from siftclip.datamodules.models.options import configured
from siftclip.datamodules.models.weight_needs import (
    WeightNeeds,
    fit_options,
    needs_of_file,
    needs_of_repository,
    needs_of_tag,
    wrong_activation,
)
from siftclip.errors import InputError

Tiny = Callable[..., Path]

PAIRS: list[tuple[str, str]] = open_clip.list_pretrained()
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
SMALL: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
OF_RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}
RESNET: dict[str, Any] = {**SMALL, "vision_cfg": OF_RESNET}


@pytest.fixture
def tiny(tiny_tags: Tiny) -> Tiny:
    """`tiny(name)`: open_clip's model of this name is tiny, and all of its tags are one file."""
    return lambda name, architecture=SMALL: tiny_tags(name, architecture)


def activations(model: nn.Module) -> set[str]:
    """The classes of the activations of transformers; not ReLU, which ResNets have."""
    names = {type(module).__name__ for module in model.modules()}
    return names & {"GELU", "QuickGELU"}


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "siftclip" in record.name]


# ---- open_clip's table --------------------------------------------------------------------------


def test_every_pair_of_the_table_gets_what_its_weights_need() -> None:
    changed = []
    for name, tag in PAIRS:
        entry, config = open_clip.get_pretrained_cfg(name, tag), open_clip.get_model_config(name)
        needs = {tag: needs_of_tag(name, tag)}
        options, lines = fit_options({}, needs, config, name)
        built = configured(config, options)
        if "quick_gelu" in entry:
            assert bool(built.get("quick_gelu")) == entry["quick_gelu"], (name, tag)
        else:  # the table is silent: what the name has always been
            assert built.get("quick_gelu") == config.get("quick_gelu"), (name, tag)
        for key in ("mean", "std", "interpolation", "resize_mode"):
            assert options[f"image_{key}"] == entry[key], (name, tag)
        others = {k: v for k, v in built.items() if k != "quick_gelu"}
        assert others == {k: v for k, v in config.items() if k != "quick_gelu"}
        if built != config:
            changed.append((name, tag))
            # open_clip has this very model under another name
            assert built == open_clip.get_model_config(f"{name}-quickgelu")
            assert len(lines) == 1
            assert f"{name} is built with it, not with GELU" in lines[0]
        else:
            assert lines == []
    mismatches = {
        (name, tag)
        for name, tag in PAIRS
        if bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
        != bool(open_clip.get_model_config(name).get("quick_gelu"))
    }
    # of this one the table is silent, and its configuration has had QuickGELU since it was made
    assert mismatches - set(changed) <= {("roberta-ViT-B-32", "laion2b_s12b_b32k")}
    assert len(changed) >= 27
    assert {("ViT-B-32", "openai"), ("ViT-B-16", "dfn2b"), ("RN50", "cc12m")} <= set(changed)


def test_earlier_versions_were_wrong_for_the_changed_pairs_alone() -> None:
    for name, tag in PAIRS:
        config = open_clip.get_model_config(name)
        needs = needs_of_tag(name, tag)
        was_wrong = bool(config.get("quick_gelu")) != needs.quick_gelu
        assert (wrong_activation(name, tag, None) is not None) == was_wrong
        assert wrong_activation(name, tag, {"force_quick_gelu": needs.quick_gelu or None}) is None
    assert wrong_activation("ViT-B-32", "openai", {}) is False
    assert wrong_activation("ViT-B-32", "laion2b_s34b_b79k", {"force_quick_gelu": True}) is True
    assert wrong_activation("ViT-B-32", None, None) is None
    assert wrong_activation("some/folder", "file.ckpt", None) is None


@pytest.mark.parametrize(
    ("name", "tag", "architecture"),
    [
        ("ViT-B-32", "openai", SMALL),
        ("ViT-B-32", "OpenAI", SMALL),  # open_clip's tags are compared so
        ("ViT-B-32", "laion2b_s34b_b79k", SMALL),
        ("ViT-B-32-quickgelu", "openai", SMALL),
        ("ViT-B-16", "dfn2b", SMALL),
        ("ViT-L-14", "metaclip_400m", SMALL),
        ("ViT-H-14-378", "dfn5b", SMALL),  # squashes images
        ("ViT-L-14-CLIPA", "datacomp1b", SMALL),  # has other mean, std and interpolation
        ("RN50", "cc12m", RESNET),  # in its text tower
    ],
)
def test_loaded_tags_are_the_models_that_were_trained(
    name: str, tag: str, architecture: dict[str, Any], tiny: Tiny
) -> None:
    weights = tiny(name, architecture)
    clip = load_clip_model(name, pretrained=tag)
    entry = open_clip.get_pretrained_cfg(name, tag)
    quick_gelu = entry.get("quick_gelu", False)
    assert activations(clip.model) == {"QuickGELU" if quick_gelu else "GELU"}
    config = open_clip.get_model_config(name)
    model_class = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    size = config["vision_cfg"]["image_size"]
    images, tokens = torch.randn(2, 3, size, size), torch.randint(1, 99, (2, 8))
    with torch.no_grad():
        ours = clip.model.eval().encode_text(tokens), clip.model.encode_image(images)
        for activation in (quick_gelu, not quick_gelu):
            twin: Any = model_class(**{**config, "quick_gelu": activation})
            open_clip.load_checkpoint(twin, str(weights))
            theirs = twin.eval().encode_text(tokens), twin.encode_image(images)
            assert torch.equal(ours[0], theirs[0]) == (activation == quick_gelu)
            if architecture is not RESNET or activation == quick_gelu:  # it has ReLU there
                assert torch.equal(ours[1], theirs[1]) == (activation == quick_gelu)
    kept = {k: v for k, v in entry.items() if k in asdict(PreprocessCfg())}
    expected = image_transform_v2(PreprocessCfg(size=(size, size), **kept), is_train=False)
    assert repr(clip.eval_transform) == repr(expected)
    assert bool(clip.config["model_cfg"].get("quick_gelu")) == quick_gelu


def test_the_written_folder_is_the_same_model(tiny: Tiny, tmp_path: Path) -> None:
    tiny("ViT-B-32")
    clip = load_clip_model("ViT-B-32", pretrained="openai")
    save_model_folder(clip, tmp_path / "model")
    again = load_clip_model(str(tmp_path / "model"))
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    assert activations(again.model) == activations(theirs) == {"QuickGELU"}
    assert repr(again.eval_transform) == repr(clip.eval_transform)


def test_it_is_said_once(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    tiny("ViT-B-32")
    with caplog.at_level(logging.INFO):
        load_clip_model("ViT-B-32", pretrained="openai")
        (line,) = lines_of(caplog)
        assert "pretrained='openai': these weights were trained with QuickGELU" in line
        caplog.clear()
        load_clip_model("ViT-B-32", pretrained="laion2b_s34b_b79k")
        load_clip_model("ViT-B-32")
        assert lines_of(caplog) == []


def test_tags_of_the_other_activation_name_their_model() -> None:
    with pytest.raises(
        InputError, match=r"These are weights with GELU: set the name to ViT-B-32\."
    ):
        load_clip_model("ViT-B-32-quickgelu", pretrained="laion2b_s34b_b79k")


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "forced"), [("openai", False), ("laion2b_s34b_b79k", True)], ids=["gelu", "quickgelu"]
)
def test_another_activation_than_that_of_a_tag_is_refused(
    tag: str, forced: bool, tiny: Tiny
) -> None:
    tiny("ViT-B-32")
    with pytest.raises(
        InputError, match=r"options.force_quick_gelu would make another model .* Got (true|false)"
    ):
        load_clip_model("ViT-B-32", pretrained=tag, options={"force_quick_gelu": forced})
    right = load_clip_model("ViT-B-32", pretrained=tag, options={"force_quick_gelu": not forced})
    assert activations(right.model) == {"GELU" if forced else "QuickGELU"}


def test_random_weights_take_the_option_or_the_name(tiny: Tiny) -> None:
    tiny("ViT-B-32")
    tiny("ViT-B-32-quickgelu")
    for name, forced, expected in (
        ("ViT-B-32", None, "GELU"),
        ("ViT-B-32", True, "QuickGELU"),
        ("ViT-B-32-quickgelu", None, "QuickGELU"),
        ("ViT-B-32-quickgelu", False, "GELU"),  # open_clip alone passes over a false
    ):
        clip = load_clip_model(name, options={"force_quick_gelu": forced})
        assert activations(clip.model) == {expected}
        assert bool(clip.config["model_cfg"].get("quick_gelu")) == (expected == "QuickGELU")


def test_image_options_win_and_are_named(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    tiny("ViT-H-14-378")
    options = {"image_mean": [0.5, 0.5, 0.5], "image_resize_mode": "squash"}
    with caplog.at_level(logging.INFO):
        clip = load_clip_model("ViT-H-14-378", pretrained="dfn5b", options=options)
    lines = [line for line in lines_of(caplog) if "is taken" in line]
    assert len(lines) == 1
    assert "The option image_mean=(0.5, 0.5, 0.5) is taken" in lines[0]
    preprocessing = clip.config["preprocess_cfg"]
    assert tuple(preprocessing["mean"]) == (0.5, 0.5, 0.5)
    assert preprocessing["resize_mode"] == "squash"


# ---- files, folders and repositories ------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model folder with QuickGELU and a mean of its own."""
    torch.manual_seed(0)
    options = {"force_quick_gelu": True, "image_mean": [0.5, 0.4, 0.3]}
    folder = tmp_path / "saved"
    save_model_folder(load_clip_model("x", architecture=SMALL, options=options), folder)
    return folder


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_clip_model(str(folder)).model.state_dict())


def assert_as_saved(clip: ClipModel) -> None:
    assert activations(clip.model) == {"QuickGELU"}
    assert tuple(clip.config["preprocess_cfg"]["mean"]) == (0.5, 0.4, 0.3)


def test_files_say_what_they_are(saved: Path, tmp_path: Path) -> None:
    beside = saved / "open_clip_model.safetensors"
    config = json.loads((saved / "open_clip_config.json").read_text())
    alone = tmp_path / "alone.pt"
    content = {"state_dict": state_of(saved), "open_clip_config": config}
    torch.save(content, alone)
    for file in (beside, alone):
        assert_as_saved(load_clip_model("x", architecture=SMALL, pretrained=str(file)))
        with pytest.raises(
            InputError, match=r"force_quick_gelu would make another model .* Got false"
        ):
            load_clip_model(
                "x",
                architecture=SMALL,
                pretrained=str(file),
                options={"force_quick_gelu": False},
            )
    plain = tmp_path / "plain.pt"
    torch.save({"state_dict": state_of(saved)}, plain)
    assert needs_of_file(plain) is None
    clip = load_clip_model("x", architecture=SMALL, pretrained=str(plain))
    assert activations(clip.model) == {"GELU"}


def test_files_with_gelu_under_a_name_with_quickgelu(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny("ViT-B-32-quickgelu")
    folder = tmp_path / "gelu"
    save_model_folder(load_clip_model("x", architecture=SMALL), folder)
    file = str(folder / "open_clip_model.safetensors")
    with caplog.at_level(logging.INFO):
        clip = load_clip_model("ViT-B-32-quickgelu", pretrained=file)
    assert activations(clip.model) == {"GELU"}
    assert "is built with it, not with QuickGELU" in lines_of(caplog)[0]


def test_downloads_are_known_by_their_place(tiny: Tiny, tmp_path: Path) -> None:
    state = tiny("ViT-B-32").read_bytes()
    repository = "models--timm--vit_base_patch32_clip_224.openai"
    for place, expected in (
        (f"hub/{repository}/snapshots/0123abcd/open_clip_model.safetensors", True),
        ("vit_b_32-quickgelu-laion400m_e31-d867053b.pt", True),
        ("vit_b_32-laion2b_e16-af8dbd0c.pth", False),
        ("b32_400m.pt", True),
        ("ViT-B-32.pt", None),  # OpenAI's, and maybe anybody's
        ("models--me--mine/snapshots/0123abcd/open_clip_model.safetensors", None),
    ):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(state)
        needs = needs_of_file(path)
        assert (None if needs is None else needs.quick_gelu) == expected, place
    clip = load_clip_model(
        "ViT-B-32",
        pretrained=str(
            tmp_path / f"hub/{repository}/snapshots/0123abcd/open_clip_model.safetensors"
        ),
    )
    assert activations(clip.model) == {"QuickGELU"}


def test_a_file_that_says_nothing_is_named(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, saved: Path, tmp_path: Path
) -> None:
    tiny("ViT-B-32")
    file = tmp_path / "mine.pt"
    torch.save(state_of(saved), file)
    with caplog.at_level(logging.INFO):
        load_clip_model("ViT-B-32", pretrained=str(file))
        (line,) = lines_of(caplog)
        assert "mine.pt': the file does not say its activation. ViT-B-32 is built with GELU" in line
        assert "ViT-B-32-quickgelu has QuickGELU" in line
        caplog.clear()
        load_clip_model("ViT-B-32", pretrained=str(file), options={"force_quick_gelu": True})
        assert lines_of(caplog) == []


def test_a_repository_is_as_its_configuration_says() -> None:
    openai = "hf-hub:timm/vit_base_patch32_clip_224.openai"
    for source, config, expected in (
        (openai, {"quick_gelu": True}, True),
        (openai, {"quick_gelu": False}, False),  # its author's word
        (openai, {}, True),  # silent: open_clip's table
        (f"{openai}@main", {}, True),
        ("hf-hub:me/mine", {}, False),
        ("hf-hub:me/mine", {"quick_gelu": True}, True),
    ):
        assert needs_of_repository(source, config).quick_gelu == expected


def test_a_folder_that_is_silent_is_known_by_its_place(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "open_clip_config.json").read_text())
    del config["model_cfg"]["quick_gelu"]
    folder = tmp_path / "models--timm--vit_base_patch32_clip_224.openai" / "snapshots" / "0"
    for place, expected in ((folder, "QuickGELU"), (tmp_path / "elsewhere", "GELU")):
        place.mkdir(parents=True)
        (place / "open_clip_config.json").write_text(json.dumps(config))
        save_file(state_of(saved), place / "open_clip_model.safetensors")
        assert activations(load_clip_model(str(place)).model) == {expected}


def test_folders_refuse_another_activation(saved: Path) -> None:
    with pytest.raises(
        InputError, match=r"force_quick_gelu would make another .*saved'.* Got false"
    ):
        load_clip_model(str(saved), options={"force_quick_gelu": False})


def test_towers_bring_their_activation(saved: Path, tmp_path: Path) -> None:
    gelu = tmp_path / "gelu"
    save_model_folder(load_clip_model("x", architecture=SMALL), gelu)
    first, second = (str(at / "open_clip_model.safetensors") for at in (saved, gelu))
    assert_as_saved(load_clip_model("x", architecture=SMALL, pretrained_image=first))
    text = load_clip_model("x", architecture=SMALL, pretrained_text=first)
    assert activations(text.model) == {"QuickGELU"}
    assert tuple(text.config["preprocess_cfg"]["mean"]) != (0.5, 0.4, 0.3)
    with pytest.raises(InputError, match=r"with the other activation. One model has one"):
        load_clip_model("x", architecture=SMALL, pretrained=second, pretrained_image=first)


def test_towers_without_this_activation_do_not_matter(tmp_path: Path) -> None:
    resnet, gelu = tmp_path / "resnet", tmp_path / "gelu"
    options = {"force_quick_gelu": True}
    save_model_folder(load_clip_model("x", architecture=RESNET, options=options), resnet)
    save_model_folder(load_clip_model("x", architecture=RESNET), gelu)
    image, text = (str(at / "open_clip_model.safetensors") for at in (resnet, gelu))
    clip = load_clip_model("x", architecture=RESNET, pretrained_image=image, pretrained_text=text)
    assert activations(clip.model) == {"GELU"}


@pytest.mark.parametrize("config", [[], {"model_cfg": 1}, {"model_cfg": {"quick_gelu": "yes"}}])
def test_damaged_configurations_are_named(config: Any, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "damaged.pt"
    torch.save({"state_dict": state_of(saved), "open_clip_config": config}, file)
    with pytest.raises(InputError, match=r"damaged.pt, 'open_clip_config',"):
        load_clip_model("x", architecture=SMALL, pretrained=str(file))


def test_weights_agree_or_are_refused_in_any_order() -> None:
    yes, no = (WeightNeeds(says="here", quick_gelu=value) for value in (True, False))
    silent = WeightNeeds(says="nobody")
    assert fit_options({}, {"a": yes, "b": silent, "c": yes}, {}, "x")[0] == {"quick_gelu": True}
    for needs in ({"a": yes, "b": no}, {"a": no, "b": yes}):
        with pytest.raises(InputError, match=r"^b: .*, and a with the other activation"):
            fit_options({}, needs, {}, "x")


# ---- the architecture ---------------------------------------------------------------------------

HEADS = {**VISION, "head_width": 8}


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ({"text_cfg": {**TEXT, "context_length": 5}}, "text_cfg.context_length=5, not 8"),
        ({"text_cfg": {**TEXT, "pool_type": "last"}}, "text_cfg.pool_type=last, not argmax"),
        ({"text_cfg": {**TEXT, "no_causal_mask": True}}, "text_cfg.no_causal_mask=True, not False"),
        ({"vision_cfg": HEADS}, "vision_cfg.head_width=8, not 16"),
        ({"vision_cfg": {**VISION, "image_size": 32}}, r"vision_cfg.image_size=\[32, 32\], not \["),
        (
            {"text_cfg": {**TEXT, "tokenizer_kwargs": {"clean": "lower"}}},
            r"text_cfg.tokenizer_kwargs=\{'clean': 'lower'\}, not None",
        ),
    ],
)
def test_weights_of_another_architecture_that_fit_all_the_same_are_named(
    trained: dict[str, Any], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = load_clip_model("x", architecture={**SMALL, **trained})
    file = tmp_path / "trained.pt"
    torch.save({"state_dict": clip.model.state_dict(), "open_clip_config": clip.config}, file)
    (part,) = trained
    tower = "image" if part == "vision_cfg" else "text"
    with caplog.at_level(logging.INFO):
        load_clip_model("x", architecture=SMALL, pretrained=str(file))
        load_clip_model("x", architecture=SMALL, **{f"pretrained_{tower}": str(file)})
        lines = lines_of(caplog)
        assert [bool(re.search(f"another architecture .*: {words}", line)) for line in lines] == [
            True,
            True,
        ]
        caplog.clear()
        load_clip_model("x", architecture={**SMALL, **trained}, pretrained=str(file))
        other = "text" if tower == "image" else "image"
        load_clip_model("x", architecture=SMALL, **{f"pretrained_{other}": str(file)})
        assert lines_of(caplog) == []


def test_an_architecture_that_an_option_asks_for_is_no_news(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = load_clip_model("x", architecture=SMALL)
    file = tmp_path / "trained.pt"
    torch.save({"state_dict": clip.model.state_dict(), "open_clip_config": clip.config}, file)
    options = {"force_image_size": 32, "force_context_length": 5, "force_patch_dropout": 0.5}
    with caplog.at_level(logging.INFO):
        load_clip_model("x", architecture=SMALL, pretrained=str(file), options=options)
    assert lines_of(caplog) == []


def test_a_name_beside_an_architecture_is_not_taken_for_a_model(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("ViT-B-32", str(saved)):
        load_clip_model(name, architecture=SMALL)
        assert "is not what is built: an architecture is given" in caplog.text
        caplog.clear()
    load_clip_model("mine", architecture=SMALL)
    assert caplog.text == ""
    with pytest.raises(
        InputError, match=r"pretrained is a tag of .* Got 'openai'. Leave the architecture out"
    ):
        load_clip_model("ViT-B-32", architecture=SMALL, pretrained="openai")
    with pytest.raises(InputError, match=r"name would not be read: .* Got 'hf-hub:a/b'"):
        load_clip_model("hf-hub:a/b", architecture=SMALL)
