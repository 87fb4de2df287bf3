"""How TMA is to see the arrays of a problem, and which arrays it cannot see.

TMA knows arrays of up to five axes: an innermost one of contiguous elements, and four with strides
that are positive multiples of 16 bytes. Along up to two token axes these are (dim, last token axis,
first token axis, head, batch). Three token axes leave none for the heads: where neighboring heads
are neighbors in memory they are folded into the dimensions, else into the batch.
"""

from __future__ import annotations

from typing import NamedTuple

from cuneigh._backends.hopper.plan import LINE, span
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.boxes import Box
from cuneigh._gpu.tensor_map import TensorMap
from cuneigh._problem import Problem

ALIGNMENT = 16
LONGEST_STRIDE = 1 << 40
"""Strides, in bytes, are shorter."""


class Folding(NamedTuple):
    """`Folding` of cuda/hopper/tile.cuh."""

    dim: int
    outer: int
    batch: int


def unreadable(name: str, array: Array, rank: int) -> str | None:
    """Why TMA cannot read `array`, whose token axes are `rank`; None when it can."""
    if array.misalignment:
        return f"needs {name} at an address that is a multiple of {ALIGNMENT}"
    if array.strides[-1] != 1:
        return f"needs head vectors of {name} to be contiguous"
    outer = list(zip(array.shape, array.byte_strides, strict=True))[:-1]
    for axis, (length, stride) in enumerate(outer):
        legal = 0 < stride < LONGEST_STRIDE and stride % ALIGNMENT == 0
        if length > 1 and not legal:
            return (
                f"needs strides of {name} that are positive multiples of {ALIGNMENT} bytes, "
                f"not {stride} along axis {axis}"
            )
    if rank == 3 and _folding(array) is None:
        return (
            f"needs {name} with heads that are neighbors in memory and of a multiple of 16 "
            "elements, or a batch whose stride is that of its heads times their number"
        )
    return None


def differently_folded(array: Array, tangent: Array) -> bool:
    """Whether the coordinates of a head differ in two readable arrays with three token axes."""
    return _folding(array) != _folding(tangent)


def map_of_tokens(problem: Problem, array: Array, box: Box) -> tuple[TensorMap, Folding]:
    """The map of an array [batch, x1..xr, heads, dim], of which boxes of tokens are loaded."""
    batch, *tokens, heads, dim = array.shape
    of_batch, *of_tokens, of_heads, _ = array.byte_strides
    dims, strides, spans, steps = [], [], [], []
    for length, stride, extent, axis in reversed(
        list(zip(tokens, of_tokens, box, problem.axes, strict=True))
    ):
        dims.append(length)
        strides.append(stride)
        spans.append(span(extent, axis.dilation))
        steps.append(axis.dilation)
    folding = Folding(0, 0, 0)
    if problem.rank == 3:
        found = _folding(array)
        assert found is not None, "`unreadable` refuses such arrays"
        folding = found
        if folding.dim:
            dim *= heads
            dims.append(batch)
            strides.append(of_batch)
        else:
            dims.append(batch * heads)
            strides.append(of_heads if heads > 1 else of_batch)
    else:
        missing = 2 - problem.rank
        dims += [1] * missing + [heads, batch]
        strides += [ALIGNMENT] * missing + [of_heads, of_batch]
    return _map(array, (dim, *dims), strides, spans, steps), folding


def map_of_additional(array: Array, keys: int) -> TensorMap:
    """The map of additional keys or values [batch, n, heads, dim], `keys` of them a box."""
    batch, n, heads, dim = array.shape
    of_batch, of_n, of_heads, _ = array.byte_strides
    return _map(array, (dim, n, 1, heads, batch), [of_n, ALIGNMENT, of_heads, of_batch], [keys], [])


def _map(
    array: Array, dims: tuple[int, ...], strides: list[int], spans: list[int], steps: list[int]
) -> TensorMap:
    """A map with lines of a head vector; axes without a span or a step have those of 1."""
    return TensorMap(
        array.pointer,
        array.dtype,
        dims,
        # The stride of an axis with one index is never taken, but must be legal
        tuple(
            stride if length > 1 else ALIGNMENT
            for length, stride in zip(dims[1:], strides, strict=True)
        ),
        (LINE, *spans, *(1,) * (4 - len(spans))),
        (1, *steps, *(1,) * (4 - len(steps))),
        swizzle=128,
    )


def _folding(array: Array) -> Folding | None:
    """Where the heads of an array with three token axes go; None if there is no room for them."""
    batch, heads, dim = array.shape[0], array.shape[-2], array.shape[-1]
    of_batch, of_heads = array.strides[0], array.strides[-2]
    if batch == 1 or heads == 1 or of_batch == heads * of_heads:
        return Folding(0, 1, heads)
    # A line may then hold the beginning of the next head, which the products must not reach
    if of_heads == dim and dim % 16 == 0:
        return Folding(dim, 0, 1)
    return None
