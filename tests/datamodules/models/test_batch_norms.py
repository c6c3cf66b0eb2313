"""Whether a model may have batch norms is told from its configuration, and never wrongly denied."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch.nn.modules.batchnorm import _BatchNorm

from siftclip.datamodules.models.batch_norms import may_have_batch_norms
from siftclip.files import write_json

TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
TRANSFORMER = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "image_size": 32}
CONFIG = "open_clip_config.json"


def config_of(vision: dict[str, Any]) -> dict[str, Any]:
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}


@pytest.mark.parametrize("vision", [TRANSFORMER, RESNET], ids=["transformer", "resnet"])
def test_an_architecture_tells_what_its_model_has(vision: dict[str, Any]) -> None:
    config = config_of(vision)
    has = any(isinstance(module, _BatchNorm) for module in CLIP(**config).modules())
    assert may_have_batch_norms("a label", config) is has


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32", "coca_base", "ViT-B-32-256"])
def test_a_name_of_open_clip_tells_what_its_model_has(name: str) -> None:
    config = open_clip.get_model_config(name)
    kind = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    config.pop("multimodal_cfg", None)
    with torch.device("meta"):
        model = kind(**config)
    has = any(isinstance(module, _BatchNorm) for module in model.modules())
    assert may_have_batch_norms(name) is has


def test_what_no_file_tells_is_taken_to_have_them(tmp_path: Path) -> None:
    assert may_have_batch_norms("hf-hub:somebody/model")
    assert may_have_batch_norms("no-model-of-open_clip")
    assert may_have_batch_norms("ViT-B-16-SigLIP")  # timm
    assert may_have_batch_norms("a label", {"vision_cfg": None})
    (tmp_path / CONFIG).write_text("{")
    assert may_have_batch_norms(str(tmp_path))


@pytest.mark.parametrize("inside", ["", "model"])
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_folders_tell_by_their_configuration(tmp_path: Path, inside: str, prefix: str) -> None:
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    for vision, has in ((TRANSFORMER, False), (RESNET, True)):
        write_json(folder / CONFIG, {"model_cfg": config_of(vision), "preprocess_cfg": {}})
        assert may_have_batch_norms(f"{prefix}{tmp_path}") is has


def test_nothing_large_is_imported_for_it() -> None:
    code = (
        "import sys\n"
        "from siftclip.datamodules.models.batch_norms import may_have_batch_norms\n"
        "assert may_have_batch_norms('RN50') and not may_have_batch_norms('ViT-B-32')\n"
        "assert not {'open_clip', 'torch', 'timm'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
