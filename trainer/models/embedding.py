"""A pool's samples as a model embeds them, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.models.typed import as_clip
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.streaming.batches import Batch, SampleDataset


@torch.no_grad()
def embed_batch(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Embed a batch: unit image and text features, float16 [b, d] on the CPU; NaN for bad samples.

    float16 is how DataComp stores features.
    """
    batch = batch.finished()
    image = as_clip(model).encode_image(batch.images, normalize=True)
    text = as_clip(model).encode_text(batch.tokens, normalize=True)
    invalid = ~batch.valid[:, None]
    return (
        image.masked_fill(invalid, torch.nan).half().cpu(),
        text.masked_fill(invalid, torch.nan).half().cpu(),
    )


def embedding_dataset(clip: ClipModel, pool: Pool, *, max_image_pixels: int) -> SampleDataset:
    """Return a pool's samples as they are evaluated; bad ones keep their places, marked invalid."""
    return SampleDataset(
        reader=SampleReader(pool=pool, max_image_pixels=max_image_pixels),
        transform=clip.eval_transform,
        tokenizer=clip.tokenizer,
        seed=0,  # the eval transform draws nothing
        substitutes=None,
    )
