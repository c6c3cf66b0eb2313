"""Lightning's strategy for FSDP2 as Siftclip uses it: data parallel, two kinds of checkpoints.

A checkpoint is one file that rank 0 gathers and writes; or, with `sharded_checkpoints`, a folder
into which every rank writes what it holds, see `siftclip.datamodules.models.sharded_checkpoint`.
Either can be continued from on any number of ranks, and by the other strategies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from siftclip.datamodules.models.sharded_checkpoint import (
    REST_NAME,
    ShardedCheckpoint,
    is_sharded_checkpoint,
    map_tensors,
    part_name,
    rows_of_rank,
)
from siftclip.errors import InputError
from siftclip.files import write_torch
from siftclip.reading import readable
from siftclip.writing import (
    WriteError,
    delete_folder,
    make_folder,
    place_folder,
    temporary_beside,
)


class FsdpStrategy(ModelParallelStrategy):
    """Shards over all ranks."""

    def __init__(
        self,
        *,
        ranks: int,
        reduce_dtype: torch.dtype,
        sharded_checkpoints: bool = False,
        **waiting: Any,
    ) -> None:
        """Set what is sharded over, and how gradients travel.

        Args:
            ranks: of all nodes.
            reduce_dtype: of gradients while they are averaged over ranks.
            sharded_checkpoints: whether every rank writes its part.
            waiting: Lightning's `timeout`, if any.
        """
        super().__init__(
            data_parallel_size=ranks,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            **waiting,
        )
        self.reduce_dtype = reduce_dtype
        self.sharded_checkpoints = sharded_checkpoints

    # ---- writing -------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not self.sharded_checkpoints or self.lightning_module is None:
            return super().lightning_module_state_dict()
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return its state: gathered, with names; or sharded, with numbers as torch has them."""
        if not self.sharded_checkpoints:
            return super().optimizer_state(optimizer)
        bare: Optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning wraps it
        return bare.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint. All ranks take part.

        A folder of parts has its name only when all of them are on the disk.

        Raises:
            InputError: a rank has no room or no permission, or ranks do not see one folder.
        """
        if not self.sharded_checkpoints:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(str(filepath)))
        first = self.global_rank == 0
        folder = Path(self.broadcast(str(temporary_beside(path)) if first else ""))
        rows: dict[str, Tensor] = {}
        rest = map_tensors(checkpoint, lambda place, value: _shape_of(place, value, rows))
        part = {"rank": self.global_rank, "ranks": self.world_size, "rows": rows}
        part["step"] = checkpoint["global_step"]

        def begin() -> None:
            delete_folder(folder)
            make_folder(folder)

        def finish() -> None:
            for rank in range(self.world_size):
                if not (folder / part_name(rank)).is_file():
                    raise InputError(
                        f"{path} is not written: the part of rank {rank} is not in {folder}. All "
                        "nodes must see one folder: put the run on a disk that they share, or set "
                        "trainer.sharded_checkpoints=false."
                    )
            write_torch(folder / REST_NAME, {"ranks": self.world_size, "rest": rest})
            place_folder(folder, path)

        try:
            self._together(path, begin if first else None)
            self._together(path, lambda: write_torch(folder / part_name(self.global_rank), part))
            self._together(path, finish if first else None)
        except InputError:
            if first:
                delete_folder(folder)
            raise

    def _together(self, path: Path, action: Callable[[], None] | None) -> None:
        """Do something on this rank, and raise InputError on all where it fails on one."""
        fault: InputError | None = None
        try:
            if action is not None:
                action()
        except WriteError as error:  # of a name that only lives while it is written
            fault = WriteError(path, error.number)
        except InputError as error:
            fault = error
        failed = torch.tensor(float(fault is not None), device=self.root_device)
        if float(self.reduce(failed, reduce_op="sum")):
            raise fault or InputError(f"{path} cannot be written: see the message of another rank.")

    # ---- reading -------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Restore weights and optimisers, and return the rest. All ranks take part.

        Raises:
            InputError: a part cannot be read.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        if not is_sharded_checkpoint(path):
            return super().load_checkpoint(path, weights_only)
        module = self.lightning_module
        if module is None:
            raise RuntimeError("the strategy has no module yet")
        with readable(path, "checkpoint in parts"):
            parts = ShardedCheckpoint(path)
            rest = dict(parts.rest)
            current = module.state_dict()
            state = {
                name: _read_like(current.get(name), parts, f"state_dict/{name}", value)
                for name, value in rest.pop("state_dict").items()
            }
            moments = [
                _optimizer_state(parts, f"optimizer_states/{number}", each, optimizer)
                for number, (each, optimizer) in enumerate(
                    zip(rest.pop("optimizer_states"), self.optimizers, strict=True)
                )
            ]
        module.load_state_dict(state, strict=module.strict_loading)
        for optimizer, each in zip(self.optimizers, moments, strict=True):
            optimizer.load_state_dict(each)
        return {key: parts.whole(value, key) for key, value in rest.items()}


def _shape_of(place: str, value: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """Return what the rest has of a tensor; of a sharded one the rank's rows go into `rows`."""
    if not isinstance(value, DTensor):
        return value.detach().cpu()
    local = value.to_local().detach()
    own = rows_of_rank(len(value), value.device_mesh.get_local_rank(), value.device_mesh.size())
    if len(local) != own.stop - own.start:
        raise TypeError(f"{place} is not sharded by rows as torch.chunk does: {value.placements}")
    # on a CPU a copy, as torch writes all of the memory that a view is of
    rows[place] = local.cpu() if not local.is_cpu else local.clone()
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _read_like(current: Any, parts: ShardedCheckpoint, place: str, value: Tensor) -> Tensor:
    """Read a tensor as this rank needs it: of a sharded one, its rows."""
    if not isinstance(current, DTensor):
        return parts.rows(place, value)
    mesh = current.device_mesh
    own = rows_of_rank(len(value), mesh.get_local_rank(), mesh.size())
    return DTensor.from_local(
        parts.rows(place, value, own).to(current.device),
        mesh,
        current.placements,
        run_check=False,
        shape=value.shape,
        stride=current.stride(),
    )


def _optimizer_state(
    parts: ShardedCheckpoint, place: str, state: Mapping[str, Any], optimizer: Optimizer
) -> dict[str, Any]:
    """Read the state of an optimiser, numbered as it was written; moments sharded as weights are.

    Groups are those of the optimiser, in the same order, or torch refuses them.
    """
    numbers = chain.from_iterable(group["params"] for group in state["param_groups"])
    weights = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    of_number: dict[int, nn.Parameter] = dict(zip(numbers, weights, strict=True))

    def read(number: int, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        weight = of_number[number]
        like = weight if value.shape == weight.shape else None
        return _read_like(like, parts, f"{place}/state/{number}/{key}", value)

    return {
        "state": {
            number: {key: read(number, key, value) for key, value in values.items()}
            for number, values in state["state"].items()
        },
        "param_groups": state["param_groups"],
    }
