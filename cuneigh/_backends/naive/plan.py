"""How long the naive kernels take: a rate for each operation and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from cuneigh._device import Device
from cuneigh._gpu import rates as gpu_rates
from cuneigh._gpu.linear import Speed
from cuneigh._gpu.rates import LAUNCH_MS, MEMORY_BYTES
from cuneigh._problem import Problem

NAME = "naive"

FLOPS_PER_MS = {
    "forward": 11e9,
    "backward": 8e9,
    "jvp": 9e9,
    "hvp": 9e9,
    "qk": 7.7e9,
    "qk_backward": 9e9,
    "av": 12e9,
    "av_backward": 7.5e9,
}
"""Useful operations in half precision (bench/NOTES.md); of jvp and hvp they are guesses."""

DTYPE_SHARE = {"float32": 0.72, "float64": 0.25}
"""The share of that rate that other dtypes reach."""

SHORT_DIM, SHORT_SHARE = 32, 0.77
"""The share for head vectors of at most so many elements: a query's own work weighs more."""

KEY_MS, FORWARD_KEY_MS, BACKWARD_KEY_MS = 1e-5, 1.7e-4, 8.5e-4
"""At least as much passes from one key of a query to the next.

Of forward and backward it is what 84 small problems took (bench/NOTES.md), of others a guess.
"""

LAUNCHES = {"backward": 3, "hvp": 3, "qk_backward": 2, "av_backward": 2}
"""Kernels of an operation, if they are more than one."""


class Flops(NamedTuple):
    """Useful operations in a millisecond, by operation."""

    forward: Speed
    backward: Speed
    jvp: Speed
    hvp: Speed
    qk: Speed
    qk_backward: Speed
    av: Speed
    av_backward: Speed


def flops_of(dtype: str, is_short: bool) -> Flops:
    """What was measured on an H200."""
    share = DTYPE_SHARE.get(dtype, 1.0)
    return Flops(
        **{
            operation: Speed(rate * share * (SHORT_SHARE if is_short else 1.0))
            for operation, rate in FLOPS_PER_MS.items()
        }
    )


class Rates(NamedTuple):
    """What predictions are made of: by default what was measured on an H200."""

    half: Flops = flops_of("float16", False)
    half_short: Flops = flops_of("float16", True)
    float32: Flops = flops_of("float32", False)
    float32_short: Flops = flops_of("float32", True)
    float64: Flops = flops_of("float64", False)
    float64_short: Flops = flops_of("float64", True)
    memory_bytes: Speed = MEMORY_BYTES
    key_ms: float = KEY_MS
    forward_key_ms: float = FORWARD_KEY_MS
    backward_key_ms: float = BACKWARD_KEY_MS
    launch_ms: float = LAUNCH_MS


RATES = Rates()


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call is expected to take, in milliseconds."""
    return _predicted(problem, gpu_rates.of(NAME, device, RATES))


@lru_cache(maxsize=1024)
def _predicted(problem: Problem, rates: Rates) -> float:
    milliseconds: float = model(problem, None, {}, rates)
    return milliseconds


def model(problem: Problem, device: object, plans: Mapping[str, Any], rates: Rates) -> Any:
    """`predicted_ms` with these rates; there are no plans.

    That is for launches, and for arithmetic and compulsory traffic or the keys of one query.
    """
    kind = problem.dtype if problem.dtype in DTYPE_SHARE else "half"
    if max(problem.head_dim, problem.value_dim) <= SHORT_DIM:
        kind += "_short"
    rate = getattr(getattr(rates, kind), problem.operation)
    busy = problem.flops() / rate + problem.bytes() / rates.memory_bytes
    key_ms = getattr(rates, f"{problem.operation}_key_ms", rates.key_ms)
    launches = LAUNCHES.get(problem.operation, 1) * rates.launch_ms
    return launches + max(busy, problem.slots * key_ms)
