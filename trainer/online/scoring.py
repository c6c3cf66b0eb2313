"""Features for scores: full, or cheaper by fewer pixels, fewer patches, or half precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import PatchDropout, VisionTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from siftclip.datamodules.models.autocast import autocast, no_weight_cache
from siftclip.datamodules.models.typed import as_clip
from siftclip.errors import InputError
from siftclip.trainer.online.scoring_config import ScoringConfig
from siftclip.trainer.optim.gradients import kept_statistics

RESNET_STRIDE = 32  # pixels a step of the last grid of open_clip's ModifiedResNet


def scoring_features(
    model: nn.Module,
    images: Tensor,
    tokens: Tensor,
    config: ScoringConfig,
    seed: int,
    *,
    positions: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute features of a chunk, without gradients: images, texts, float32 [b, d], unit norm.

    With the default configuration they are those of `encode_image` and `encode_text` of the model
    in evaluation mode, bit for bit in fp32. They are normalised in fp32 whatever computes them.
    In training mode batch norms use the statistics of the chunk, so that scores depend on how a
    super-batch is cut; running statistics stay as they are. An autocast around the call stays in
    force, but for `precision="bf16"`.

    Fewer pixels: FlexiViT (arXiv 2212.08013) changes the size of the patches; here patches keep
    theirs and the position embedding is resized. Fewer patches: FLIP (arXiv 2212.00794), which
    open_clip has in training mode only.

    Args:
        model: an open_clip model, left as it was found, its modules' modes and weights included.
        images: float [b, 3, s, s], at the model's own size.
        tokens: int64 [b, context_length].
        config: what `check_scoring` has passed.
        seed: of dropout, patch dropout included; global random state is not moved. Which patches
            are left out depends on the sample's place in the chunk.
        positions: of `resized_positions`, to compute them once for many chunks of a step.
    """
    if positions is None:
        positions = resized_positions(model, config)
    visual: Any = model.visual
    images = resized_images(images, config.image_size).to(next(visual.parameters()).dtype)
    with (
        torch.no_grad(),
        model_mode(model, training=config.mode == "train"),
        seeded_dropout(seed, images.device) if config.mode == "train" else nullcontext(),
        _precision(config, images.device),
        _patch_dropout(visual, config.patch_dropout, seed),
    ):
        image = functional_call(_ImageEncoder(model), dict(positions), (images,))
        text = as_clip(model).encode_text(tokens, normalize=False)
    return _unit(image), _unit(text)


