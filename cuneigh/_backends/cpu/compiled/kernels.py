"""The loops over the tiles of queries of a slab, compiled by Numba.

A slab's keys and values are copied first, head by head: the rows of a run then follow each other,
and what neighbors share stays in the caches. Queries and outputs are read and written where they
are. Loops are written for three token axes; those that a problem lacks have one token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from cuneigh._backends.cpu.attention import HIGHEST_SUM, LOWEST_SUM
from cuneigh._backends.cpu.compiled.copies import copies, renamed, row
from cuneigh._backends.cpu.compiled.steps import steps_of_rows
from cuneigh._backends.cpu.compiled.weights import steps_of_weights
from cuneigh._problem import DTYPES, SUPPORTED

OPTIONS = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    "fastmath": {"contract"},
    "no_cfunc_wrapper": True,
}
INNER = {**OPTIONS, "no_cpython_wrapper": True}
"""Of functions that kernels call."""


class Kernels(NamedTuple):
    """Python functions that Numba can compile, for heads of one size and tiles of one width."""

    pack: Callable[..., None]
    unpack: Callable[..., None]
    forward: Callable[..., None]
    backward: Callable[..., None]


def kernels(head_dim: int, value_dim: int, dtype: str, lanes: int, rows: int) -> Kernels:
    """Those for queries and keys of `head_dim` numbers and values of `value_dim`.

    Tiles have `lanes` queries, and the sums of `rows` keys stay in registers.
    """
    accumulator = SUPPORTED[dtype].accumulator
    stored, itemsize = DTYPES[dtype], DTYPES[accumulator]
    of_keys = steps_of_rows(head_dim, 8 * itemsize, lanes, dtype, rows)
    of_values = steps_of_rows(value_dim, 8 * itemsize, lanes, dtype, rows)
    weights_of = steps_of_weights(8 * itemsize, lanes)
    read_key, write_key = of_keys.read, of_keys.write
    read_value, write_value = of_values.read, of_values.write
    expect_key, expect_value = of_keys.expect, of_values.expect
    key_columns, key_rows = of_keys.to_columns, of_keys.to_rows
    value_columns, value_rows = of_values.to_columns, of_values.to_rows
    finite_lanes, value_dot = of_values.finite_lanes, of_values.dot
    maximum, need_no_maximum = weights_of.maximum, weights_of.need_no_maximum
    soften_step, differentiate_step = weights_of.soften, weights_of.differentiate
    read, write = weights_of.read, weights_of.write

    number, integer = np.dtype(accumulator).type, np.dtype(f"i{itemsize}").type
    vector_bytes = lanes * itemsize
    key_bytes, value_bytes = head_dim * itemsize, value_dim * itemsize
    key_row, value_row = (-(-dim // lanes) * vector_bytes for dim in (head_dim, value_dim))
    low, high, zero, one = number(-np.inf), number(np.inf), number(0), number(1)

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        return renamed(function, head_dim, value_dim, dtype, lanes)

    def once(name: str, step: Any) -> Any:
        """A function that does a step: LLVM compiles it once, not wherever it is used."""

        def function(a, b, c, d, e, f):  # type: ignore[no-untyped-def]
            step(a, b, c, d, e, f)

        function.__name__ = name
        return numba.njit(**INNER)(named(function))

    key_dots, value_dots = once("key_dots", of_keys.dots), once("value_dots", of_values.dots)
    key_sums = once("key_sums", of_keys.weighted)
    value_sums = once("value_sums", of_values.weighted)
    spread_keys = once("spread_keys", of_keys.spread)
    spread_values = once("spread_values", of_values.spread)
    visible_key_sums = once("visible_key_sums", of_keys.weighted_visible)
    visible_value_sums = once("visible_value_sums", of_values.weighted_visible)

    @numba.njit(**INNER)
    @named
    def soften(logits, counts, bounds, shifts, sums):  # type: ignore[no-untyped-def]
        soften_step(logits, counts, bounds, shifts, sums)

    @numba.njit(**INNER)
    @named
    def differentiate(weights, gradients, counts, bounds, deltas):  # type: ignore[no-untyped-def]
        differentiate_step(weights, gradients, counts, bounds, deltas)

    finite_keys, finite_values = of_keys.is_finite, of_values.is_finite

    @numba.njit(**INNER)
    @named
    def enter_run(axis, run, table, lane_of, tokens, bounds, is_query):  # type: ignore[no-untyped-def]
        """What the lanes of a tile are along an axis: those that are no query do as the first."""
        most = (table.shape[1] - 3) // 3
        for lane in range(lanes):
            i = lane_of[axis, lane]
            is_query[axis, lane] = 0 <= i < table[run, 3 * most]
            if not is_query[axis, lane]:
                i = 0
            tokens[axis, lane] = table[run, i]
            bounds[axis, 0, lane] = table[run, most + i]
            bounds[axis, 1, lane] = table[run, 2 * most + i]

    @numba.njit(**INNER)
    @named
    def lanes_of(tables):  # type: ignore[no-untyped-def]
        """``[axis, lane]``: which query along an axis a lane is; -1 for lanes that are none."""
        lane_of = np.full((3, lanes), -1)
        count_a = (tables[0].shape[1] - 3) // 3
        count_b = (tables[1].shape[1] - 3) // 3
        count_c = (tables[2].shape[1] - 3) // 3
        for lane in range(count_a * count_b * count_c):
            lane_of[0, lane] = lane // (count_b * count_c)
            lane_of[1, lane] = lane // count_c % count_b
            lane_of[2, lane] = lane % count_c
        return lane_of

    @numba.njit(**INNER)
    @named
    def find_places(places, counts, sizes):  # type: ignore[no-untyped-def]
        """The first keys of the runs of a block, from that of the first run."""
        for a in range(counts[0]):
            for b in range(counts[1]):
                places[a * counts[1] + b] = (a * sizes[1] + b) * sizes[2]

    @numba.njit(**INNER)
    @named
    def choose_shifts(sums, peaks, shifts):  # type: ignore[no-untyped-def]
        """The maximum for queries whose sums tell that they need it; and 0 if they see no key."""
        for lane in range(lanes):
            if not LOWEST_SUM <= read(sums, lane) <= HIGHEST_SUM and read(peaks, lane) != low:
                write(read(peaks, lane), shifts, lane)

    @numba.njit(**INNER)
    @named
    def attend_with_care(  # type: ignore[no-untyped-def]
        columns, keys, values, places, counts, bounds, peaks, shifts, weights, sums, out
    ):
        """Sums of values where not all queries do without the maximum, or not all are finite.

        First with the maximum, then of what each query sees alone, then with the maximum of those
        that still need it.
        """
        runs, count = counts[0] * counts[1], counts[2]
        for attempt in range(3):
            key_dots(keys, places, runs, count, columns, weights)
            if attempt == 0:
                maximum(weights, counts, bounds, peaks)
            choose_shifts(sums, peaks, shifts)
            soften(weights, counts, bounds, shifts, sums)
            if attempt == 0:
                value_sums(weights, values, places, runs, count, out)
                if finite_values(out):
                    return
            else:
                visible_value_sums(weights, values, places, counts, bounds, out)
            if attempt == 1:
                finite_lanes(out, sums)  # NaN is no sum between the bounds

    @numba.njit(**INNER)
    @named
    def spread_visible(  # type: ignore[no-untyped-def]
        weights, rows, size, dim, places, counts, bounds, is_query, out
    ):
        """`spread`, of what each query sees and nothing else: slow, where rows are not finite."""
        for run in range(counts[0] * counts[1]):
            for c in range(counts[2]):
                key = run * counts[2] + c
                at = out + itemsize * dim * (places[run] + c)
                for lane in range(lanes):
                    sees = is_query[0, lane] and is_query[1, lane] and is_query[2, lane]
                    for axis, j in enumerate((run // counts[1], run % counts[1], c)):
                        sees = sees and 0 <= j - bounds[axis, 0, lane] < bounds[axis, 1, lane]
                    if sees:
                        weight = read(weights, key * lanes + lane)
                        for i in range(dim):
                            product = weight * read(rows + lane * size, i)
                            write(read(at, i) + product, at, i)

    @named
    def forward(  # type: ignore[no-untyped-def]
        query, query_strides, keys, values, output, output_strides, lse, lse_strides,
        tables, most, sizes, heads, group_size, scale, scratch,
    ):  # fmt: skip
        axes, lane_of = np.arange(3), lanes_of(tables)
        tokens, is_query = np.zeros((3, lanes), np.int64), np.zeros((3, lanes), np.bool_)
        bounds = np.zeros((3, 2, lanes), integer)
        places = np.zeros(most[0] * most[1], np.int64)
        at_bounds, at_places = bounds.ctypes.data, places.ctypes.data
        table_a, table_b, table_c = tables
        scales, no_shifts, sums = scratch, scratch + vector_bytes, scratch + 2 * vector_bytes
        peaks, shifts = scratch + 3 * vector_bytes, scratch + 4 * vector_bytes
        queries = scratch + 5 * vector_bytes
        columns = queries + lanes * key_row
        results = columns + lanes * key_row
        out = results + lanes * value_row
        weights = out + lanes * value_row
        for lane in range(lanes):
            write(scale, scales, lane)
            write(zero, no_shifts, lane)
        key_tokens = sizes[0] * sizes[1] * sizes[2]
        known = (-1, -1, -1)
        for run_a in range(len(table_a)):
            enter_run(axes[0], run_a, table_a, lane_of, tokens, bounds, is_query)
            for run_b in range(len(table_b)):
                enter_run(axes[1], run_b, table_b, lane_of, tokens, bounds, is_query)
                for run_c in range(len(table_c)):
                    enter_run(axes[2], run_c, table_c, lane_of, tokens, bounds, is_query)
                    counts = table_a[run_a, -1], table_b[run_b, -1], table_c[run_c, -1]
                    if counts != known:
                        known = counts
                        find_places(places, counts, sizes)
                    first = table_a[run_a, -2] * sizes[1] + table_b[run_b, -2]
                    first = first * sizes[2] + table_c[run_c, -2]
                    runs, count = counts[0] * counts[1], counts[2]
                    for head in range(heads * group_size):
                        of_head = first + head // group_size * key_tokens
                        some_keys = keys + of_head * key_bytes
                        some_values = values + of_head * value_bytes
                        for i in range(lanes):
                            a, b, c = tokens[0, i], tokens[1, i], tokens[2, i]
                            of_query = row(query, stored, query_strides, a, b, c, head)
                            read_key(of_query, queries + i * key_row)
                            # While this head is computed, what comes next comes from memory.
                            expect_key(of_query + stored * query_strides[3])
                            expect_value(row(output, stored, output_strides, a, b, c, head))
                            write(zero, shifts, i)
                        key_columns(queries, scales, columns)
                        key_dots(some_keys, at_places, runs, count, columns, weights)
                        soften(weights, counts, at_bounds, no_shifts, sums)
                        value_sums(weights, some_values, at_places, runs, count, out)
                        if not need_no_maximum(sums) or not finite_values(out):
                            attend_with_care(
                                columns, some_keys, some_values, at_places, counts, at_bounds,
                                peaks, shifts, weights, sums, out,
                            )  # fmt: skip
                        for i in range(lanes):
                            total = read(sums, i)
                            if lse != 0:
                                a, b, c = tokens[0, i], tokens[1, i], tokens[2, i]
                                to = row(lse, itemsize, lse_strides, a, b, c, head)
                                write(number(np.log(total)) + read(shifts, i), to, 0)
                            write(one if total == 0 else one / total, sums, i)
                        value_rows(out, sums, results)
                        for i in range(lanes):
                            a, b, c = tokens[0, i], tokens[1, i], tokens[2, i]
                            to = row(output, stored, output_strides, a, b, c, head)
                            write_value(results + i * value_row, to)

    @named
    def backward(  # type: ignore[no-untyped-def]
        query, query_strides, keys, values, output, output_strides, lse, lse_strides,
        grad_output, grad_output_strides, grad_lse, grad_lse_strides,
        grad_query, grad_query_strides, grad_keys, grad_values,
        tables, most, sizes, heads, group_size, scale, scratch,
    ):  # fmt: skip
        axes, lane_of = np.arange(3), lanes_of(tables)
        tokens, is_query = np.zeros((3, lanes), np.int64), np.zeros((3, lanes), np.bool_)
        bounds = np.zeros((3, 2, lanes), integer)
        places = np.zeros(most[0] * most[1], np.int64)
        at_bounds, at_places = bounds.ctypes.data, places.ctypes.data
        table_a, table_b, table_c = tables
        scales, ones, sums = scratch, scratch + vector_bytes, scratch + 2 * vector_bytes
        shifts, deltas = scratch + 3 * vector_bytes, scratch + 4 * vector_bytes
        queries = scratch + 5 * vector_bytes
        columns = queries + lanes * key_row
        grads = columns + lanes * key_row
        grad_columns = grads + lanes * value_row
        weights = grad_columns + lanes * value_row
        gradients = weights + most[0] * most[1] * most[2] * vector_bytes
        for lane in range(lanes):
            write(scale, scales, lane)
            write(one, ones, lane)
        key_tokens = sizes[0] * sizes[1] * sizes[2]
        known = (-1, -1, -1)
        for run_a in range(len(table_a)):
            enter_run(axes[0], run_a, table_a, lane_of, tokens, bounds, is_query)
            for run_b in range(len(table_b)):
                enter_run(axes[1], run_b, table_b, lane_of, tokens, bounds, is_query)
                for run_c in range(len(table_c)):
                    enter_run(axes[2], run_c, table_c, lane_of, tokens, bounds, is_query)
                    counts = table_a[run_a, -1], table_b[run_b, -1], table_c[run_c, -1]
                    if counts != known:
                        known = counts
                        find_places(places, counts, sizes)
                    first = table_a[run_a, -2] * sizes[1] + table_b[run_b, -2]
                    first = first * sizes[2] + table_c[run_c, -2]
                    runs, count = counts[0] * counts[1], counts[2]
                    for head in range(heads * group_size):
                        of_head = first + head // group_size * key_tokens
                        key, value = of_head * key_bytes, of_head * value_bytes
                        for i in range(lanes):
                            a, b, c = tokens[0, i], tokens[1, i], tokens[2, i]
                            of_query = row(query, stored, query_strides, a, b, c, head)
                            of_out = row(output, stored, output_strides, a, b, c, head)
                            of_lse = row(lse, itemsize, lse_strides, a, b, c, head)
                            of_grad = row(grad_output, stored, grad_output_strides, a, b, c, head)
                            of_grad_lse = row(grad_lse, itemsize, grad_lse_strides, a, b, c, head)
                            read_key(of_query, queries + i * key_row)
                            read_value(of_grad, grads + i * value_row)
                            read_value(of_out, grad_columns)
                            delta = value_dot(grads + i * value_row, grad_columns)
                            if grad_lse != 0:
                                delta -= read(of_grad_lse, 0)
                            write(delta, deltas, i)
                            shift = read(of_lse, 0)
                            if not (is_query[0, i] and is_query[1, i] and is_query[2, i]):
                                shift = high
                            write(zero if shift == low else shift, shifts, i)
                        key_columns(queries, scales, columns)
                        value_columns(grads, ones, grad_columns)
                        key_dots(keys + key, at_places, runs, count, columns, weights)
                        soften(weights, counts, at_bounds, shifts, sums)
                        value_dots(values + value, at_places, runs, count, grad_columns, gradients)
                        differentiate(weights, gradients, counts, at_bounds, deltas)
                        if finite_values(grad_columns):
                            spread_values(
                                weights, grads, at_places, runs, count, grad_values + value
                            )
                        else:
                            spread_visible(
                                weights, grads, value_row, value_dim, places, counts, bounds,
                                is_query, grad_values + value,
                            )  # fmt: skip
                        if finite_keys(columns):
                            spread_keys(gradients, queries, at_places, runs, count, grad_keys + key)
                        else:
                            spread_visible(
                                gradients, queries, key_row, head_dim, places, counts, bounds,
                                is_query, grad_keys + key,
                            )  # fmt: skip
                        key_sums(gradients, keys + key, at_places, runs, count, columns)
                        if not finite_keys(columns):
                            visible_key_sums(
                                gradients, keys + key, at_places, counts, at_bounds, columns
                            )
                        key_rows(columns, scales, queries)
                        for i in range(lanes):
                            if is_query[0, i] and is_query[1, i] and is_query[2, i]:
                                a, b, c = tokens[0, i], tokens[1, i], tokens[2, i]
                                to = row(grad_query, stored, grad_query_strides, a, b, c, head)
                                write_key(queries + i * key_row, to)

    return Kernels(*copies(head_dim, value_dim, dtype, lanes), forward, backward)


def _signature(parameters: str) -> Callable[[str], tuple[Any, ...]]:
    """Types of arguments: addresses, strides (4), triples, tables and orders (3), numbers."""

    def of_dtype(dtype: str) -> tuple[Any, ...]:
        integer, three = numba.int64, numba.types.UniTuple
        kinds = {
            "i": integer,
            "s": numba.types.UniTuple(integer, 4),
            "t": three(integer, 3),
            "o": three(numba.types.Array(integer, 1, "C"), 3),
            "w": three(numba.types.Array(integer, 2, "C"), 3),
            "x": {"float32": numba.float32, "float64": numba.float64}[dtype],
        }
        return tuple(kinds[parameter] for parameter in parameters)

    return of_dtype


SIGNATURES = {
    "pack": _signature("isisoiii"),
    "unpack": _signature("isisoiii"),
    "forward": _signature("isiiisiswttiixi"),
    "backward": _signature("isiiisisisisisiiwttiixi"),
}
"""By the name of a kernel, the types of its arguments for an accumulator."""
