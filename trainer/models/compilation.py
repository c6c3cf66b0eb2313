"""torch.compile of the towers, in place: names of weights and checkpoints stay as they are."""

from __future__ import annotations

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import PatchDropout
from timm.layers import DropPath
from timm.layers import PatchDropout as TimmPatchDropout
from torch import nn

from siftclip.errors import InputError


def compile_towers(
    model: nn.Module, *, micro_batches: bool = False, backend: str = "inductor"
) -> None:
    """Compile what computes in an open_clip model; loss and exchange between devices stay outside.

    Args:
        model: the bare open_clip model.
        micro_batches: whether a step computes its features twice.
        backend: torch's name; inductor needs a C++ compiler on a CPU, and Triton on a GPU.

    Raises:
        InputError: dropout with micro-batches. A compiled pass with and one without a graph draw
            different random numbers, so gradients would be those of other features.
    """
    if micro_batches and any(_is_random(module) for module in model.modules()):
        raise InputError(
            "trainer.compile=true does not go with trainer.micro_batch_size and dropout: the two "
            "passes of a micro-batch would drop different parts. Set trainer.compile=false, "
            "trainer.micro_batch_size=null, or no dropout (model.options.force_patch_dropout)."
        )
    # DDP's own splitting of graphs fails with gradient checkpointing.
    torch._dynamo.config.optimize_ddp = False
    for name in ("visual", "transformer", "text", "text_decoder"):
        tower = getattr(model, name, None)
        if isinstance(tower, nn.Module):
            tower.compile(backend=backend)


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, (PatchDropout, TimmPatchDropout)):
        return bool(module.prob > 0)
    if isinstance(module, DropPath):
        return bool(module.drop_prob > 0)
    if isinstance(module, HFTextEncoder):  # some of its modules hold no more than the number
        numbers = module.config.to_dict()
        return any("drop" in name and bool(value) for name, value in numbers.items())
    return isinstance(module, nn.Dropout) and module.p > 0
