"""What the hardware multiplies fast. torch names its answers as internal, so that they may go."""

from __future__ import annotations

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (_cpu_has("avx512_bf16") or _cpu_has("amx_tile"))


def int8_is_fast() -> bool:
    """Whether this CPU has int8 products, which are exact only then."""
    return _cpu_has("vnni")


def _cpu_has(instructions: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{instructions}_supported", bool)())
