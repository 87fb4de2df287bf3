"""Attention and its backward slab by slab: some queries along the first axis, and their keys.

A slab is of one batch entry and some key heads. How a problem is cut into slabs depends on nothing
but an entry of its batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh._backends.cpu.boxes import Workspace, workspace
from cuneigh._backends.cpu.gradients import Sums
from cuneigh._backends.cpu.halves import assign
from cuneigh._backends.cpu.threads import in_order, thread_count
from cuneigh._backends.cpu.tiles import PARALLEL_BOXES, blocks, workspace_limit
from cuneigh._problem import DTYPES, Operands, Problem
from cuneigh._window import Axis

Array = npt.NDArray[Any]
Kernel = Callable[..., None]

RANK = 3
"""Token axes that kernels loop over."""

PAIRS = 1 << 18
"""Pairs of a query and a key in a slab: enough that threads seldom wait to run Python."""


class Windows(NamedTuple):
    """The keys that each query sees along one axis: begin, begin + step, .., `seen` of them."""

    begin: npt.NDArray[np.int64]
    seen: npt.NDArray[np.int64]
    step: int
    keys: int
    """Keys of the axis."""


@lru_cache(maxsize=256)
def windows(axis: Axis) -> Windows:
    token = np.arange(axis.length, dtype=np.int64)
    begin, end = axis.windows()
    count = np.maximum(end - begin, 0)
    first = axis.key_group(token % axis.dilation) + begin * axis.dilation
    return Windows(np.where(count > 0, first, 0), count, axis.dilation, axis.key_length)


ALONE = Windows(np.zeros(1, np.int64), np.ones(1, np.int64), 1, 1)
"""An axis of one token."""


@dataclass(frozen=True, eq=False)
class Slab:
    """Where its queries, keys and heads are in an entry of a batch."""

    queries: slice
    keys: slice
    kv_heads: slice
    heads: slice
    windows: tuple[Windows, ...]
    """Three, of which the first counts from the first key of the slab."""

    @property
    def head_count(self) -> int:
        return int(self.kv_heads.stop - self.kv_heads.start)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Its keys along each axis."""
        return tuple(each.keys for each in self.windows)

    @property
    def key_count(self) -> int:
        """Keys of one head."""
        return math.prod(self.sizes)

    def of_queries(self, entry: Array) -> Array:
        return entry[self.queries, ..., self.heads, :]

    def of_keys(self, entry: Array) -> Array:
        return entry[self.keys, ..., self.kv_heads, :]

    def arguments(self, problem: Problem) -> tuple[Any, ...]:
        """What kernels take last."""
        begins, counts, steps, sizes = zip(*self.windows, strict=True)
        scale = np.dtype(problem.accumulator).type(problem.scale)
        return begins, counts, steps, sizes, self.head_count, problem.group_size, scale


def slabs(problem: Problem) -> Iterator[tuple[int, Slab]]:
    """All of `problem`, always in the same order: the entry of the batch, and where in it."""
    of_entry = slabs_of_entry(problem.but(problem.operation, batch=1))
    return itertools.product(range(problem.batch), of_entry)


@lru_cache(maxsize=16)
def slabs_of_entry(problem: Problem) -> list[Slab]:
    """Those of the one entry of a batch."""
    first, *others = map(windows, problem.axes)
    others += [ALONE] * (RANK - problem.rank)
    rows, heads = slab_shape(problem)
    group = problem.group_size
    (of_rows,), (of_heads,) = blocks([problem.tokens[0]], rows), blocks([problem.kv_heads], heads)
    result = []
    for some, kv_heads in itertools.product(of_rows, of_heads):
        queries = slice(some.start, some.stop)
        begins, counts = first.begin[queries], first.seen[queries]
        begin = int(begins[counts > 0].min(initial=first.keys))
        end = int(np.where(counts > 0, begins + (counts - 1) * first.step + 1, begin).max())
        of_slab = Windows(np.maximum(begins - begin, 0), counts, first.step, end - begin)
        heads_of = slice(kv_heads.start * group, kv_heads.stop * group)
        of_keys = slice(kv_heads.start, kv_heads.stop)
        result.append(Slab(queries, slice(begin, end), of_keys, heads_of, (of_slab, *others)))
    return result


