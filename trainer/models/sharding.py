"""FSDP2: the blocks of an open_clip model sharded over all ranks, and whole weights again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from siftclip.errors import InputError


def is_sharded(module: LightningModule) -> bool:
    """Return whether the trainer's strategy is FSDP2."""
    trainer = module._trainer
    return trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)


def mixed_precision(precision: str, reduce_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Return in which types weights are gathered and gradients averaged over ranks.

    With bf16-mixed weights travel as bf16, which autocast would make of nearly all of them in the
    forward. Weights that the optimiser moves, and its moments, stay fp32. What is computed in
    which type is left to autocast: a residual stream in fp32 stays one.

    Args:
        precision: Lightning's name, such as `32-true`.
        reduce_dtype: of gradients while they are averaged; float32 leaves wider ones as they are.
    """
    is_bf16 = precision.startswith("bf16")
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        reduce_dtype=reduce_dtype if is_bf16 or reduce_dtype != torch.float32 else None,
        cast_forward_inputs=False,
    )


def shard_model(model: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shard the weights of an open_clip model in place, and with them gradients and moments.

    Every block of the transformers is gathered on its own while it computes; what is left is one
    more group. Logit scale and bias stay whole, as FSDP2 cannot shard scalars; and where weights
    are gathered in 16 bits, so do norms, which are small and which autocast computes with in fp32.
    The gradients of these are not averaged, see `whole_gradients`. Buffers stay as they are.

    Args:
        model: the whole model, equal on every rank.
        mesh: with a dimension `data_parallel`, over whose ranks is sharded.
        policy: of `mixed_precision`.

    Raises:
        InputError: the model has batch norms, whose statistics would differ between ranks.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise InputError(
            "trainer.strategy=fsdp shards transformers; a model with batch norms needs "
            "trainer.strategy=ddp."
        )
    ranks = mesh["data_parallel"]
    whole = {parameter for parameter in model.parameters() if parameter.numel() == 1}
    if policy.param_dtype is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                whole.update(module.parameters())
    for block in list(sharded_blocks(model)):
        fully_shard(block, mesh=ranks, mp_policy=policy, ignored_params=whole)
    fully_shard(model, mesh=ranks, mp_policy=policy, ignored_params=whole)
    for name in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, name)


def sharded_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what lists of modules hold; lists inside of that, as T5's blocks have, stay whole."""
    if isinstance(module, nn.ModuleList):
        yield from module
        return
    for part in module.children():
        yield from sharded_blocks(part)


def whole_gradients(model: nn.Module) -> list[Tensor]:
    """Return the gradients of what `shard_model` has left whole, which are those of this rank.

    They are to be averaged over ranks once per step, after the last backward pass.
    """
    gradients = (parameter.grad for parameter in model.parameters())
    return [each for each in gradients if each is not None and not isinstance(each, DTensor)]


@contextmanager
def unsynced_shards(model: nn.Module) -> Iterator[None]:
    """Keep the gradients of backward passes inside on the rank; the next one adds them up."""
    if not isinstance(model, FSDPModule):
        raise TypeError("the model must have been sharded by shard_model")
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy the state of a model to the CPU, gathered if it is sharded. Every rank takes part."""
    with torch.no_grad():
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
            for name, value in model.state_dict().items()
        }


def number_by_model(
    state: Mapping[str, Any], optimizer: Optimizer, model: nn.Module
) -> dict[str, Any]:
    """Write an optimizer's state with parameters numbered by their order in the model.

    torch numbers them by their order in the optimizer's groups, and sharded states are by name,
    which Lightning turns into the order in the model. With several groups these are two orders:
    moments would reach other parameters. Numbers may be any for an optimizer that is not sharded.

    Args:
        state: of `optimizer.state_dict()`.
        optimizer: whose state it is.
        model: has all parameters of the optimizer.
    """
    in_model = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    numbers = [in_model[id(each)] for group in optimizer.param_groups for each in group["params"]]
    return {
        **state,
        "state": {numbers[at]: values for at, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[at] for at in group["params"]]}
            for group in state["param_groups"]
        ],
    }
