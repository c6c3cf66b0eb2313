"""FSDP2: the blocks of an open_clip model sharded over all ranks, and whole weights again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from siftclip.errors import InputError


def is_sharded(module: LightningModule) -> bool:
    """Return whether the trainer's strategy is FSDP2."""
    trainer = module._trainer
    return trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)


def shard_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the weights of an open_clip model in place, and with them gradients and moments.

    Every block of the transformers is gathered on its own while it computes; what is left is one
    more group. Logit scale and bias are scalars, which FSDP2 cannot shard: they stay whole, and
    their gradients are averaged when they are there.

    Args:
        model: the whole model, equal on every rank.
        mesh: with a dimension `data_parallel`, over whose ranks is sharded.

    Raises:
        InputError: the model has batch norms, whose statistics would differ between ranks.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise InputError(
            "trainer.strategy=fsdp shards transformers; a model with batch norms needs "
            "trainer.strategy=ddp."
        )
    ranks = mesh["data_parallel"]
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for block in list(sharded_blocks(model)):
        fully_shard(block, mesh=ranks)
    fully_shard(model, mesh=ranks, ignored_params=scalars)
    for name in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, name)
    for parameter in scalars:
        if parameter.requires_grad:
            # torch ships it without types
            parameter.register_post_accumulate_grad_hook(_average_gradient)  # type: ignore[no-untyped-call]


def sharded_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what lists of modules hold; lists inside of that, as T5's blocks have, stay whole."""
    if isinstance(module, nn.ModuleList):
        yield from module
        return
    for part in module.children():
        yield from sharded_blocks(part)


def _average_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None  # the hook runs after it was written
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


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
