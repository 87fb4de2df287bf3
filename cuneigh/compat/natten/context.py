"""What ``natten`` is asked about itself, and its switches, which are only remembered.

Attention is there on every device and chooses kernels by itself, so that code that asks for fused
ones first gets them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

__all__ = [
    *("HAS_LIBNATTEN", "has_bfloat", "has_cuda", "has_fna", "has_fp32_gemm", "has_fp64_gemm"),
    *("has_fused_na", "has_gemm", "has_half", "has_tf32_gemm"),
    *("are_deterministic_algorithms_enabled", "use_deterministic_algorithms"),
    *("is_fna_enabled", "is_fused_na_enabled", "use_fna", "use_fused_na"),
    *("force_flex_attention", "use_flex_attention"),
    *("should_force_flex_attention", "should_use_flex_attention"),
    *("is_gemm_na_enabled", "is_tf32_in_gemm_na_enabled", "is_tiled_na_enabled"),
    *("use_gemm_na", "use_tf32_in_gemm_na", "use_tiled_na"),
    *("disable_gemm_na", "disable_tf32", "disable_tiled_na"),
    *("enable_gemm_na", "enable_tf32", "enable_tiled_na"),
    *("is_kv_parallelism_in_fused_na_enabled", "use_kv_parallelism_in_fused_na"),
    *("is_flex_compile_allowed", "is_flex_compile_backprop_allowed"),
    *("allow_flex_compile", "allow_flex_compile_backprop"),
    *("disable_flex_compile", "disable_flex_compile_backprop"),
    *("disable_autotuner", "is_autotuner_enabled", "use_autotuner"),
    *("is_autotuner_enabled_for_backward", "is_autotuner_enabled_for_forward"),
    *("is_autotuner_thorough_for_backward", "is_autotuner_thorough_for_forward"),
    *("MemoryUsagePreference", "get_memory_usage_preference", "set_memory_usage_preference"),
    *("is_memory_usage_default", "is_memory_usage_strict", "is_memory_usage_unrestricted"),
]

HAS_LIBNATTEN = True
"""Whether there are kernels."""


# What there is


def has_cuda() -> bool:
    return bool(torch.cuda.is_available())


def has_fused_na(device_index: Any = None) -> bool:
    return True


has_fna = has_gemm = has_half = has_fused_na
has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = has_fused_na


def has_bfloat(device_index: Any = None) -> bool:
    """CPU tensors have it, and so do GPUs from compute capability 8.0 on."""
    return not has_cuda() or bool(torch.cuda.get_device_capability(device_index) >= (8, 0))


# Switches


def _switch(initial: bool) -> tuple[Callable[[bool], None], Callable[[], bool]]:
    """A function that sets a mode, and one that says what it was set to."""
    state = initial

    def use(mode: bool = True) -> None:
        nonlocal state
        state = bool(mode)

    def is_enabled() -> bool:
        return state

    return use, is_enabled


use_deterministic_algorithms, are_deterministic_algorithms_enabled = _switch(False)
use_kv_parallelism_in_fused_na, is_kv_parallelism_in_fused_na_enabled = _switch(True)
use_gemm_na, is_gemm_na_enabled = _switch(True)
use_tf32_in_gemm_na, is_tf32_in_gemm_na_enabled = _switch(False)
use_tiled_na, is_tiled_na_enabled = _switch(True)

_use_fused, is_fused_na_enabled = _switch(True)
_use_flex, should_use_flex_attention = _switch(False)
_force_flex, should_force_flex_attention = _switch(False)
_allow_flex, is_flex_compile_allowed = _switch(False)
_allow_flex_backprop, is_flex_compile_backprop_allowed = _switch(False)
_tune_forward, is_autotuner_enabled_for_forward = _switch(False)
_tune_backward, is_autotuner_enabled_for_backward = _switch(False)
_be_thorough_forward, is_autotuner_thorough_for_forward = _switch(False)
_be_thorough_backward, is_autotuner_thorough_for_backward = _switch(False)


def use_fused_na(
    mode: bool = True,
    kv_parallel: bool = True,
    use_flex_attention: bool = False,
    force_flex_attention: bool = False,
) -> None:
    _use_fused(mode)
    use_kv_parallelism_in_fused_na(mode and kv_parallel)
    _use_flex(mode and use_flex_attention)
    _force_flex(mode and force_flex_attention)


use_fna, is_fna_enabled = use_fused_na, is_fused_na_enabled


def use_flex_attention() -> None:
    use_fused_na(use_flex_attention=True)


def force_flex_attention() -> None:
    use_fused_na(use_flex_attention=True, force_flex_attention=True)


def enable_tf32() -> bool:
    use_tf32_in_gemm_na(True)
    return is_tf32_in_gemm_na_enabled()


def disable_tf32() -> bool:
    use_tf32_in_gemm_na(False)
    return is_tf32_in_gemm_na_enabled()


def enable_gemm_na() -> bool:
    use_gemm_na(True)
    return is_gemm_na_enabled()


def disable_gemm_na() -> bool:
    use_gemm_na(False)
    return is_gemm_na_enabled()


def enable_tiled_na() -> bool:
    use_tiled_na(True)
    return is_tiled_na_enabled()


def disable_tiled_na() -> bool:
    use_tiled_na(False)
    return is_tiled_na_enabled()


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    _allow_flex(mode)
    _allow_flex_backprop(mode and backprop)


def allow_flex_compile_backprop(mode: bool = True) -> None:
    _allow_flex_backprop(is_flex_compile_allowed() and mode)


def disable_flex_compile() -> None:
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    _allow_flex_backprop(False)


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """What is None stays as it is."""
    for use, mode in (
        (_tune_forward, forward_pass),
        (_tune_backward, backward_pass),
        (_be_thorough_forward, thorough_mode_forward),
        (_be_thorough_backward, thorough_mode_backward),
    ):
        if mode is not None:
            use(mode)


def disable_autotuner() -> None:
    use_autotuner(False, False, False, False)


def is_autotuner_enabled() -> bool:
    return is_autotuner_enabled_for_forward() or is_autotuner_enabled_for_backward()


class MemoryUsagePreference(Enum):
    Default = 0
    Strict = 1
    Unrestricted = 2


_memory_usage = MemoryUsagePreference.Default


def set_memory_usage_preference(pref: str = "default") -> None:
    global _memory_usage
    preferences = {preference.name.lower(): preference for preference in MemoryUsagePreference}
    if pref not in preferences:
        raise ValueError(f"natten: pref={pref!r} is not one of default, strict and unrestricted")
    _memory_usage = preferences[pref]


def get_memory_usage_preference() -> MemoryUsagePreference:
    return _memory_usage


def is_memory_usage_default() -> bool:
    return _memory_usage == MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    return _memory_usage == MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    return _memory_usage == MemoryUsagePreference.Unrestricted
