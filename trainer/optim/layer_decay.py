"""Layer-wise decay of the learning rate: a factor for each layer of a tower, 1 at its head.

The layers are those of open_clip 4 (`layer_groups` of its towers, commit 89fb801), counted here
because open_clip 3.3 does not know them: embeddings, one layer for each block or stage, projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from siftclip.errors import InputError

Layer = Sequence[nn.Module | nn.Parameter | None]  # None: the tower is built without it


def layer_scales(
    model: nn.Module, *, image_layer_decay: float | None, text_layer_decay: float | None
) -> dict[str, float]:
    """Compute the factor on the learning rate of every parameter, by name.

    A parameter whose layer has d layers above it, the projection included, gets decay ** d.
    Everything outside the decayed towers, such as `logit_scale`, gets 1. A decay of null is 1.

    Args:
        model: the bare open_clip model.
        image_layer_decay: in (0, 1], for `model.visual`.
        text_layer_decay: in (0, 1], for the text tower.

    Raises:
        InputError: the order of a decayed tower's layers is not known.
    """
    scales: dict[int, float] = {}
    towers: list[tuple[float | None, Callable[[nn.Module], list[Layer]]]] = [
        (image_layer_decay, _image_layers),
        (text_layer_decay, _text_layers),
    ]
    for decay, layers_of in towers:
        if decay is None:
            continue
        layers = layers_of(model)
        for depth, layer in enumerate(reversed(layers)):
            for member in layer:
                if member is None:
                    continue
                parameters = [member] if isinstance(member, nn.Parameter) else member.parameters()
                scales.update((id(parameter), decay**depth) for parameter in parameters)
    return {name: scales.get(id(parameter), 1.0) for name, parameter in model.named_parameters()}


def _image_layers(model: nn.Module) -> list[Layer]:
    """Return the layers of the image tower, input first."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer
    from timm.models import group_parameters

    tower = getattr(model, "visual", None)
    if isinstance(tower, VisionTransformer):
        stem: Layer = (
            tower.conv1,
            tower.class_embedding,
            tower.positional_embedding,
            tower.ln_pre,
        )
        return _transformer_layers(stem, tower.transformer.resblocks, tower.ln_post, tower.proj)
    if isinstance(tower, ModifiedResNet):
        stem = (tower.conv1, tower.bn1, tower.conv2, tower.bn2, tower.conv3, tower.bn3)
        stages = [[tower.layer1], [tower.layer2], [tower.layer3], [tower.layer4]]
        return [stem, *stages, [tower.attnpool]]
    if isinstance(tower, TimmModel) and hasattr(tower.trunk, "group_matcher"):
        by_layer = group_parameters(tower.trunk, tower.trunk.group_matcher())
        layers: list[Layer] = [
            [tower.trunk.get_parameter(name) for name in by_layer[number]]
            for number in sorted(by_layer)
        ]
        # An empty adapter means that the trunk ends with the projection.
        return [*layers, [tower.head]] if any(True for _ in tower.head.parameters()) else layers
    raise _unknown("image", tower)


def _text_layers(model: nn.Module) -> list[Layer]:
    """Return the layers of the text tower, input first; plain CLIP holds them itself."""
    tower: Any = getattr(model, "text", model)
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if not hasattr(tower, "token_embedding") or blocks is None:
        raise _unknown("text", tower)
    stem = [
        getattr(tower, name, None)
        for name in ("token_embedding", "positional_embedding", "cls_emb")
    ]
    return _transformer_layers(stem, blocks, tower.ln_final, tower.text_projection)


def _transformer_layers(
    stem: Layer,
    blocks: Sequence[nn.Module] | nn.ModuleList,
    norm: nn.Module,
    projection: nn.Module | nn.Parameter | None,
) -> list[Layer]:
    # The last norm goes with the last block; a tower without projection has no layer for it.
    layers: list[Layer] = [stem, *([block] for block in blocks[:-1]), [blocks[-1], norm]]
    return layers if projection is None else [*layers, [projection]]


def _unknown(kind: str, tower: object) -> InputError:
    return InputError(
        f"optim.{kind}_layer_decay needs a tower whose layers are known: open_clip's own, or "
        f"timm's with a group_matcher. The {kind} tower of this model is a {type(tower).__name__}. "
        f"Set optim.{kind}_layer_decay=null."
    )
