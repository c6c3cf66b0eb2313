"""What the type checker is told of open_clip's models is so."""

from __future__ import annotations

import inspect

import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.models.typed import as_clip


def test_a_model_has_what_the_protocol_promises() -> None:
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    architecture = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    model = load_clip_model("tiny", architecture=architecture).model
    clip = as_clip(model)
    assert clip is model
    assert clip.logit_scale.shape == ()
    assert isinstance(clip.visual, torch.nn.Module)
    with torch.no_grad():
        for feature in (
            clip.encode_image(torch.zeros(2, 3, 16, 16), normalize=True),
            clip.encode_text(torch.ones(2, 8, dtype=torch.int64), normalize=True),
        ):
            torch.testing.assert_close(feature.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP, CoCa])
def test_every_family_takes_normalize_by_name(kind: type) -> None:
    for method in (kind.encode_image, kind.encode_text):
        inspect.signature(method).bind(None, torch.zeros(1), normalize=True)
