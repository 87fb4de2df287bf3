"""Where TMA brings stages and rows in place of copies, and how it sees the arrays.

Boxes are what cuda/fused/small/boxes.cuh describes. TMA knows arrays of up to five axes: (dim, last
token axis, first token axis, head, batch). Three token axes leave none for the heads, which then
must be neighbors in memory and are folded into the dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from cuneigh._gpu.arrays import Array
from cuneigh._gpu.boxes import Box
from cuneigh._gpu.passes import DKV, DQ, FORWARD, Pass
from cuneigh._gpu.records import has_parts
from cuneigh._gpu.tensor_map import TensorMap
from cuneigh._problem import Problem

DIMS = (32, 64)
"""Head dimensions whose vectors a line of shared memory holds."""
ALIGNMENT = 1024
"""`kBoxAlignment` of cuda/fused/small/smem.cuh."""
LONGEST_SPAN, LARGEST_STEP = 256, 8
"""Elements that a box may span along an axis, and every how many-th of them it may take."""
PHASES = 8
"""Columns that follow each other in a tile and lie in different banks."""
LONGEST_STRIDE = 1 << 40
"""Strides, in bytes, are shorter."""
UNIT = 16
"""Bytes that all strides are multiples of, and the stride of an axis with one index."""


def takes(problem: Problem, capability: tuple[int, int], pass_: Pass) -> bool:
    """Whether there is a kernel that has TMA bring stages.

    Only of sm_90, where it was measured.
    """
    return (
        capability == (9, 0)
        and pass_ in (FORWARD, DQ, DKV)
        and problem.head_dim == problem.value_dim
        and problem.head_dim in DIMS
        and not has_parts(problem)
    )


def padded_stage(tile: Box, stage: Box) -> Box:
    """A stage with as many columns between those of a tile, modulo 8, as there are in the tile.

    So the phases of columns that follow each other in the tile follow each other, too.
    """
    padded: list[int] = []
    for axis in range(len(tile) - 1, 0, -1):
        size = stage[axis]
        while (math.prod(padded) * size - math.prod(tile[axis:])) % PHASES:
            size += 1
        padded.insert(0, size)
    return (stage[0], *padded)


def fits(problem: Problem, box: Box) -> bool:
    """Whether TMA can bring a box of tokens at once."""
    return all(
        axis.dilation <= LARGEST_STEP and span(extent, axis.dilation) <= LONGEST_SPAN
        for extent, axis in zip(box, problem.axes, strict=True)
    )


def span(extent: int, dilation: int) -> int:
    """Tokens from the first to the last of `extent` tokens of a dilation group."""
    return (extent - 1) * dilation + 1


def vo_offset(problem: Problem, stage: Box) -> int:
    """Bytes of the qk vectors of a stage; as many are those of its vo vectors."""
    return math.ceil(math.prod(stage) * 2 * problem.head_dim / ALIGNMENT) * ALIGNMENT


def pitches(problem: Problem, inner: Literal["heads", "batch"]) -> tuple[int, int]:
    """`head_pitch` and `batch_pitch` of cuda/fused/small/problem.cuh.

    Where blocks go along the heads, kernels take these for the batch.
    """
    if problem.rank < 3:
        return 0, 0
    return (0, problem.head_dim) if inner == "heads" else (problem.head_dim, 0)


def can_read(array: Array) -> bool:
    """Whether TMA can read an array [batch, x1..xr, heads, dim] whose strides copies can read."""
    *outer, dim = array.shape
    heads, rank = array.shape[-2], len(array.shape) - 3
    if rank == 3 and heads > 1 and array.strides[-2] != dim:
        return False
    strides = zip(outer, array.byte_strides[:-1], strict=True)
    return all(length == 1 or 0 < stride < LONGEST_STRIDE for length, stride in strides)


def map_of(
    problem: Problem, array: Array, box: Sequence[int], inner: Literal["heads", "batch"]
) -> TensorMap:
    """The map of an array [batch, x1..xr, heads, dim], of which boxes of tokens are loaded."""
    batch, *tokens, heads, dim = array.shape
    of_batch, *of_tokens, of_heads, _ = array.byte_strides
    axes = list(zip(tokens, of_tokens, box, problem.axes, strict=True))[::-1]
    lengths = [length for length, *_ in axes]
    strides = [stride for _, stride, *_ in axes]
    spans = [span(extent, axis.dilation) for _, _, extent, axis in axes]
    steps = [axis.dilation for *_, axis in axes]
    missing = 2 - problem.rank
    if missing < 0:
        dims, strides = [dim * heads, *lengths, batch], [*strides, of_batch]
    else:
        outer = [(heads, of_heads), (batch, of_batch)][:: -1 if inner == "heads" else 1]
        dims = [dim, *lengths, *[1] * missing, *(length for length, _ in outer)]
        strides = [*strides, *[UNIT] * missing, *(stride for _, stride in outer)]
    rest = [1] * (4 - len(axes))
    return TensorMap(
        array.pointer,
        array.dtype,
        tuple(dims),
        # The stride of an axis with one index is never taken, but must be legal
        tuple(s if n > 1 else UNIT for n, s in zip(dims[1:], strides, strict=True)),
        (dim, *spans, *rest),
        (1, *steps, *rest),
        swizzle=64 if dim == 32 else 128,
    )
