"""What a model gives for an image and two captions, to compare models."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

VOCABULARY = 99  # of the models; the tokenizer knows more
CAPTIONS = ["a red seven", "two blue ones on a ground of stripes and dots"]


@torch.no_grad()
def outputs(model: Any, transform: Any, tokenizer: Any) -> list[torch.Tensor]:
    """Features of an image that is not square and of two captions, and scale and bias."""
    model.eval()
    noise = torch.randint(0, 256, (60, 90, 3), generator=torch.Generator().manual_seed(0))
    image = transform(Image.fromarray(noise.to(torch.uint8).numpy()))[None]
    tokens = tokenizer(CAPTIONS) % VOCABULARY
    values = [model.encode_image(image), model.encode_text(tokens), model.logit_scale]
    return values if model.logit_bias is None else [*values, model.logit_bias]
