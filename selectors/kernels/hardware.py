"""What the hardware multiplies fast. torch names its answers as internal, so that they may go."""

from __future__ import annotations

from functools import lru_cache

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (_cpu_has("avx512_bf16") or _cpu_has("amx_tile"))


def int8_is_fast() -> bool:
    """Check, once, by computing some, that this CPU has int8 products that are exact."""
    return _cpu_has("vnni") and _int8_is_exact()


@lru_cache(maxsize=1)
def _int8_is_exact() -> bool:
    """Check whether large int8 products are added without saturation.

    They are not where oneDNN does without VNNI, for want of it or as `ONEDNN_MAX_CPU_ISA` says.
    """
    for rows, depth, columns in ((3, 17, 5), (64, 256, 64)):  # a remainder, and whole tiles
        left = torch.full((rows, depth), 127, dtype=torch.int8)
        right = torch.full((depth, columns), 127, dtype=torch.int8)
        right[:, 1::2] = -127
        expected = left.double() @ right.double()
        if not torch.equal(torch._int_mm(left, right).double(), expected):
            return False
    return True


def _cpu_has(instructions: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{instructions}_supported", bool)())
