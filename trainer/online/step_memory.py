"""How many samples a device can train on at a time, found before anything is trained.

A step is run with tensors that have shapes and no values, which takes seconds and no memory,
whatever the batch: the bytes of all that live at the same time are counted. What kernels take
inside, and what allocators waste, is not seen: a part of the memory is left for it.
"""

from __future__ import annotations

import bisect
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siftclip.cores import memory_bytes, ranks_here
from siftclip.datamodules.models.autocast import autocast
from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.streaming.batches import Batch
from siftclip.errors import InputError
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.online.flops import blank_samples, input_sizes
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients
from siftclip.trainer.runtime.lightning_setup import autocast_dtype

# What is left of a device's memory for all that is not counted
USED_SHARE = 0.9
RESERVED_BYTES = 1 << 30
_CPU_SHARE = 0.5  # of a machine's memory; loader processes may take the other half
_MOMENTS = 2  # of Adam
_FEATURE_COPIES = 3  # of the features of all ranks: own, gathered, and their gradients
_BATCHES_THERE = 2  # of pixels: the one of the step, and the next
_WEIGHTS = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


def largest_part(rank_batch: int, bytes_at: Callable[[int], float], usable: float) -> int | None:
    """Return the largest part of a rank's batch that fits, all of it included.

    Args:
        rank_batch: samples of the rank's step; they are cut into parts of equal size.
        bytes_at: what a step takes with parts of a size; it grows with the size.
        usable: bytes of the device.

    Returns:
        A divisor of `rank_batch`; None: not even one sample fits.
    """
    sizes = [size for size in range(1, rank_batch + 1) if rank_batch % size == 0]
    fitting = bisect.bisect_right(sizes, usable, key=bytes_at)
    return sizes[fitting - 1] if fitting else None


def usable_bytes(device: torch.device) -> float:
    """Return the memory of a device that training may count on.

    That of the smallest GPU here, so that ranks on one machine find the same; of a CPU each rank's
    share.
    """
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count())
        least = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
        return USED_SHARE * least - RESERVED_BYTES
    return _CPU_SHARE * memory_bytes() / ranks_here() - RESERVED_BYTES


class StepMemory:
    """Counts the bytes that a step of training takes on a device."""

    def __init__(
        self,
        clip: ClipModel,
        *,
        device: torch.device,
        precision: str,
        rank_batch: int,
        ranks: int = 1,
        read_per_trained: float = 1.0,
        has_average: bool = False,
        sharded: bool = False,
    ) -> None:
        """Set what is trained, and how.

        Args:
            clip: as it will be trained, with checkpointing of activations if so.
            device: that will train.
            precision: Lightning's name of it.
            rank_batch: samples of a rank's step.
            ranks: that train; each gathers the features of all.
            read_per_trained: samples that are read for each that is trained on.
            has_average: whether an average of the weights is kept.
            sharded: whether the ranks share weights, gradients and moments.

        Raises:
            InputError: what the model computes depends on values, so that it cannot be known.
        """
        self._sizes = input_sizes(clip)
        self._autocast = autocast_dtype(precision)
        self._mode = FakeTensorMode()
        with self._mode:
            self._model = _without_values(clip.model, device, _WEIGHTS.get(precision))
        trained = [each for each in self._model.parameters() if each.requires_grad]
        weights = _bytes([*self._model.parameters(), *self._model.buffers()])
        kept = weights + (1 + _MOMENTS) * _bytes(trained) + (weights if has_average else 0)
        self.fixed_bytes: int = kept // (ranks if sharded else 1)
        with _by_shapes(), self._mode, torch.no_grad():
            images, tokens = blank_samples(self._model, **self._sizes, samples=1)
            self._model.eval()
            features = [self._model.encode_image(images), self._model.encode_text(tokens)]
            self._model.train()
        self.fixed_bytes += int(
            _FEATURE_COPIES * ranks * rank_batch * sum(each.shape[1] * 4 for each in features)
            + _BATCHES_THERE
            * read_per_trained
            * rank_batch
            * (images.numel() + tokens.numel() * tokens.element_size())
        )

    def at(self, samples: int) -> int:
        """Return the bytes of a step that takes so many samples at a time.

        Raises:
            InputError: what the model computes depends on values, so that it cannot be known.
        """
        with _by_shapes(), self._mode:
            return self.fixed_bytes + self._peak_of_pass(samples)

    def _peak_of_pass(self, samples: int) -> int:
        """Count what forward and backward add to the weights and their gradients."""
        images, tokens = blank_samples(self._model, **self._sizes, samples=samples)
        rows = torch.arange(samples, device=images.device)
        batch = Batch(images=images, tokens=tokens, rows=rows, valid=rows >= 0)
        there = [*self._model.parameters(), *self._model.buffers()]
        cast = nullcontext() if self._autocast is None else autocast(images.device, self._autocast)
        peak = PeakBytes(there)
        with peak, cast:
            compute_gradients(self._model, Objective(loss=SoftmaxLoss()), [batch], StepContext())
        return peak.peak_bytes + _bytes([images.float()])


@contextmanager
def _by_shapes() -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise InputError(
            "the memory of a step of this model cannot be found before it is trained, since what "
            f"it computes depends on values ({error})."
        ) from error


def _without_values(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Copy a model as tensors without values, with gradients; called inside of a FakeTensorMode."""
    copies: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        made: Tensor = torch.empty(tensor.shape, dtype=kind, device=device)
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            if tensor.requires_grad:  # there before the step, as DDP's buckets are
                made.grad = torch.empty_like(made)
        copies[id(tensor)] = made
    copied: Any = copy.deepcopy(model, copies)
    copied.output_dict = True
    return copied


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it without types
    """Counts the bytes of the tensors that operators make inside and that live at the same time.

    Tensors that were there before, views of them, and their gradients do not count.
    """

    def __init__(self, there_before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = self._bytes = 0
        self._alive: dict[int, Any] = {}
        for tensor in there_before:
            self._watch(tensor, 0)
            if tensor.grad is not None:
                self._watch(tensor.grad, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self._watch(value, value.untyped_storage().nbytes())
        return made

    def _watch(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps one object of Python for a storage while it lives
        if key in self._alive:
            return

        def freed(_: object) -> None:
            del self._alive[key]
            self._bytes -= size

        self._alive[key] = weakref.ref(storage, freed)
        self._bytes += size
        self.peak_bytes = max(self.peak_bytes, self._bytes)
