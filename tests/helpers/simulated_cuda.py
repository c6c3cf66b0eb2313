"""A simulated GPU: tensors with values in memory that say they are on cuda:0.

Inside `simulated_cuda()` everything is computed on the CPU, with real values and real gradients.
What would make a GPU wait, or fail, is noted: host synchronisations, copies that block, and
operands on two devices. It knows nothing of CUDA's kernels, of their speed, or of NCCL.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
WAIT, MIX = "host synchronisation", "two devices"

# fmt: off
# What reads a value, or a length that depends on values
_READS = {
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique",
    "masked_select", "equal", "allclose", "argwhere", "bincount", "is_nonzero",
    "__contains__",
}
# What is the same for a tensor of any device
_OF_ANY_DEVICE = {
    "__repr__", "__format__", "__deepcopy__", "__reduce_ex__", "backward", "register_hook",
    "requires_grad_", "detach_", "share_memory_", "type", "dim", "size", "stride", "numel",
    "element_size", "storage_offset", "is_contiguous", "data_ptr", "is_floating_point",
    "is_complex", "__len__", "is_inference", "untyped_storage", "is_pinned", "is_shared",
}
# fmt: on
_events: Counter[tuple[str, str, str]] = Counter()


@dataclass(slots=True)
class Events:
    """What was noted: (kind, what, where) and how often."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=lambda: _events)

    def of(self, kind: str) -> dict[str, int]:
        """Return what was noted of a kind, with the place in the code."""
        return {
            f"{what} at {where}": count
            for (own, what, where), count in sorted(self.counts.items())
            if own == kind
        }

    def clear(self) -> None:
        """Forget all."""
        self.counts.clear()


class GpuTensor(Tensor):
    """A tensor that says it is on the GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Everywhere(TorchFunctionMode):
    """Sees also what has no tensor among its arguments, such as `torch.zeros(3, device="cuda")`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


@contextlib.contextmanager
def simulated_cuda() -> Iterator[Events]:
    """Pretend that there is a GPU, inside the block."""
    _events.clear()
    with contextlib.ExitStack() as stack:
        for name, value in _CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for module in (torch, torch.amp):
            stack.enter_context(mock.patch.object(module, "autocast", _Autocast))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            real = getattr(torch, name)
            stack.enter_context(mock.patch.object(torch, name, _of_cpu(real)))
        current = mock.patch.object(torch.accelerator, "current_stream", return_value=_Stream())
        stack.enter_context(current)
        stack.enter_context(mock.patch.object(torch, "Generator", _generator))
        module = mock.patch.object(torch, "get_device_module", return_value=torch.cuda)
        stack.enter_context(module)
        stack.enter_context(mock.patch.object(nn.Module, "to", _module_to(nn.Module.to)))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", return_value=None))
        stack.enter_context(_Everywhere())
        yield Events()


def on_gpu(value: Any) -> Any:
    """Put a tensor, or the tensors in lists, tuples and mappings, on the GPU, without a note."""
    if isinstance(value, GpuTensor):
        return value
    if type(value) is Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(GpuTensor)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(on_gpu, value))
    if isinstance(value, list | tuple):
        return type(value)(map(on_gpu, value))
    if isinstance(value, dict):
        return {key: on_gpu(each) for key, each in value.items()}
    return value


def on_cpu(value: Tensor) -> Tensor:
    """Return the tensor as one of the CPU, without a note."""
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def module_on_gpu(module: nn.Module) -> nn.Module:
    """Put parameters and buffers on the GPU."""
    return _moved(module, on_gpu)


