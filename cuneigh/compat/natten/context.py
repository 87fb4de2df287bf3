"""What ``natten`` is asked about itself, and its switches, which are only remembered.

`na1d`, `na2d` and `na3d` are there on every device and choose kernels by themselves, so that code
that asks for fused ones first gets them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    *("HAS_LIBNATTEN", "has_bfloat", "has_cuda", "has_fna", "has_fp32_gemm", "has_fp64_gemm"),
    *("has_fused_na", "has_gemm", "has_half", "has_tf32_gemm"),
    *("are_deterministic_algorithms_enabled", "use_deterministic_algorithms"),
    *("is_fna_enabled", "is_fused_na_enabled", "use_fna", "use_fused_na"),
    *("is_gemm_na_enabled", "is_tf32_in_gemm_na_enabled", "is_tiled_na_enabled"),
    *("use_gemm_na", "use_tf32_in_gemm_na", "use_tiled_na"),
    *("is_kv_parallelism_in_fused_na_enabled", "use_kv_parallelism_in_fused_na"),
    *("is_flex_compile_allowed", "allow_flex_compile", "disable_flex_compile"),
    *("disable_autotuner", "is_autotuner_enabled", "use_autotuner"),
    *("get_memory_usage_preference", "set_memory_usage_preference", "is_memory_usage_default"),
    *("is_memory_usage_strict", "is_memory_usage_unrestricted"),
]

HAS_LIBNATTEN = True
"""Whether there are kernels."""


def has_cuda() -> bool:
    return bool(torch.cuda.is_available())


def has_fused_na(device_index: Any = None) -> bool:
    return True


has_fna = has_gemm = has_half = has_fused_na
has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = has_fused_na


def has_bfloat(device_index: Any = None) -> bool:
    """CPU tensors have it, and so do GPUs from compute capability 8.0 on."""
    return not has_cuda() or bool(torch.cuda.get_device_capability(device_index) >= (8, 0))


def _switch(initial: bool) -> tuple[Callable[..., None], Callable[[], bool]]:
    """A function that sets a mode, and one that says what it was set to."""
    state = initial

    def use(mode: bool = True, **_: Any) -> None:
        nonlocal state
        state = bool(mode)

    def is_enabled() -> bool:
        return state

    return use, is_enabled


use_deterministic_algorithms, are_deterministic_algorithms_enabled = _switch(False)
use_fused_na, is_fused_na_enabled = use_fna, is_fna_enabled = _switch(True)
use_kv_parallelism_in_fused_na, is_kv_parallelism_in_fused_na_enabled = _switch(False)
use_gemm_na, is_gemm_na_enabled = _switch(True)
use_tf32_in_gemm_na, is_tf32_in_gemm_na_enabled = _switch(False)
use_tiled_na, is_tiled_na_enabled = _switch(True)
allow_flex_compile, is_flex_compile_allowed = _switch(False)
_use_autotuner, is_autotuner_enabled = _switch(False)


def disable_flex_compile() -> None:
    allow_flex_compile(False)


def use_autotuner(
    forward_pass: bool | None = None, backward_pass: bool | None = None, **_: Any
) -> None:
    _use_autotuner(bool(forward_pass or backward_pass))


def disable_autotuner() -> None:
    _use_autotuner(False)


_memory_usage = "default"


def set_memory_usage_preference(pref: str = "default") -> None:
    global _memory_usage
    if pref not in ("default", "strict", "unrestricted"):
        raise ValueError(f"natten: pref={pref!r} is not one of default, strict and unrestricted")
    _memory_usage = pref


def get_memory_usage_preference() -> str:
    return _memory_usage


def is_memory_usage_default() -> bool:
    return _memory_usage == "default"


def is_memory_usage_strict() -> bool:
    return _memory_usage == "strict"


def is_memory_usage_unrestricted() -> bool:
    return _memory_usage == "unrestricted"
