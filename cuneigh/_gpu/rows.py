"""Kernels that give every token to a group of lanes: how they are compiled and launched.

A block has `THREADS` threads. The lanes of a group share the head vectors of their token, and a
block takes as many tokens as it has groups, out of a box of the layout. Vectors that are too long
for the registers of a group are computed in slices, one block for each.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh import _jit
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.program import Program
from cuneigh._gpu.records import PARTS, fill_problem, has_parts, problem_type, with_starts
from cuneigh._gpu.views import Views, load_width
from cuneigh._problem import DTYPES, Operands, Problem

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
    """What is compiled into a kernel; `struct Plan` of cuda/cuneigh/row_plan.cuh."""

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
    parts: bool = False
    """Whether axes need not be ordinary (`records.has_parts`)."""
    key_mask: bool = False
    """Whether the kernel takes a key mask."""

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

    def key_slices(self, head_dim: int) -> int:
        """Slices of query and key vectors."""
        return math.ceil(head_dim / self.key_capacity)

    def value_slices(self, value_dim: int) -> int:
        """Slices of value vectors."""
        return math.ceil(value_dim / self.value_capacity)

    def kernel(self, name: str, **flags: bool) -> _jit.Kernel:
        """The kernel of this plan, with `flags` that it alone knows."""
        source = _jit.plan_source(
            {
                "kRank": self.rank,
                "kThreads": THREADS,
                "kLanes": self.lanes,
                "kKeyVector": self.key_vector,
                "kKeyChunks": self.key_chunks,
                "kValueVector": self.value_vector,
                "kValueChunks": self.value_chunks,
            },
            {
                "kKeyExact": self.key_exact,
                "kValueExact": self.value_exact,
                "kWide": self.wide,
                "kKeyMask": self.key_mask,
                **flags,
            },
            {"Element": self.element, "Bias": self.bias},
        )
        return _jit.Kernel(name, source, macros=(PARTS,) if self.parts else ())

    def of(self, problem: Problem) -> RowPlan:
        """The plan for a kernel that knows windows: those of `problem`, and what is hidden."""
        return replace(self, parts=has_parts(problem), key_mask=problem.has_key_mask)


@lru_cache(maxsize=1024)
def row_plan(
    rank: int,
    element: str,
    bias: str | None,
    head_dim: int,
    value_dim: int,
    key_bytes: int = PACKET_BYTES,
    value_bytes: int = PACKET_BYTES,
    with_tangents: bool = False,
) -> RowPlan:
    """The plan for head vectors of these dimensions; 0 stands for one that the kernel never loads.

    `key_bytes` and `value_bytes` are the widths of the loads that the alignment of the arrays
    allows, a power of two. A kernel that holds vectors `with_tangents` holds half as much of each.
    """
    size = DTYPES[element]
    longest = max(head_dim, value_dim)
    held, most = (
        table[element] // (2 if with_tangents else 1)
        for table in (ELEMENTS_PER_LANE, MOST_ELEMENTS_PER_LANE)
    )
    lanes = min(32, next_power_of_two(math.ceil(longest / held)))

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


def attention_plan(
    problem: Problem,
    operands: Operands,
    keys: tuple[Array | None, ...] = (),
    values: tuple[Array | None, ...] = (),
    with_tangents: bool = False,
) -> RowPlan:
    """The plan for the operands of attention; `keys` and `values` have vectors of their lengths."""
    return row_plan(
        problem.rank,
        problem.dtype,
        problem.rpb_dtype,
        problem.head_dim,
        problem.value_dim,
        load_width((operands.query, operands.key, operands.additional_keys, *keys)),
        load_width((operands.value, operands.additional_values, *values)),
        with_tangents,
    )


def value_plan(problem: Problem, dim: int, *arrays: Array | None) -> RowPlan:
    """The plan for arrays whose vectors of `dim` elements are summed, under given weights."""
    width = load_width(arrays)
    return row_plan(problem.rank, problem.dtype, None, 0, dim, value_bytes=width)


@lru_cache(maxsize=1024)
def box_of(problem: Problem, keys: bool, area: int) -> tuple[int, ...]:
    """The box of at most `area` queries (or keys) that a block takes, the one that moves least.

    Counted for every candidate: the blocks that cover the layout, times what a block costs, its
    products (those of idle groups included) and the halo of neighbors that it reads from beyond
    its cache.
    """
    # Without any keys there are no blocks, whatever the box.
    counts = [max(count, 1) for count in (problem.key_tokens if keys else problem.tokens)]
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


def launch(
    program: Program,
    kernel: _jit.Kernel,
    record: npt.NDArray[Any],
    views: Views,
    grid: tuple[int, int],
) -> None:
    """Launch a kernel with blocks of `THREADS` threads, unless there is no block."""
    if 0 in grid:
        return
    program.launch(kernel, grid, THREADS, with_starts(record), views.words)


@lru_cache(maxsize=1024)
def record_of(
    problem: Problem,
    plan: RowPlan,
    keys: bool,
    head_dim: int | None = None,
    value_dim: int | None = None,
    scale: float | None = None,
) -> npt.NDArray[Any]:
    """The record of a problem whose blocks take boxes of keys, or of queries.

    Dimensions and scale are those of the problem unless they are given.
    """
    record = np.zeros(1, problem_type(problem.rank, plan.parts))
    box = box_of(problem, keys, plan.groups)
    fill_problem(record, problem, box, _boxes(problem, keys, box))
    given = {"head_dim": head_dim, "value_dim": value_dim, "scale": scale}
    for field, value in given.items():
        if value is not None:
            record[field] = value
    return record


def grid_of(problem: Problem, plan: RowPlan, keys: bool, slices: int = 1) -> tuple[int, int]:
    """Blocks for every box of keys (or queries) of every batch and head, and for every slice."""
    boxes = math.prod(_boxes(problem, keys, box_of(problem, keys, plan.groups)))
    return boxes * problem.batch * (problem.kv_heads if keys else problem.heads), slices


def _boxes(problem: Problem, keys: bool, box: tuple[int, ...]) -> tuple[int, ...]:
    counts = problem.key_tokens if keys else problem.tokens
    return tuple(math.ceil(count / size) for count, size in zip(counts, box, strict=True))


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()