def resized_images(images: Tensor, size: int | None) -> Tensor:
    """Resize images float [b, 3, s, s], bilinear with antialias; None leaves them."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def resized_positions(model: nn.Module, config: ScoringConfig) -> dict[str, Tensor]:
    """Resize the image tower's position embedding, returned by its name; empty at full size.

    The vector of the class token, or of the pooled one, comes first and is kept. The others are
    resized as a grid: bicubic with antialias, as open_clip resizes a checkpoint
    (`open_clip.model.resize_pos_embed`), which does so for transformers only.

    Raises:
        InputError: as `check_scoring`.
    """
    if config.image_size is None:
        return {}
    name, embedding, cell_pixels = _grid(model, config.image_size)
    side = config.image_size // cell_pixels
    with torch.no_grad():
        first, rest = embedding[:1], embedding[1:]
        old_side = round(len(rest) ** 0.5)
        grid = rest.float().reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
        rows = grid.permute(0, 2, 3, 1).reshape(side * side, -1).to(embedding.dtype)
        return {f"model.{name}": torch.cat([first, rows])}


def check_scoring(model: nn.Module, config: ScoringConfig) -> None:
    """Refuse what the image tower of the model cannot do.

    Raises:
        InputError: `image_size` does not fit the tower, is not below its own, or the tower is none
            of open_clip's own; `patch_dropout` for another tower than its vision transformer.
    """
    if config.image_size is not None:
        _grid(model, config.image_size)
    if config.patch_dropout and not isinstance(model.visual, VisionTransformer):
        raise InputError(
            f"online.scoring.patch_dropout={config.patch_dropout!r} needs a vision transformer of "
            f"open_clip's own. The image tower is a {type(model.visual).__name__}: set it to 0."
        )


def scoring_is_forward(model: nn.Module, config: ScoringConfig) -> bool:
    """Return whether these are, up to rounding, a training forward's features of equal weights.

    Then the first pass of GradCache may be left out. The answer is no where it is not sure: with
    batch norms, dropout or patch dropout above 0, and with towers of other packages (timm, Hugging
    Face), whose modules may act differently in training without a sign of it.
    """
    cheaper = config.image_size is not None or config.patch_dropout or config.precision is not None
    return not cheaper and all(_same_in_training(module) for module in model.modules())


def _same_in_training(module: nn.Module) -> bool:
    if not type(module).__module__.startswith(("torch.nn.modules.", "open_clip.")):
        return False
    if isinstance(module, _NormBase):  # batch norms, and instance norms
        return False
    if isinstance(module, _DropoutNd):
        return module.p == 0
    if isinstance(module, PatchDropout):
        return bool(module.prob == 0)
    return not isinstance(module, nn.MultiheadAttention) or module.dropout == 0


def _grid(model: nn.Module, image_size: int) -> tuple[str, Tensor, int]:
    """Return the position embedding's name, itself [1 + g * g, w], and a grid cell's pixels."""
    option = f"online.scoring.image_size={image_size}"
    visual: Any = model.visual
    if isinstance(visual, VisionTransformer):
        name, embedding = "visual.positional_embedding", visual.positional_embedding
        sizes, cells = tuple(visual.image_size), tuple(visual.patch_size)
    elif isinstance(visual, ModifiedResNet):
        name, embedding = (
            "visual.attnpool.positional_embedding",
            visual.attnpool.positional_embedding,
        )
        side = visual.image_size
        sizes = tuple(side) if isinstance(side, (tuple, list)) else (side, side)
        cells = (RESNET_STRIDE, RESNET_STRIDE)
    else:
        raise InputError(
            f"{option} needs a vision transformer or a ResNet of open_clip's own. The image tower "
            f"is a {type(visual).__name__}: set it to null."
        )
    if isinstance(embedding, DTensor):
        raise InputError(f"{option} does not go with trainer.strategy=fsdp. Set it to null.")
    if sizes[0] != sizes[1] or cells[0] != cells[1]:
        raise InputError(f"{option} needs square images and patches. Set it to null.")
    if image_size % cells[0] or image_size >= sizes[0]:
        raise InputError(
            f"{option} must be a multiple of {cells[0]} pixels, the size of a cell of the tower's "
            f"grid, and below the model's own {sizes[0]}; or null for that."
        )
    return name, embedding, cells[0]


class _ImageEncoder(nn.Module):
    """`encode_image` as a forward, which is what `functional_call` calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return as_clip(self.model).encode_image(images, normalize=False)


class _SeededPatchDropout(nn.Module):
    """open_clip's `PatchDropout` in either mode, with random numbers of its own."""

    def __init__(self, probability: float, seed: int) -> None:
        super().__init__()
        self.probability, self.seed = probability, seed

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch ships it without types
    def forward(self, tokens: Tensor) -> Tensor:
        samples, patches, width = tokens.shape[0], tokens.shape[1] - 1, tokens.shape[2]
        kept = max(1, int(patches * (1 - self.probability)))  # as many as open_clip keeps
        generator = torch.Generator(tokens.device).manual_seed(self.seed)
        noise = torch.rand(samples, patches, generator=generator, device=tokens.device)
        places = noise.topk(kept, dim=1).indices[..., None].expand(-1, -1, width)
        return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, places)], dim=1)


@contextmanager
def _patch_dropout(visual: Any, probability: float, seed: int) -> Iterator[None]:
    # The module is replaced, not hooked: a compiled tower would not notice a new hook.
    if not probability:
        yield
        return
    before = visual.patch_dropout
    visual.patch_dropout = _SeededPatchDropout(probability, seed)
    try:
        yield
    finally:
        visual.patch_dropout = before


@contextmanager
def model_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put all modules in one mode inside; afterwards each in its own, statistics unchanged."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        with kept_statistics(model) if training else nullcontext():
            yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def seeded_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators that dropout draws from, and put them back afterwards."""
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng(
        devices=[] if on_cpu else [device], device_type="cuda" if on_cpu else device.type
    ):
        torch.default_generator.manual_seed(seed)
        if not on_cpu:
            torch.get_device_module(device).manual_seed(seed)
        yield


def _precision(config: ScoringConfig, device: torch.device) -> AbstractContextManager[Any]:
    return autocast(device, torch.bfloat16) if config.precision else no_weight_cache()


def _unit(features: Tensor) -> Tensor:
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(exact, dim=-1).float()
