"""What is done with rows: those of a tile of queries, one in each number of a vector, and of keys.

Every step is an intrinsic of Numba's (`intrinsics`), in vector instructions (`vectors`). Weights,
and all that belongs to a key and the queries of a tile, are a vector for each key (`weights`),
`columns` of queries and sums a vector for each of their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from numba import types

from cuneigh._backends.cpu.compiled import intrinsics, storage
from cuneigh._backends.cpu.compiled.intrinsics import each_key
from cuneigh._backends.cpu.compiled.vectors import INT64, Value, Vectors

CACHE_LINE = 64
"""Bytes."""


class Steps(NamedTuple):
    """The intrinsics for rows of one size. `places` says where each of `runs` begins, in rows."""

    dots: Any
    """``dots(rows, places, runs, count, columns, out)``: the products of all keys and queries."""
    weighted: Any
    """``weighted(weights, rows, places, runs, count, out)``: for each query, the sum of all rows,
    each times its weight."""
    weighted_visible: Any
    """``weighted_visible(weights, rows, places, counts, bounds, out)``: the same of what each query
    sees and nothing else, NaN and infinities included."""
    spread: Any
    """``spread(weights, rows, places, runs, count, out)``: add to the row of each key at `out` the
    sum of the rows of all queries, each times its weight."""
    dot: Any
    """``dot(a, b)``: the product of two rows."""
    is_finite: Any
    """``is_finite(columns)``: whether all numbers of all queries are."""
    finite_lanes: Any
    """``finite_lanes(columns, out)``: for each query 1 if its numbers are finite, else NaN."""
    read: Any
    """``read(stored, row)``: copy a row of an array, widened."""
    write: Any
    """``write(row, stored)``: the opposite."""
    expect: Any
    """``expect(stored)``: a row of an array is soon to be read or written."""
    add: Any
    """``add(row, out)``: add to a row."""
    to_columns: Any
    """``to_columns(rows, factors, columns)``: of the rows of all queries, each number times that of
    `factors`, a vector. Rows are as long as whole vectors."""
    to_rows: Any
    """``to_rows(columns, factors, rows)``: the opposite, each query times its factor."""


def steps_of_rows(dim: int, bits: int, lanes: int, dtype: str, most_rows: int) -> Steps:
    """The steps that have to do with rows of `dim` numbers, in arrays of `dtype`.

    The vectors of `most_rows` sums fit in registers, and others beside them.
    """
    number = {32: types.float32, 64: types.float64}[bits]
    most_parts = 4 if most_rows >= 16 else 2
    size = -(-dim // lanes) * lanes

    def step(returns: Any) -> Callable[[Callable[..., Any]], Any]:
        return intrinsics.step(bits, lanes, returns)

    def row(v: Vectors, rows: Value, places: Value, run: Value) -> tuple[Value, Value]:
        """The first key of a run: its place, and its row."""
        integers = v.builder.inttoptr(places, INT64.as_pointer())
        place = v.builder.load(v.builder.gep(integers, [run]))
        return place, v.element(rows, v.builder.mul(place, INT64(dim)))

    def vector_at(v: Vectors, index: Value) -> Value:
        return v.builder.mul(index, INT64(lanes))

    @step(types.void)
    def dots(
        v: Vectors, rows: Value, places: Value, runs: Value, count: Value, columns: Value,
        out: Value,
    ) -> None:  # fmt: skip
        b = v.builder
        rows, columns, out = map(v.pointer, (rows, columns, out))
        with v.steps(INT64(0), runs, 1) as run:
            _, first = row(v, rows, places, run)
            first_out = v.element(out, vector_at(v, b.mul(run, count)))

            def some(j: Value, keys: int) -> None:
                of_keys = v.element(first, b.mul(j, INT64(dim)))
                totals = [v.variable(0.0) for _ in range(keys)]
                with v.steps(INT64(0), INT64(dim), 1) as i:
                    column = v.load(columns, vector_at(v, i))
                    for key, total in enumerate(totals):
                        of_key = b.load(v.element(of_keys, b.add(i, INT64(key * dim))))
                        b.store(v.plus_product(b.load(total), v.splat(of_key), column), total)
                for key, total in enumerate(totals):
                    v.store(b.load(total), first_out, vector_at(v, b.add(j, INT64(key))))

            _in_blocks(v, count, most_rows, some)

    def weigh(v: Vectors, weights: Value, rows: Value, out: Value, keys: Callable[[], Any]) -> None:
        b = v.builder
        for begin in range(0, dim, most_rows):
            numbers = range(begin, min(begin + most_rows, dim))
            totals = [v.variable(0.0) for _ in numbers]
            with keys() as (key, place, mask):
                weight = v.load(weights, vector_at(v, key))
                of_key = v.element(rows, b.mul(place, INT64(dim)))
                for i, total in zip(numbers, totals, strict=True):
                    factor = v.splat(b.load(v.element(of_key, i)))
                    before = b.load(total)
                    after = v.plus_product(before, factor, weight)
                    b.store(after if mask is None else b.select(mask, after, before), total)
            for i, total in zip(numbers, totals, strict=True):
                v.store(b.load(total), out, i * lanes)

    @step(types.void)
    def weighted(
        v: Vectors, weights: Value, rows: Value, places: Value, runs: Value, count: Value,
        out: Value,
    ) -> None:  # fmt: skip
        b = v.builder
        weights, rows, out = map(v.pointer, (weights, rows, out))

        @contextmanager
        def keys() -> Iterator[tuple[Value, Value, None]]:
            with v.steps(INT64(0), runs, 1) as run:
                place, _ = row(v, rows, places, run)
                first = b.mul(run, count)
                with v.steps(INT64(0), count, 1) as j:
                    yield b.add(first, j), b.add(place, j), None

        weigh(v, weights, rows, out, keys)

    @step(types.void)
    def weighted_visible(
        v: Vectors, weights: Value, rows: Value, places: Value, counts: Value, bounds: Value,
        out: Value,
    ) -> None:  # fmt: skip
        b = v.builder
        weights, rows, out = map(v.pointer, (weights, rows, out))

        @contextmanager
        def keys() -> Iterator[tuple[Value, Value, Value]]:
            with each_key(v, counts, bounds) as (key, run, j, mask):
                place, _ = row(v, rows, places, run)
                yield key, b.add(place, j), mask

        weigh(v, weights, rows, out, keys)

    @step(types.void)
    def spread(
        v: Vectors, weights: Value, rows: Value, places: Value, runs: Value, count: Value,
        out: Value,
    ) -> None:  # fmt: skip
        b, parts = v.builder, v.parts(dim)
        weights, rows, out = map(v.pointer, (weights, rows, out))
        with v.steps(INT64(0), runs, 1) as run:
            _, first = row(v, out, places, run)
            first_weight = v.element(weights, vector_at(v, b.mul(run, count)))

            def some(j: Value, keys: int) -> None:
                of_weights = v.element(first_weight, vector_at(v, j))
                for begin in range(0, len(parts), most_parts):
                    some_parts = parts[begin : begin + most_parts]
                    where = [
                        (b.add(b.mul(b.add(j, INT64(key)), INT64(dim)), INT64(start)), count)
                        for key in range(keys)
                        for start, count in some_parts
                    ]
                    totals = [v.variable(0.0) for _ in where]
                    for (at, count), total in zip(where, totals, strict=True):
                        b.store(v.load(first, at, count), total)
                    with v.steps(INT64(0), INT64(lanes), 1) as query:
                        of_query = v.element(rows, b.mul(query, INT64(size)))
                        vectors = [v.load(of_query, start) for start, _ in some_parts]
                        for key in range(keys):
                            at = b.add(query, INT64(key * lanes))
                            weight = v.splat(b.load(v.element(of_weights, at)))
                            for i, vector in enumerate(vectors):
                                total = totals[key * len(vectors) + i]
                                b.store(v.plus_product(b.load(total), weight, vector), total)
                    for (at, count), total in zip(where, totals, strict=True):
                        v.store(b.load(total), first, at, count)

            _in_blocks(v, count, most_rows // most_parts, some)

    @step(number)
    def dot(v: Vectors, a: Value, b: Value) -> Value:
        a, b = map(v.pointer, (a, b))
        total = None
        for start, count in v.parts(dim):
            total = v.plus_product(total, v.load(a, start, count), v.load(b, start, count))
        return v.sum(total)

    def one_if_finite(v: Vectors, columns: Value) -> Value:
        """1, or NaN where a number of the query is infinite or NaN."""
        b, columns = v.builder, v.pointer(columns)
        total = v.variable(1.0)
        with v.steps(INT64(0), INT64(dim), 1) as i:
            product = b.fmul(v.load(columns, vector_at(v, i)), v.constant(0.0))
            b.store(b.fadd(b.load(total), product), total)
        return b.load(total)

    @step(types.boolean)
    def is_finite(v: Vectors, columns: Value) -> Value:
        total = one_if_finite(v, columns)
        return v.is_true(v.builder.fcmp_ordered("==", total, total))

    @step(types.void)
    def finite_lanes(v: Vectors, columns: Value, out: Value) -> None:
        v.store(one_if_finite(v, columns), v.pointer(out), 0)

    @step(types.void)
    def read(v: Vectors, stored: Value, row: Value) -> None:
        stored, row = storage.pointer(v, stored, dtype), v.pointer(row)
        for start, count in v.parts(dim):
            v.store(storage.load(v, stored, start, count, dtype), row, start, count)

    @step(types.void)
    def write(v: Vectors, row: Value, stored: Value) -> None:
        row, stored = v.pointer(row), storage.pointer(v, stored, dtype)
        for start, count in v.parts(dim):
            storage.store(v, v.load(row, start, count), stored, start, count, dtype)

    @step(types.void)
    def expect(v: Vectors, stored: Value) -> None:
        for start in range(0, dim * storage.itemsize(dtype), CACHE_LINE):
            v.prefetch(v.builder.add(stored, INT64(start)))

    @step(types.void)
    def add(v: Vectors, row: Value, out: Value) -> None:
        row, out = map(v.pointer, (row, out))
        for start, count in v.parts(dim):
            total = v.builder.fadd(v.load(out, start, count), v.load(row, start, count))
            v.store(total, out, start, count)

    def transpose(
        v: Vectors, source: Value, factors: Value, target: Value, strides: tuple[int, int],
        steps: tuple[int, int],
    ) -> None:  # fmt: skip
        """Blocks of `lanes` rows, `strides` apart in source and target, the blocks `steps`."""
        b, source, target = v.builder, v.pointer(source), v.pointer(target)
        factor = v.load(v.pointer(factors), 0)
        with v.steps(INT64(0), INT64(size // lanes), 1) as block:
            of, to = (
                v.element(numbers, b.mul(block, INT64(step)))
                for numbers, step in zip((source, target), steps, strict=True)
            )
            vectors = [b.fmul(v.load(of, i * strides[0]), factor) for i in range(lanes)]
            for i, vector in enumerate(v.transposed(vectors)):
                v.store(vector, to, i * strides[1])

    @step(types.void)
    def to_columns(v: Vectors, rows: Value, factors: Value, columns: Value) -> None:
        transpose(v, rows, factors, columns, (size, lanes), (lanes, lanes * lanes))

    @step(types.void)
    def to_rows(v: Vectors, columns: Value, factors: Value, rows: Value) -> None:
        transpose(v, columns, factors, rows, (lanes, size), (lanes * lanes, lanes))

    return Steps(
        *(dots, weighted, weighted_visible, spread, dot, is_finite, finite_lanes),
        *(read, write, expect, add, to_columns, to_rows),
    )


def _in_blocks(v: Vectors, count: Value, size: int, some: Callable[[Value, int], None]) -> None:
    """``some(begin, n)`` for blocks of ``range(count)``: of `size`, then one of smaller powers."""
    b = v.builder
    with v.steps(INT64(0), b.and_(count, INT64(-size)), size) as begin:
        some(begin, size)
    while size > 1:
        size //= 2
        with b.if_then(b.icmp_unsigned("!=", b.and_(count, INT64(size)), INT64(0))):
            some(b.and_(count, INT64(-2 * size)), size)