def _moved(module: nn.Module, move: Any) -> nn.Module:
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                data = move(on_cpu(parameter.data))
                each._parameters[name] = nn.Parameter(data, parameter.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = move(on_cpu(buffer))
    return module


def _module_to(real: Any) -> Any:
    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device = args[0] if args else kwargs.get("device")
        if not isinstance(device, str | torch.device):
            return real(self, *args, **kwargs)  # type: ignore[no-any-return]
        return _moved(self, on_gpu if _is_gpu(device) else on_cpu)

    return to


# ---- torch.cuda ---------------------------------------------------------------------------------
class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def query(self) -> bool:
        return True

    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None:
        _note(WAIT, "Event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        _note(WAIT, "Stream.synchronize")

    def is_capturing(self) -> bool:
        return False


_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "is_current_stream_capturing": lambda *args: False,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "synchronize": lambda *args, **kwargs: _note(WAIT, "torch.cuda.synchronize"),
    "manual_seed": lambda seed: None,
    "max_memory_allocated": lambda *args: 0,
    "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
    "set_rng_state": lambda *args, **kwargs: None,
    "device": lambda device: contextlib.nullcontext(),
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda *args: _Stream(),
    "Stream": _Stream,
    "Event": _Event,
}


class _Autocast(torch.autocast):
    def __init__(
        self, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None
    ) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or (torch.bfloat16 if enabled else None)
        super().__init__(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)


def _of_cpu(real: Any) -> Any:
    return lambda device_type="cpu": real("cpu")


class _GpuGenerator:
    """Draws on the CPU; `device` tells it from a generator that a GPU would refuse."""

    device = GPU

    def __init__(self) -> None:
        self.real = _RealGenerator()

    def manual_seed(self, seed: int) -> _GpuGenerator:
        self.real.manual_seed(seed)
        return self


_RealGenerator = torch.Generator


def _generator(device: Any = "cpu") -> Any:
    return _GpuGenerator() if _is_gpu(device) else _RealGenerator(device)


# ---- functions of torch -------------------------------------------------------------------------
def _note(kind: str, what: str) -> None:
    _events[(kind, what, _place())] += 1


def _place() -> str:
    """Return the innermost line of Siftclip that is running."""
    frame: Any = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("siftclip."):
            return f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _is_gpu(device: Any) -> bool:
    if device is None:
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return _answer(func, args, dict(kwargs))


def _answer(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    tensors = [*_tensors(args), *_tensors(kwargs)]
    first_is_gpu = bool(args) and isinstance(args[0], GpuTensor)
    if name == "__get__":
        return _attribute(func, args, kwargs, is_gpu=first_is_gpu)
    if not any(isinstance(tensor, GpuTensor) for tensor in tensors):
        return _without_gpu_tensors(func, name, args, kwargs)
    if name in _MOVES:
        return _MOVES[name](func, args, kwargs)
    if name in _READS:
        _note(WAIT, name)
    if name in _OF_ANY_DEVICE:
        answer = func(*args, **kwargs)
        return on_gpu(answer) if isinstance(answer, Tensor) else answer
    if kwargs.get("device") is not None:
        is_gpu = _is_gpu(kwargs["device"])
        answer = func(*args, **{**kwargs, "device": "cpu"})
        return on_gpu(answer) if is_gpu else on_cpu(answer)
    if name == "new_tensor" or (name == "repeat_interleave" and len(tensors) > 1):
        _note(WAIT, name)
    _check_operands(func, name, args, tensors)
    return _computed(func, name, args, kwargs)


def _computed(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    generator = kwargs.get("generator")
    if isinstance(generator, _GpuGenerator):
        kwargs["generator"] = generator.real
    elif generator is not None:
        _note(MIX, f"a generator of the CPU in {name}")
    if name in ("mm", "bmm") and "out_dtype" in kwargs:
        answer = torch.matmul(on_cpu(args[0]).float(), on_cpu(args[1]).float())
        return on_gpu(answer.to(kwargs["out_dtype"]))
    answer = func(*args, **kwargs)
    return answer if name == "set_" else on_gpu(answer)


def _attribute(func: Any, args: Any, kwargs: dict[str, Any], *, is_gpu: bool) -> Any:
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    if attribute == "device":
        return GPU if is_gpu else func(*args, **kwargs)
    if attribute in ("is_cuda", "is_cpu"):
        return is_gpu == (attribute == "is_cuda")
    answer = func(*args, **kwargs)
    is_value = isinstance(answer, Tensor) and not isinstance(answer, nn.Parameter)
    return on_gpu(answer) if is_gpu and is_value else answer


def _without_gpu_tensors(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call what has no tensor of the GPU: it may make one, or move one there."""
    if name in ("to", "cuda") and args and isinstance(args[0], Tensor):
        return _MOVES[name](func, args, kwargs)
    if name == "pin_memory":
        return args[0]
    kwargs.pop("pin_memory", None)
    if not _is_gpu(kwargs.get("device")) or name in ("device", "Generator"):
        return func(*args, **kwargs)
    if name in ("tensor", "as_tensor", "asarray"):
        _note(WAIT, f"torch.{name} on the GPU")
    generator = kwargs.get("generator")
    if isinstance(generator, _GpuGenerator):
        kwargs["generator"] = generator.real
    return on_gpu(func(*args, **{**kwargs, "device": "cpu"}))


def _check_operands(func: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
    """Note operands of two devices, and indices that must be waited for."""
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        _check_index(name, args)
        return
    others = [tensor for tensor in tensors if type(tensor) is Tensor]
    if any(tensor.dim() for tensor in others) or (others and name in ("cat", "stack")):
        _note(MIX, name)


def _check_index(name: str, args: Any) -> None:
    indices = args[1] if isinstance(args[1], tuple) else (args[1],)
    on_device = isinstance(args[0], GpuTensor)
    for index in indices:
        if isinstance(index, Tensor):
            if index.dtype in (torch.bool, torch.uint8):
                _note(WAIT, f"{name} by a mask")
            if on_device and not isinstance(index, GpuTensor):
                _note(WAIT, f"{name} by an index of the CPU")
            if isinstance(index, GpuTensor) and not on_device:
                _note(MIX, f"{name} by an index of the GPU")
        elif isinstance(index, list) or (isinstance(index, np.ndarray) and index.ndim):
            _note(WAIT, f"{name} by a list or an array")
    value = args[2] if len(args) > 2 else None
    if isinstance(value, Tensor) and isinstance(value, GpuTensor) != on_device:
        _note(WAIT, f"{name} of another device's values")


# ---- moves --------------------------------------------------------------------------------------
def _to(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    source, *rest = args
    device = kwargs.pop("device", None)
    does_not_wait = kwargs.pop("non_blocking", False)
    others = []
    for place, each in enumerate(rest):
        is_number = isinstance(each, int) and not isinstance(each, bool) and place == 0
        if isinstance(each, torch.device | str) or is_number:
            device = each
        elif isinstance(each, Tensor):
            device = GPU if isinstance(each, GpuTensor) else CPU
            others.append(each.dtype)
        else:
            others.append(each)
    was_gpu = isinstance(source, GpuTensor)
    to_gpu = was_gpu if device is None else _is_gpu(device)
    if to_gpu != was_gpu and not does_not_wait:
        _note(WAIT, "to the GPU" if to_gpu else "to the CPU")
    answer = func(on_cpu(source), *others, **kwargs)
    if answer is source or answer.data_ptr() == source.data_ptr():
        if to_gpu == was_gpu:
            return source if answer.dtype == source.dtype else on_gpu(answer)
        answer = answer.clone()
    return on_gpu(answer) if to_gpu else on_cpu(answer)


def _copy(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    waits = not kwargs.get("non_blocking", False)
    if isinstance(args[0], GpuTensor) != isinstance(args[1], GpuTensor) and waits:
        _note(WAIT, "copy_ between devices")
    func(on_cpu(args[0]), on_cpu(args[1]))
    return args[0]


def _cpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    _note(WAIT, "to the CPU")
    return on_cpu(args[0].clone())


def _cuda(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], GpuTensor):
        return args[0]
    _note(WAIT, "to the GPU")
    return on_gpu(args[0].clone())


def _numpy(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    raise TypeError(f"can't convert cuda:0 device type tensor to numpy, at {_place()}")


_MOVES = {
    "to": _to,
    "cpu": _cpu,
    "cuda": _cuda,
    "numpy": _numpy,
    "__array__": _numpy,
    "pin_memory": lambda func, args, kwargs: args[0],
    "copy_": _copy,
    "get_device": lambda func, args, kwargs: 0 if isinstance(args[0], GpuTensor) else -1,
}
