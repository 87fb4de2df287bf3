"""What an H200 reaches, as it was measured: every prediction of a time is made of these rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Rates:
    """The rates of a GPU, per millisecond where nothing else is said."""

    memory_bytes: float
    """Bytes that kernels read from and write to memory."""
    cache_bytes: float
    """Bytes that matrix products read again from the L2 cache."""
    product_flops: Mapping[str, float]
    """Operations of matrix products that are bound by arithmetic, by dtype."""
    cycles: float
    """Cycles of one multiprocessor, times the number of them."""
    launch_ms: float
    """Milliseconds that one more launch adds to a call."""


H200 = Rates(
    # bench/NOTES.md, "Batched GEMM": fitted to the stages of about 90 runs of the grid
    memory_bytes=4.1e9,
    cache_bytes=15e9,
    product_flops=MappingProxyType({"float32": 38e9, "float64": 38e9}),
    # bench/NOTES.md, "Fused" and "Small windows": what cycles were counted in when they were fitted
    cycles=132 * 1.755e6,
    launch_ms=0.003,
)