def slab_shape(problem: Problem) -> tuple[int, int]:
    """Queries along the first axis and key heads of a slab."""
    pairs = problem.visible_pairs() * problem.group_size
    rows = problem.tokens[0]
    first = problem.axes[0]
    extent = (first.kernel_size - 1) * first.dilation + 1
    if pairs > PAIRS:
        # What neighboring slabs share is copied for each of them.
        rows = min(max(-(-rows * PAIRS // pairs), extent), rows)
    heads = max(min(PAIRS // max(pairs, 1), problem.kv_heads), 1)
    most = workspace_limit() // PARALLEL_BOXES
    while rows > 1 and slab_bytes(problem, rows, heads) > most:
        rows = -(-rows // 2)
    return rows, heads


def slab_bytes(problem: Problem, rows: int, heads: int) -> int:
    """What a slab takes besides arguments and results, roughly and at most."""
    first, *others = problem.axes
    dims = problem.head_dim + problem.value_dim + 32
    extent = min(rows + (first.kernel_size - 1) * first.dilation, first.key_length)
    keys = extent * math.prod(axis.key_length for axis in others)
    queries = rows * math.prod(axis.length for axis in others) * problem.group_size
    backward = 1 + (problem.operation == "backward")
    converted = problem.dtype != problem.accumulator
    of_keys = keys * (backward + converted) * dims
    of_queries = queries * converted * backward * dims
    return heads * (of_keys + of_queries) * DTYPES[problem.accumulator]


# Arrays as kernels take them


class Numbers(NamedTuple):
    """Rows in memory: the address of the first, and the numbers from row to row along each axis."""

    address: int
    strides: tuple[int, int, int, int]


def numbers(array: Array) -> Numbers:
    """Those of ``[tokens.., heads, dim]``."""
    *of_tokens, of_heads, _ = (stride // array.itemsize for stride in array.strides)
    a, b, c = *of_tokens, *[0] * (RANK - len(of_tokens))
    return Numbers(array.ctypes.data, (a, b, c, of_heads))


ABSENT = Numbers(0, (0, 0, 0, 0))


def as_it_is(array: Array, dtype: np.dtype[Any]) -> bool:
    """Whether kernels can read and write `array` where it is."""
    step = array.itemsize
    whole_rows = array.shape[-1] == 1 or array.strides[-1] == step
    aligned = not any(at % step for at in (array.ctypes.data, *array.strides))
    return array.dtype == dtype and whole_rows and aligned


def readable(array: Array, space: Workspace, name: str) -> Array:
    """`array`, or a copy of it that kernels can read."""
    if as_it_is(array, space.dtype):
        return array
    copy = space(name, *array.shape)
    assign(copy, array)
    return copy


def writable(array: Array, space: Workspace, name: str) -> Array:
    """`array`, or another one of its shape that kernels can write, to be copied to it."""
    return array if as_it_is(array, space.dtype) else space(name, *array.shape)


class Packed(NamedTuple):
    """The addresses of keys and values of a slab, ``[heads, keys, dim]``, dim in whole vectors."""

    keys: int
    values: int


class Packer:
    """Copies the keys and values of slabs, for rows of whole vectors."""

    def __init__(self, problem: Problem, pack: Kernel, lanes: int) -> None:
        self._pack = pack
        self._dims = [-(-dim // lanes) * lanes for dim in (problem.head_dim, problem.value_dim)]

    def space(self, slab: Slab, space: Workspace, prefix: str) -> tuple[Array, Array]:
        keys, values = (
            space(f"{prefix} {name}", slab.head_count, slab.key_count, dim)
            for name, dim in zip(("keys", "values"), self._dims, strict=True)
        )
        return keys, values

    def pack(self, slab: Slab, key: Array, value: Array, space: Workspace) -> Packed:
        """Those of an entry of a batch, of which `slab` is a part."""
        key = readable(slab.of_keys(key), space, "key")
        value = readable(slab.of_keys(value), space, "value")
        packed = Packed(*(array.ctypes.data for array in self.space(slab, space, "packed")))
        self._pack(*numbers(key), *numbers(value), slab.sizes, slab.head_count, *packed)
        return packed


# The operations


def run(
    problem: Problem,
    compute: Callable[[tuple[int, Slab], Workspace], Any],
    collect: Callable[[Any], None] | None = None,
) -> None:
    """``compute((entry, slab), space)`` for all slabs, and `collect` its results in order."""
    largest = max(slab_bytes(problem, *slab_shape(problem)), 1)
    threads = max(min(thread_count(), workspace_limit() * 7 // 8 // largest), 1)
    in_order(compute, slabs(problem), threads, lambda: workspace(problem.accumulator), collect)


def forward(
    problem: Problem,
    operands: Operands,
    output: Array,
    lse: Array | None,
    pack: Kernel,
    kernel: Kernel,
    lanes: int,
) -> None:
    packer = Packer(problem, pack, lanes)

    def compute(where: tuple[int, Slab], space: Workspace) -> None:
        entry, slab = where
        packed = packer.pack(slab, operands.key[entry], operands.value[entry], space)
        query = readable(slab.of_queries(operands.query[entry]), space, "query")
        result = slab.of_queries(output[entry])
        out = writable(result, space, "output")
        of_lse = ABSENT if lse is None else numbers(slab.of_queries(lse[entry, ..., None]))
        arguments = slab.arguments(problem)
        kernel(*numbers(query), *packed, *numbers(out), *of_lse, *arguments)
        if out is not result:
            result[...] = out

    run(problem, compute)


def backward(
    problem: Problem,
    operands: Operands,
    grad_output: Array,
    output: Array,
    lse: Array,
    grad_lse: Array | None,
    gradients: Operands,
    allocate: Any,
    pack: Kernel,
    unpack: Kernel,
    kernel: Kernel,
    lanes: int,
) -> None:
    packer = Packer(problem, pack, lanes)
    shared = Sums(problem, gradients, allocate)

    def compute(where: tuple[int, Slab], space: Workspace) -> tuple[int, Slab, Packed]:
        entry, slab = where

        def read(name: str, array: Array) -> Numbers:
            return numbers(readable(slab.of_queries(array[entry]), space, name))

        packed = packer.pack(slab, operands.key[entry], operands.value[entry], space)
        of_keys = packer.space(slab, space, "gradients of")
        for array in of_keys:
            array.fill(0)
        sums = Packed(*(array.ctypes.data for array in of_keys))
        result = slab.of_queries(gradients.query[entry])
        grad_query = writable(result, space, "grad query")
        of_grad_lse = ABSENT if grad_lse is None else read("grad lse", grad_lse[..., None])
        kernel(
            *(*read("query", operands.query), *packed),
            *(*read("output", output), *read("lse", lse[..., None])),
            *(*read("grad output", grad_output), *of_grad_lse),
            *(*numbers(grad_query), *sums, *slab.arguments(problem)),
        )
        if grad_query is not result:
            result[...] = grad_query
        return entry, slab, sums

    def collect(of_slab: tuple[int, Slab, Packed]) -> None:
        entry, slab, sums = of_slab
        key, value = (
            slab.of_keys(total[entry]) for total in (shared.totals.key, shared.totals.value)
        )
        unpack(*numbers(key), *numbers(value), slab.sizes, slab.head_count, *sums)

    run(problem, compute, collect)
    shared.store()
