"""Attention and its backward slab by slab: some tiles along the first axis, and their keys.

A slab is of one batch entry and some key heads. How a problem is cut into slabs depends on nothing
but an entry of its batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from cuneigh._backends.cpu.boxes import Workspace, workspace
from cuneigh._backends.cpu.compiled import toolchain
from cuneigh._backends.cpu.compiled.arrays import ABSENT, RANK, Array, Lent
from cuneigh._backends.cpu.compiled.cuts import (
    ALONE,
    Cut,
    Integers,
    Keys,
    Queries,
    cut,
    logits,
    tile_shape,
)
from cuneigh._backends.cpu.gradients import Sums
from cuneigh._backends.cpu.threads import in_order, thread_count
from cuneigh._backends.cpu.tiles import PARALLEL_BOXES, blocks, workspace_limit
from cuneigh._problem import DTYPES, Operands, Problem

Kernel = Callable[..., None]

PAIRS = 1 << 19
"""Logits of a slab: enough that threads seldom wait to run Python."""


SLABS = 4
"""Slabs that an entry of a batch is cut into when that keeps them above a quarter of `PAIRS`."""

PART_OF_TWO = 0.85
"""Time of a logit in tiles of two vectors, which read keys and values half as often."""

MOST_IN_ROW = 512
"""Numbers of a token that are copied at once, of several heads: more come from memory faster."""

MOST_OF_WINDOWS = 1 << 17
"""Numbers of the windows of a query, of several heads, which take turns tile by tile: they are to
stay in the second-level cache."""


@dataclass(frozen=True, eq=False)
class Slab:
    """Where its queries, keys and heads are in an entry of a batch."""

    queries: slice
    keys: slice
    kv_heads: slice
    heads: slice
    cuts: tuple[Cut, ...]
    """Three, of which that of the first axis counts from the first query and key of the slab."""
    scale: Any
    """Of the problem, in the dtype of its accumulator."""

    @property
    def head_count(self) -> int:
        return int(self.kv_heads.stop - self.kv_heads.start)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Its keys along each axis."""
        return tuple(len(each.order) for each in self.cuts)

    @cached_property
    def orders(self) -> tuple[Integers, ...]:
        return tuple(each.order for each in self.cuts)

    @cached_property
    def tables(self) -> tuple[Integers, ...]:
        return tuple(each.table for each in self.cuts)

    @cached_property
    def most(self) -> tuple[int, ...]:
        """Keys of the largest block that a tile sees."""
        return tuple(int(each.keys.counts.max()) for each in self.cuts)

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """What kernels take last, but for what depends on the thread."""
        group_size = (self.heads.stop - self.heads.start) // self.head_count
        return self.tables, self.most, self.sizes, self.head_count, group_size, self.scale


def slabs(problem: Problem) -> Iterator[tuple[int, Slab]]:
    """All of `problem`, always in the same order: the entry of the batch, and where in it."""
    of_entry = slabs_of_entry(problem.but(problem.operation, batch=1))
    return itertools.product(range(problem.batch), of_entry)


@lru_cache(maxsize=16)
def slabs_of_entry(problem: Problem) -> list[Slab]:
    """Those of the one entry of a batch."""
    first, *others = cuts_of(problem)
    runs, heads, _ = slab_shape(problem, workspace_limit())
    group, scale = problem.group_size, np.dtype(problem.accumulator).type(problem.scale)
    (of_runs,) = blocks([len(first.queries.counts)], runs)
    (of_heads,) = blocks([problem.kv_heads], heads)
    result = []
    for some, kv_heads in itertools.product(of_runs, of_heads):
        queries, keys, of_slab = part(first, some)
        heads_of = slice(kv_heads.start * group, kv_heads.stop * group)
        of_keys = slice(kv_heads.start, kv_heads.stop)
        alone = [ALONE] * (RANK - problem.rank)
        cuts = *alone, of_slab, *others
        result.append(Slab(queries, keys, of_keys, heads_of, cuts, scale))
    return result


def cuts_of(problem: Problem) -> list[Cut]:
    """One for each axis."""
    shape = tile_shape(problem.axes, lanes_of(problem))
    return [cut(axis, most) for axis, most in zip(problem.axes, shape, strict=True)]


@lru_cache(maxsize=256)
def lanes_of(problem: Problem) -> int:
    """Queries of a tile: of one vector, or of two where windows are so large that it costs less."""
    one = toolchain.vector_size(8 * DTYPES[problem.accumulator])
    of_one, of_two = (count * logits(problem.axes, count) for count in (one, 2 * one))
    return 2 * one if of_two * PART_OF_TWO < of_one else one


