"""How long the naive kernels take: a rate for each operation and dtype, measured on an H200."""

from __future__ import annotations

from functools import lru_cache

from cuneigh._gpu.rates import H200
from cuneigh._problem import Problem

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

KEY_MS = 1e-5
"""At least as much passes from one key of a query to the next: some dozen cycles."""


@lru_cache(maxsize=1024)
def predicted(problem: Problem) -> float:
    """Milliseconds of one call: its arithmetic and compulsory traffic, or the keys of one query."""
    rate = FLOPS_PER_MS[problem.operation] * DTYPE_SHARE.get(problem.dtype, 1.0)
    if max(problem.head_dim, problem.value_dim) <= SHORT_DIM:
        rate *= SHORT_SHARE
    busy = problem.flops() / rate + problem.bytes() / H200.memory_bytes
    return max(busy, problem.slots * KEY_MS)
