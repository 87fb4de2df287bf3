"""How the naive kernels cut a problem into blocks and lanes: pure arithmetic, no GPU needed."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

from cuneigh._problem import DTYPES, Problem

THREADS = 128
"""Threads of a block."""

ELEMENTS_PER_LANE = {"float16": 16, "bfloat16": 16, "float32": 8, "float64": 4}
"""Elements of a head vector that a lane holds: more of them mean fewer shuffles for each product,
but more registers, and so less memory traffic in flight. Measured on an H200 (bench/NOTES.md)."""

MOST_ELEMENTS_PER_LANE = {"float16": 16, "bfloat16": 16, "float32": 16, "float64": 8}
"""The same where 32 lanes are not enough; still longer vectors are cut into slices."""

PACKET_BYTES = 16
"""The widest load of a thread."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What is compiled into a naive kernel; `struct Plan` of cuda/cuneigh/naive.cuh."""

    rank: int
    element: str
    bias: str | None
    lanes: int
    key_vector: int
    key_chunks: int
    key_exact: bool
    value_vector: int
    value_chunks: int
    value_exact: bool
    wide: bool

    @property
    def groups(self) -> int:
        """Tokens that a block works on at a time."""
        return THREADS // self.lanes

    @property
    def key_capacity(self) -> int:
        return self.lanes * self.key_vector * self.key_chunks

    @property
    def value_capacity(self) -> int:
        return self.lanes * self.value_vector * self.value_chunks

    def source(self, **flags: bool) -> str:
        """The members of `struct Plan`, with `flags` that one kernel alone knows."""
        constants = {
            "kRank": self.rank,
            "kThreads": THREADS,
            "kLanes": self.lanes,
            "kKeyVector": self.key_vector,
            "kKeyChunks": self.key_chunks,
            "kValueVector": self.value_vector,
            "kValueChunks": self.value_chunks,
        }
        lines = [f"static constexpr int {name} = {value};" for name, value in constants.items()]
        own = {"kKeyExact": self.key_exact, "kValueExact": self.value_exact, "kWide": self.wide}
        for name, flag in {**own, **flags}.items():
            lines.append(f"static constexpr bool {name} = {str(flag).lower()};")
        lines.append(f"using Element = {self.element};")
        lines.append(f"using Bias = {self.bias or 'void'};")
        return "\n".join(lines)


@lru_cache(maxsize=1024)
def row_plan(
    rank: int,
    element: str,
    bias: str | None,
    head_dim: int,
    value_dim: int,
    key_bytes: int = PACKET_BYTES,
    value_bytes: int = PACKET_BYTES,
) -> RowPlan:
    """The plan for head vectors of these dimensions; 0 stands for one that the kernel never loads.

    `key_bytes` and `value_bytes` are the widths of the loads that the alignment of the arrays
    allows, a power of two.
    """
    size = DTYPES[element]
    longest = max(head_dim, value_dim)
    lanes = min(32, next_power_of_two(math.ceil(longest / ELEMENTS_PER_LANE[element])))
    most = MOST_ELEMENTS_PER_LANE[element]

    def packets(dim: int, width: int) -> tuple[int, int]:
        if dim == 0:
            return 1, 1
        vector = width // size
        while dim % vector:
            vector //= 2
        return vector, min(math.ceil(dim / (vector * lanes)), most // vector)

    key_vector, key_chunks = packets(head_dim, key_bytes)
    value_vector, value_chunks = packets(value_dim, value_bytes)
    key_capacity = lanes * key_vector * key_chunks
    value_capacity = lanes * value_vector * value_chunks
    return RowPlan(
        rank,
        element,
        bias,
        lanes,
        key_vector,
        key_chunks,
        head_dim == key_capacity,
        value_vector,
        value_chunks,
        value_dim == value_capacity,
        wide=head_dim > key_capacity or value_dim > value_capacity,
    )


@lru_cache(maxsize=1024)
def box_of(problem: Problem, keys: bool, area: int) -> tuple[int, ...]:
    """Box of at most `area` queries (or keys) that a block takes, the one that moves least.

    Counted for every candidate: the blocks that cover the layout, times what a block costs, its
    products (idle places included) and the halo of neighbors that it reads from beyond its cache.
    """
    counts = problem.key_tokens if keys else problem.tokens
    windows = [axis.kernel_size for axis in problem.axes]

    def cost(box: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        blocks = math.prod(math.ceil(n / b) for n, b in zip(counts, box, strict=True))
        halo = math.prod(b + k - 1 for b, k in zip(box, windows, strict=True))
        return blocks * (area * problem.window_size + HALO_COST * halo), box

    sizes = [range(1, min(area, count) + 1) for count in counts[:-1]]
    candidates = (
        (*leading, min(counts[-1], area // math.prod(leading)))
        for leading in itertools.product(*sizes)
        if math.prod(leading) <= area
    )
    return min(candidates, key=cost)


HALO_COST = 4
"""Cost of one neighbor that a block reads, in units of one product of a query and a key."""


FLOPS_PER_MS = {
    "forward": 11e9,
    "backward": 8e9,
    "qk": 7.7e9,
    "qk_backward": 9e9,
    "av": 12e9,
    "av_backward": 7.5e9,
}
"""What the kernels reach in half precision on an H200 (bench/NOTES.md),"""
SHARE = {"float32": 0.72, "float64": 0.25}
"""and the share of that in other dtypes,"""
SHORT_SHARE = 0.77
"""and with head vectors of at most 32 elements, for which a query's own work weighs more."""
BYTES_PER_MS = 4.1e9


@lru_cache(maxsize=1024)
def predicted(problem: Problem) -> float:
    """Milliseconds of one call on an H200: its arithmetic, and its traffic once."""
    rate = FLOPS_PER_MS[problem.operation] * SHARE.get(problem.dtype, 1.0)
    if max(problem.head_dim, problem.value_dim) <= 32:
        rate *= SHORT_SHARE
    return problem.flops() / rate + problem.bytes() / BYTES_PER_MS


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()