def part(whole: Cut, runs: range) -> tuple[slice, slice, Cut]:
    """Some runs of an axis: the tokens of their queries and keys, and their cut, counted there."""
    some = slice(runs.start, runs.stop)
    queries = Queries(*(each[some] for each in whole.queries))
    keys = Keys(*(each[some] for each in whole.keys))
    seen = keys.counts > 0
    begin = int(keys.first[seen].min(initial=len(whole.order)))
    end = int((keys.first + keys.counts)[seen].max(initial=begin))
    order = whole.order[begin:end]
    first_query, first_key = int(queries.tokens.min()), int(order.min(initial=len(whole.order)))
    of_part = Cut(
        queries._replace(tokens=queries.tokens - first_query),
        keys._replace(first=np.where(seen, keys.first - begin, 0)),
        order - first_key,
    )
    tokens = slice(first_query, int(queries.tokens.max()) + 1)
    return tokens, slice(first_key, int(order.max(initial=first_key - 1)) + 1), of_part


@lru_cache(maxsize=256)
def slab_shape(problem: Problem, limit: int) -> tuple[int, int, int]:
    """Runs along the first axis and key heads of a slab, and the bytes that it takes.

    `limit` is that of the workspace.
    """
    lanes, first = lanes_of(problem), cuts_of(problem)[0]
    all_runs, most = first.queries.tokens.shape
    of_run = logits(problem.axes, lanes) * lanes * problem.group_size // all_runs
    # What neighboring slabs share is copied for each of them.
    fewest = min(-(-problem.axes[0].kernel_size // most), all_runs)
    dim = max(problem.head_dim, problem.value_dim)
    window = problem.window_size * (problem.head_dim + problem.value_dim)
    most_heads = max(min(MOST_IN_ROW // dim, MOST_OF_WINDOWS // window, problem.kv_heads), 1)
    aim = min(max(of_run * all_runs * problem.kv_heads // SLABS, PAIRS // 4), PAIRS)
    heads = min(max(aim // max(of_run * fewest, 1), 1), most_heads)
    runs = min(max(aim // max(of_run * heads, 1), fewest), all_runs)
    while (size := slab_bytes(problem, runs, heads)) > limit // PARALLEL_BOXES:
        if heads == runs == 1:
            break
        heads, runs = (-(-heads // 2), runs) if heads > 1 else (1, -(-runs // 2))
    return runs, heads, max(size, 1)


def slab_bytes(problem: Problem, runs: int, heads: int) -> int:
    """What a slab takes besides arguments and results, at most."""
    first, *others = cuts_of(problem)
    (of_runs,) = blocks([len(first.queries.counts)], runs)
    parts = [part(first, some) for some in of_runs]
    backward = 1 + (problem.operation == "backward")
    dims = problem.head_dim + problem.value_dim
    # Keys in order; arrays that kernels cannot read where they are.
    laid_out = max(len(each.order) for _, _, each in parts) * backward
    keys = laid_out + max(tokens.stop - tokens.start for _, tokens, _ in parts)
    keys *= math.prod(len(each.order) for each in others)
    queries = max(tokens.stop - tokens.start for tokens, _, _ in parts) * backward
    queries *= math.prod(problem.tokens[1:]) * problem.group_size
    return int(heads * (keys + queries) * dims * DTYPES[problem.accumulator])


# The operations


def run(
    problem: Problem,
    compute: Callable[[tuple[int, Slab], Workspace], Any],
    collect: Callable[[Any], None] | None = None,
) -> None:
    """``compute((entry, slab), space)`` for all slabs, and `collect` its results in order."""
    _, _, largest = slab_shape(problem.but(problem.operation, batch=1), workspace_limit())
    threads = max(min(thread_count(), workspace_limit() * 7 // 8 // largest), 1)
    in_order(compute, slabs(problem), threads, lambda: workspace(problem.accumulator), collect)


class Spaces:
    """Where a thread lays out the keys and values of slabs, and what else it needs for them."""

    def __init__(self, problem: Problem, slab: Slab, space: Workspace) -> None:
        self._problem, self._slab, self._space = problem, slab, space

    def of_keys(self, name: str) -> tuple[Array, Array]:
        """For the keys and values of a slab, ``[heads, keys, dim]``."""
        shape = self._slab.head_count, math.prod(self._slab.sizes)
        return (
            self._space(f"{name} keys", *shape, self._problem.head_dim),
            self._space(f"{name} values", *shape, self._problem.value_dim),
        )

    def of_tile(self) -> int:
        """The address of what kernels need for a tile: vectors, rows and columns, and logits."""
        problem, lanes = self._problem, lanes_of(self._problem)
        dims = sum(-(-dim // lanes) * lanes for dim in (problem.head_dim, problem.value_dim))
        arrays = 1 + (problem.operation == "backward")
        numbers = lanes * (5 + 2 * dims + arrays * math.prod(self._slab.most))
        return self._space("tile", numbers).ctypes.data


class Packer:
    """Lays out the keys and values of slabs."""

    def __init__(self, operands: Operands, stored: str, pack: Kernel) -> None:
        self._key, self._value = Lent(operands.key, stored), Lent(operands.value, stored)
        self._pack = pack

    def __call__(self, entry: int, slab: Slab, space: Workspace, spaces: Spaces) -> list[int]:
        """The addresses of keys and values."""
        where = entry, slab.keys, slab.kv_heads, space
        keys, values = self._key.reading(*where, "key"), self._value.reading(*where, "value")
        packed = [array.ctypes.data for array in spaces.of_keys("packed")]
        self._pack(*keys, *values, slab.orders, slab.head_count, *packed)
        return packed


def forward(
    problem: Problem,
    operands: Operands,
    output: Array,
    lse: Array | None,
    stored: str,
    pack: Kernel,
    kernel: Kernel,
) -> None:
    packer = Packer(operands, stored, pack)
    query, out = Lent(operands.query, stored), Lent(output, stored)
    of_lse = None if lse is None else Lent(lse[..., None], problem.accumulator)

    def compute(where: tuple[int, Slab], space: Workspace) -> None:
        entry, slab = where
        spaces, part = Spaces(problem, slab, space), (entry, slab.queries, slab.heads)
        keys = packer(entry, slab, space, spaces)
        some_out, copy = out.writing(*part, space, "output")
        some_lse, lse_copy = of_lse.writing(*part, space, "lse") if of_lse else (ABSENT, None)
        kernel(
            *(*query.reading(*part, space, "query"), *keys, *some_out, *some_lse),
            *(*slab.arguments, spaces.of_tile()),
        )
        out.store(*part, copy)
        if of_lse:
            of_lse.store(*part, lse_copy)

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
    stored: str,
    pack: Kernel,
    unpack: Kernel,
    kernel: Kernel,
) -> None:
    shared = Sums(problem, gradients, allocate)
    packer = Packer(operands, stored, pack)
    query, out, grad = (Lent(array, stored) for array in (operands.query, output, grad_output))
    of_lse, of_grad_lse = (
        None if array is None else Lent(array[..., None], problem.accumulator)
        for array in (lse, grad_lse)
    )
    assert of_lse is not None
    grad_query = Lent(gradients.query, stored)
    totals = [Lent(each, problem.accumulator) for each in (shared.totals.key, shared.totals.value)]

    def compute(where: tuple[int, Slab], space: Workspace) -> Any:
        entry, slab = where
        spaces, part = Spaces(problem, slab, space), (entry, slab.queries, slab.heads)
        keys = packer(entry, slab, space, spaces)
        sums = spaces.of_keys("gradients of")
        for array in sums:
            array.fill(0)
        addresses = [array.ctypes.data for array in sums]
        some_grad_query, copy = grad_query.writing(*part, space, "grad query")
        grad_lse_or_none = of_grad_lse.reading(*part, space, "grad lse") if of_grad_lse else ABSENT
        kernel(
            *(*query.reading(*part, space, "query"), *keys),
            *(*out.reading(*part, space, "output"), *of_lse.reading(*part, space, "lse")),
            *(*grad.reading(*part, space, "grad output"), *grad_lse_or_none),
            *(*some_grad_query, *addresses, *slab.arguments, spaces.of_tile()),
        )
        grad_query.store(*part, copy)
        return entry, slab, addresses

    def collect(of_slab: tuple[int, Slab, list[int]]) -> None:
        entry, slab, addresses = of_slab
        key, value = (total.numbers(entry, slab.keys, slab.kv_heads) for total in totals)
        unpack(*key, *value, slab.orders, slab.head_count, *addresses)

    run(problem, compute, collect)
    shared.store()
