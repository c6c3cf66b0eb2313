"""Numbers that no model has are refused before anything is built of them."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import open_clip
import pytest

from siftclip.datamodules.models.architecture import check_architecture
from siftclip.datamodules.models.load import CONFIG_NAME, WEIGHTS_NAME, load_clip_model
from siftclip.errors import InputError


def test_every_model_of_open_clip_passes() -> None:
    for name in open_clip.list_models():
        check_architecture(open_clip.get_model_config(name), name)


@pytest.mark.parametrize(
    ("place", "value", "rule"),
    [
        (("embed_dim",), 0, "an integer of at least 1. Got 0"),
        (("embed_dim",), float("nan"), "an integer of at least 1. Got nan"),
        (("embed_dim",), "x", "an integer of at least 1. Got 'x'"),
        (("vision_cfg", "width"), 1.5, "an integer of at least 1"),
        (("vision_cfg", "layers"), 10**8, "a number of at most 1,000"),
        (("vision_cfg", "layers"), [3, -4, 6, 3], "an integer of at least 1"),
        (("vision_cfg", "mlp_ratio"), float("inf"), "a number of at most 10,000,000"),
        (("text_cfg", "vocab_size"), 10**12, "a number of at most 10,000,000"),
        (("text_cfg", "context_length"), True, "an integer of at least 1"),
    ],
)
def test_wrong_numbers_are_named(place: tuple[str, ...], value: Any, rule: str) -> None:
    config = copy.deepcopy(open_clip.get_model_config("ViT-B-32"))
    node = config
    for name in place[:-1]:
        node = node[name]
    node[place[-1]] = value
    with pytest.raises(InputError, match=rf"^Mine: {'.'.join(place)} must be {rule}"):
        check_architecture(config, "Mine")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CONFIG_NAME, b"", "must be a JSON file"),
        (CONFIG_NAME, b"[]", "must be a JSON object"),
        (CONFIG_NAME, None, "it is a named pipe, not a file"),
        (WEIGHTS_NAME, b"", "is not a readable safetensors file"),
        (WEIGHTS_NAME, b"\xff" * 100, "is not a readable safetensors file"),
        (WEIGHTS_NAME, None, "it is a named pipe, not a file"),
    ],
)
def test_a_damaged_file_of_a_folder_is_named(
    name: str, content: bytes | None, message: str, model_folder: Path, tmp_path: Path
) -> None:
    for path in model_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} .*{message}"):
        load_clip_model(str(tmp_path))


def test_a_folder_with_numbers_of_no_model(model_folder: Path, tmp_path: Path) -> None:
    for path in model_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 10**8
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"vision_cfg\.layers must be a number of at most 1,000"):
        load_clip_model(str(tmp_path))
