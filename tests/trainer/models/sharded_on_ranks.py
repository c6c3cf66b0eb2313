"""Steps of a sharded CLIP on the ranks of torchrun; run by test_sharding.py.

    python sharded_on_ranks.py FOLDER PRECISION REDUCE_DTYPE

Each rank writes to FOLDER what it has seen, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from siftclip.datamodules.streaming.batches import Batch
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.models.sharding import (
    mixed_precision,
    shard_model,
    unsynced_shards,
    whole_gradients,
    whole_state,
)
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients
from siftclip.trainer.optim.optimizer import clamp_logit_scale, make_optimizer
from siftclip.trainer.optim.update import (
    average_over_ranks,
    clip_gradients,
    gradient_norm,
    step_if_finite,
)
from siftclip.trainer.settings.optim import OptimSettings

READS = {"item", "tolist", "__bool__", "__int__", "__float__", "nonzero"}  # of a value: a GPU waits
# before torch 2.15, and since
COLLECTIVES = {
    "gather": ("all_gather_into_tensor", "all_gather_single"),
    "reduce": ("reduce_scatter_tensor", "reduce_scatter_single"),
}
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2},
}


class Waits(TorchFunctionMode):
    """Notes what reads a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def noted(kind: str, name: str, seen: set[str]) -> Callable[..., Any]:
    """A collective of torch.distributed that notes the type of what it sends."""
    real = getattr(dist, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        named = [kwargs[key] for key in ("input", "input_tensor") if key in kwargs]
        seen.add(f"{kind} {(named or args[1:])[0].dtype}")
        return real(*args, **kwargs)

    return call


def micro_batch(start: int) -> Batch:
    random = torch.Generator().manual_seed(start + 100 * dist.get_rank())
    return Batch(
        images=torch.randn(4, 3, 16, 16, generator=random),
        tokens=torch.randint(1, 98, (4, 12), generator=random),
        rows=torch.arange(start, start + 4) + 1000 * dist.get_rank(),
        valid=torch.ones(4, dtype=torch.bool),
        references={},
    )


def main(folder: Path, precision: str, reduce_dtype: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = open_clip.CLIP(**ARCHITECTURE, output_dict=True).train()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",))
    shard_model(model, mesh, mixed_precision(precision, getattr(torch, reduce_dtype)))
    optimizer = make_optimizer(model, OptimSettings(lr=1e-2), fused=True)
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    computed: dict[str, set[str]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding | nn.Conv2d):
            kinds = computed.setdefault(type(module).__name__, set())

            def look(module: Any, *_: Any, kinds: set[str] = kinds) -> None:
                kinds.add(str(module.weight.dtype))

            module.register_forward_pre_hook(look)
    exchanged: set[str] = set()
    for kind, names in COLLECTIVES.items():
        for name in names:
            if hasattr(dist, name):
                setattr(dist, name, noted(kind, name, exchanged))
    results: list[dict[str, Any]] = []
    for step, poison in enumerate([True, False, True, False]):
        before = {name: value.clone() for name, value in whole_state(model).items()}
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False
        ):
            terms = compute_gradients(
                model,
                Objective(loss=SoftmaxLoss()),
                [micro_batch(8 * step), micro_batch(8 * step + 4)],
                StepContext(
                    rank=dist.get_rank(),
                    world_size=dist.get_world_size(),
                    unsynced=lambda: unsynced_shards(model),
                ),
            )
        if poison and dist.get_rank() == 1:  # on one rank alone
            sharded = next(each.grad for each in parameters if isinstance(each.grad, DTensor))
            sharded.to_local().view(-1)[0] = torch.nan
        with Waits() as waits:
            average_over_ranks(whole_gradients(model))
            norm = gradient_norm(parameters)
            clip_gradients(parameters, norm, 1.0)
            finite = torch.isfinite(norm)
            step_if_finite(optimizer, finite, optimizer.step)
            clamp_logit_scale(model)
        after = whole_state(model)
        results.append(
            {
                "loss": float(terms["loss"]),
                "finite": bool(finite),
                "moved": sum(not torch.equal(after[name], before[name]) for name in after),
                "waits": waits.seen,
            }
        )
    states = [value for state in optimizer.state.values() for value in state.values()]
    seen = {
        "steps": results,
        "counted": sorted({float(state["step"]) for state in optimizer.state.values()}),
        "computed": {name: sorted(kinds) for name, kinds in computed.items() if kinds},
        "exchanged": sorted(exchanged),
        "kept": sorted({str(value.dtype) for value in (*parameters, *states)}),
        "gradients": sorted({str(each.grad.dtype) for each in parameters}),
        "whole": sorted(n for n, p in model.named_parameters() if not isinstance(p, DTensor)),
        "parameters": len(parameters),
    }
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
