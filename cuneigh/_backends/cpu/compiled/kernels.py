"""The loops over the queries of a slab, compiled by Numba.

A slab's keys and values are copied first, head by head and each padded to whole vectors: what the
windows of neighbors share then stays in the first-level cache. Queries and outputs are read and
written where they are. Loops are written for three token axes; those that a problem lacks have one
token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from cuneigh._backends.cpu.attention import HIGHEST_SUM, LOWEST_SUM
from cuneigh._backends.cpu.compiled.steps import steps_of_rows, steps_of_weights

OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": {"contract"}}


class Kernels(NamedTuple):
    """Python functions that Numba can compile, for heads of one size."""

    pack: Callable[..., None]
    unpack: Callable[..., None]
    forward: Callable[..., None]
    backward: Callable[..., None]


def kernels(head_dim: int, value_dim: int, bits: int, lanes: int) -> Kernels:
    """Those for queries and keys of `head_dim` numbers and values of `value_dim`."""
    of_keys = steps_of_rows(head_dim, bits, lanes)
    of_values = steps_of_rows(value_dim, bits, lanes)
    key_dots, key_sums, spread_keys = of_keys.dots, of_keys.weighted, of_keys.spread
    value_dots, value_sums, spread_values = of_values.dots, of_values.weighted, of_values.spread
    copy_key, add_key, copy_value, add_value = (
        *(of_keys.copy, of_keys.add),
        *(of_values.copy, of_values.add),
    )
    value_dot, value_sum = of_values.dot, of_values.sum
    maximum, soften, differentiate, read, write = steps_of_weights(bits, lanes)
    key_size, value_size = (-(-dim // lanes) * lanes for dim in (head_dim, value_dim))
    itemsize = bits // 8
    key_bytes, value_bytes = key_size * itemsize, value_size * itemsize
    number = np.dtype(f"f{itemsize}").type
    low, zero, one = number(-np.inf), number(0), number(1)

    def named(function):  # type: ignore[no-untyped-def]
        """`function`, called after the sizes that are compiled into it.

        Where two processes keep code of different sizes, a third one that loads both would take one
        for the other by Numba's name, which is that of the function and a number that every process
        counts anew.
        """
        name = f"{function.__name__}_{head_dim}_{value_dim}_{bits}"
        function.__name__ = function.__qualname__ = name
        return function

    @numba.njit(inline="always")
    def row(address, strides, a, b, c, h):  # type: ignore[no-untyped-def]
        """Where a token's row is."""
        index = a * strides[0] + b * strides[1] + c * strides[2] + h * strides[3]
        return address + itemsize * index

    @numba.njit(inline="always")
    def padded(n):  # type: ignore[no-untyped-def]
        """The numbers of as many whole vectors as hold `n`."""
        return (n + (lanes - 1)) & -lanes

    @numba.njit(inline="always")
    def is_finite(output):  # type: ignore[no-untyped-def]
        total = value_sum(output)
        return total - total == 0

    @numba.njit(**OPTIONS)
    @named
    def find_places(key_places, value_places, counts, steps, sizes):  # type: ignore[no-untyped-def]
        """Where the rows of a window's keys are, from the first one; returns their number."""
        n = 0
        for a in range(counts[0]):
            for b in range(counts[1]):
                for c in range(counts[2]):
                    token = (a * steps[0] * sizes[1] + b * steps[1]) * sizes[2] + c * steps[2]
                    key_places[n] = token * key_size
                    value_places[n] = token * value_size
                    n += 1
        key_places[n : padded(n)] = 0
        value_places[n : padded(n)] = 0
        return n

    @numba.njit(inline="always")
    def logits_of(query, keys, places, n, scale, out):  # type: ignore[no-untyped-def]
        """Those of a query and `n` keys; -inf behind them."""
        for j in range(0, n, lanes):
            key_dots(query, keys, places, j, scale, out)
        for j in range(n, padded(n)):
            write(low, out, j)

    @named
    def pack(  # type: ignore[no-untyped-def]
        key, key_strides, value, value_strides, sizes, heads, keys, values
    ):
        """Copy rows at `key` to ``keys[heads, tokens, size]``, and the same of values."""
        for h, a, b, c in np.ndindex((heads, sizes[0], sizes[1], sizes[2])):
            copy_key(row(key, key_strides, a, b, c, h), keys)
            copy_value(row(value, value_strides, a, b, c, h), values)
            keys += key_bytes
            values += value_bytes

    @named
    def unpack(  # type: ignore[no-untyped-def]
        key, key_strides, value, value_strides, sizes, heads, keys, values
    ):
        """The opposite, adding to what is there."""
        for h, a, b, c in np.ndindex((heads, sizes[0], sizes[1], sizes[2])):
            add_key(keys, row(key, key_strides, a, b, c, h))
            add_value(values, row(value, value_strides, a, b, c, h))
            keys += key_bytes
            values += value_bytes

    @named
    def forward(  # type: ignore[no-untyped-def]
        query, query_strides, keys, values, output, output_strides, lse, lse_strides,
        begins, counts, steps, sizes, heads, group_size, scale,
    ):  # fmt: skip
        (begin_a, begin_b, begin_c), (count_a, count_b, count_c) = begins, counts
        most = padded(count_a.max() * count_b.max() * count_c.max())
        key_places, value_places = np.zeros(most, np.int64), np.zeros(most, np.int64)
        weights = np.zeros(most, number)
        at_keys, at_values = key_places.ctypes.data, value_places.ctypes.data
        at_weights = weights.ctypes.data
        tokens = sizes[0] * sizes[1] * sizes[2]
        known, n = (-1, -1, -1), 0
        for h in range(heads):
            for a in range(len(begin_a)):
                for b in range(len(begin_b)):
                    for c in range(len(begin_c)):
                        seen = count_a[a], count_b[b], count_c[c]
                        if seen != known:
                            known = seen
                            n = find_places(key_places, value_places, seen, steps, sizes)
                        line = begin_a[a] * sizes[1] + begin_b[b]
                        first = h * tokens + line * sizes[2] + begin_c[c]
                        some_keys = keys + first * key_bytes
                        some_values = values + first * value_bytes
                        for head in range(h * group_size, (h + 1) * group_size):
                            of_query = row(query, query_strides, a, b, c, head)
                            out = row(output, output_strides, a, b, c, head)
                            logits_of(of_query, some_keys, at_keys, n, scale, at_weights)
                            shift = zero
                            total = soften(at_weights, n, shift)
                            factor = one / total
                            value_sums(at_weights, some_values, at_values, n, factor, out)
                            if not LOWEST_SUM <= total <= HIGHEST_SUM or not is_finite(out):
                                logits_of(of_query, some_keys, at_keys, n, scale, at_weights)
                                shift = maximum(at_weights, n)
                                if shift == low:
                                    shift = zero
                                total = soften(at_weights, n, shift)
                                factor = one if total == 0 else one / total
                                value_sums(at_weights, some_values, at_values, n, factor, out)
                            if lse != 0:
                                result = number(np.log(total)) + shift
                                write(result, row(lse, lse_strides, a, b, c, head), 0)

    @named
    def backward(  # type: ignore[no-untyped-def]
        query, query_strides, keys, values, output, output_strides, lse, lse_strides,
        grad_output, grad_output_strides, grad_lse, grad_lse_strides,
        grad_query, grad_query_strides, grad_keys, grad_values,
        begins, counts, steps, sizes, heads, group_size, scale,
    ):  # fmt: skip
        (begin_a, begin_b, begin_c), (count_a, count_b, count_c) = begins, counts
        most = padded(count_a.max() * count_b.max() * count_c.max())
        key_places, value_places = np.zeros(most, np.int64), np.zeros(most, np.int64)
        weights, gradients = np.zeros(most, number), np.zeros(most, number)
        at_keys, at_values = key_places.ctypes.data, value_places.ctypes.data
        at_weights, at_gradients = weights.ctypes.data, gradients.ctypes.data
        tokens = sizes[0] * sizes[1] * sizes[2]
        known, n = (-1, -1, -1), 0
        for h in range(heads):
            for a in range(len(begin_a)):
                for b in range(len(begin_b)):
                    for c in range(len(begin_c)):
                        seen = count_a[a], count_b[b], count_c[c]
                        if seen != known:
                            known = seen
                            n = find_places(key_places, value_places, seen, steps, sizes)
                        line = begin_a[a] * sizes[1] + begin_b[b]
                        first = h * tokens + line * sizes[2] + begin_c[c]
                        key, value = first * key_bytes, first * value_bytes
                        for head in range(h * group_size, (h + 1) * group_size):
                            of_query = row(query, query_strides, a, b, c, head)
                            of_grad = row(grad_output, grad_output_strides, a, b, c, head)
                            of_out = row(output, output_strides, a, b, c, head)
                            delta = value_dot(of_grad, of_out)
                            if grad_lse != 0:
                                delta -= read(row(grad_lse, grad_lse_strides, a, b, c, head), 0)
                            shift = read(row(lse, lse_strides, a, b, c, head), 0)
                            if shift == low:
                                shift = zero
                            logits_of(of_query, keys + key, at_keys, n, scale, at_weights)
                            soften(at_weights, n, shift)
                            spread_values(at_weights, of_grad, grad_values + value, at_values, n)
                            for j in range(0, n, lanes):
                                value_dots(of_grad, values + value, at_values, j, one, at_gradients)
                            differentiate(at_weights, at_gradients, n, delta, scale)
                            out = row(grad_query, grad_query_strides, a, b, c, head)
                            key_sums(at_gradients, keys + key, at_keys, n, one, out)
                            spread_keys(at_gradients, of_query, grad_keys + key, at_keys, n)

    return Kernels(pack, unpack, forward, backward)


def _signature(parameters: str) -> Callable[[int], tuple[Any, ...]]:
    """Types of arguments: addresses, strides (4), triples and their arrays, numbers."""

    def of_bits(bits: int) -> tuple[Any, ...]:
        integer = numba.int64
        kinds = {
            "i": integer,
            "s": numba.types.UniTuple(integer, 4),
            "t": numba.types.UniTuple(integer, 3),
            "w": numba.types.UniTuple(numba.types.Array(integer, 1, "C"), 3),
            "x": {32: numba.float32, 64: numba.float64}[bits],
        }
        return tuple(kinds[parameter] for parameter in parameters)

    return of_bits


SIGNATURES = {
    "pack": _signature("isistiii"),
    "unpack": _signature("isistiii"),
    "forward": _signature("isiiisiswwttiix"),
    "backward": _signature("isiiisisisisisiiwwttiix"),
}
"""By the name of a kernel, the types of its arguments for numbers of so many bits."""
