"""How the keys and values of a slab are copied to where kernels read them, and gradients back.

They are laid out head by head, so that the rows of a run follow each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

from cuneigh._backends.cpu.compiled.steps import steps_of_rows
from cuneigh._problem import DTYPES, SUPPORTED


def renamed(function: Callable[..., Any], *compiled_in: object) -> Callable[..., Any]:
    """`function`, called after what is compiled into it.

    Where two processes keep code of different sizes, a third one that loads both would take one for
    the other by Numba's name, which is that of the function and a number that every process counts
    anew.
    """
    name = "_".join(map(str, (function.__name__, *compiled_in)))
    function.__name__ = function.__qualname__ = name
    return function


@numba.njit(inline="always")
def row(address, size, strides, a, b, c, h):  # type: ignore[no-untyped-def]
    """Where a row is, in an array of numbers of `size` bytes."""
    return address + size * (a * strides[0] + b * strides[1] + c * strides[2] + h * strides[3])


def copies(
    head_dim: int, value_dim: int, dtype: str, lanes: int
) -> tuple[Callable[..., None], Callable[..., None]]:
    """`pack` and `unpack`, for keys of `head_dim` numbers and values of `value_dim`."""
    stored, itemsize = DTYPES[dtype], DTYPES[SUPPORTED[dtype].accumulator]
    of_keys, of_values = (
        steps_of_rows(dim, 8 * itemsize, lanes, dtype, 1) for dim in (head_dim, value_dim)
    )
    read_key, read_value = of_keys.read, of_values.read
    add_key, add_value = of_keys.add, of_values.add
    key_bytes, value_bytes = head_dim * itemsize, value_dim * itemsize

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        return renamed(function, head_dim, value_dim, dtype, lanes)

    @named
    def pack(  # type: ignore[no-untyped-def]
        key, key_strides, value, value_strides, orders, heads, keys, values
    ):
        """Copy the rows at these places along each axis to ``keys[heads, tokens, dim]``."""
        order_a, order_b, order_c = orders
        tokens, token = len(order_a) * len(order_b) * len(order_c), 0
        for a in order_a:
            for b in order_b:
                for c in order_c:
                    for h in range(heads):
                        to = h * tokens + token
                        read_key(row(key, stored, key_strides, a, b, c, h), keys + to * key_bytes)
                        read_value(
                            row(value, stored, value_strides, a, b, c, h), values + to * value_bytes
                        )
                    token += 1

    @named
    def unpack(  # type: ignore[no-untyped-def]
        key, key_strides, value, value_strides, orders, heads, keys, values
    ):
        """The opposite, adding to what is there, which is of the accumulator's dtype."""
        order_a, order_b, order_c = orders
        tokens, token = len(order_a) * len(order_b) * len(order_c), 0
        for a in order_a:
            for b in order_b:
                for c in order_c:
                    for h in range(heads):
                        of = h * tokens + token
                        to = row(key, itemsize, key_strides, a, b, c, h)
                        add_key(keys + of * key_bytes, to)
                        to = row(value, itemsize, value_strides, a, b, c, h)
                        add_value(values + of * value_bytes, to)
                    token += 1

    return pack, unpack
