"""How TMA sees the arrays of a problem: a model of its loads, and what it cannot load."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.hopper import ALL_DIMS, plans, supported
from hypothesis import given
from hypothesis import strategies as st

from cuneigh._backends.hopper.launch import _piece, _record
from cuneigh._backends.hopper.plan import LINE, ROWS, Division, padded, width
from cuneigh._backends.hopper.tensor_maps import (
    map_of_additional,
    map_of_tokens,
    unreadable,
)
from cuneigh._gpu.arrays import Array, Pointer, contiguous
from cuneigh._gpu.passes import FORWARD

NOTHING = -1
"""Stands for the zeros that TMA reads outside of an array."""


def load_box(tensor_map, at):
    """What cp.async.bulk.tensor reads for a box at these coordinates: [tokens, line] offsets.

    They count bytes from the address of the map.
    """
    described = (tensor_map.dims, tensor_map.box, tensor_map.element_strides)
    strides = (2, *tensor_map.strides)
    offset, is_inside = np.zeros((), int), np.ones((), bool)
    for dim, span, step, stride, c in zip(*described, strides, at, strict=True):
        index = c + np.arange(0, span, step)  # of the innermost axis first
        offset = np.add.outer(index * stride, offset)
        is_inside = np.logical_and.outer((index >= 0) & (index < dim), is_inside)
    return np.where(is_inside, offset, NOTHING).reshape(-1, tensor_map.box[0])


def assert_legal(tensor_map):
    """What cuTensorMapEncodeTiled asks for."""
    assert len(tensor_map.dims) == len(tensor_map.box) == len(tensor_map.element_strides) == 5
    assert len(tensor_map.strides) == 4
    assert all(1 <= dim <= 2**32 for dim in tensor_map.dims)
    assert all(0 < stride < 2**40 and stride % 16 == 0 for stride in tensor_map.strides)
    assert all(1 <= span <= 256 for span in tensor_map.box)
    assert all(1 <= step <= 8 for step in tensor_map.element_strides)
    assert tensor_map.box[0] * 2 <= tensor_map.swizzle == 128


def coordinates(rank, folding, batch, head, token):
    """`Coordinates` of cuda/hopper/producers.cuh."""
    if rank == 3:
        outer = batch * folding.batch + head * folding.outer
        return [head * folding.dim, token[2], token[1], token[0], outer]
    return [0, token[-1], token[0] if rank == 2 else 0, head, batch]


def load_tokens(tensor_map, at, rank, pieces, lines):
    """`load_tokens` of cuda/hopper/producers.cuh: [tokens, lines * 64] offsets."""
    count, rows, tokens = map(int, pieces)
    loaded = []
    for piece in range(count):
        here = list(at)
        here[rank] += piece * tokens
        of_lines = []
        for _ in range(lines):
            of_lines.append(load_box(tensor_map, here))
            here[0] += LINE
        assert all(len(line) == rows for line in of_lines)
        assert rows % 8 == 0, "a piece begins where the pattern of the swizzle does"
        loaded.append(np.hstack(of_lines))
    return np.vstack(loaded)


def offsets_of(array, batch, head, tokens, columns):
    """The same by the strides of an array, for `tokens` [n, rank]."""
    of_batch, *of_tokens, of_heads, of_dim = array.byte_strides
    start = batch * of_batch + head * of_heads + (tokens * of_tokens).sum(-1)
    offsets = start[:, None] + np.arange(columns) * of_dim
    exists = ((tokens >= 0) & (tokens < array.shape[1:-2])).all(-1)
    exists = exists[:, None] & (np.arange(columns) < array.shape[-1])
    return np.where(exists, offsets, NOTHING)


@st.composite
def laid_out(draw, shape):
    """An array whose axes lie in any order in memory, most of them further apart than need be."""
    order = draw(
        st.sampled_from(["heads last", "heads first"]).map(
            lambda name: (
                [*range(len(shape))]
                if name == "heads last"
                else [0, len(shape) - 2, *range(1, len(shape) - 2), len(shape) - 1]
            )
        )
        | st.permutations(range(len(shape) - 1)).map(lambda order: [*order, len(shape) - 1])
    )
    strides, next_stride = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = next_stride
        next_stride *= shape[axis]
        if draw(st.integers(0, 3)) == 0:  # a slice of something wider
            next_stride += 8 * draw(st.integers(1, 3))
    return Array(Pointer(0), shape, "bfloat16", tuple(strides), 0)


@given(problem=supported(most_tokens=1000, dims=ALL_DIMS), data=st.data())
def test_a_box_holds_the_tokens_at_its_coordinates(problem, data):
    plan = data.draw(st.sampled_from(plans(problem)))
    of_query = data.draw(st.booleans())
    name, side = ("query", "row") if of_query else ("key", "column")
    box = getattr(plan, f"{side}_box")
    shape = getattr(problem.specs, name).shape
    array = data.draw(laid_out(shape))
    reason = unreadable(name, array, problem.rank)
    if reason is not None:
        assert problem.rank == 3, reason
        assert array.strides[0] != array.shape[-2] * array.strides[-2]
        return
    tensor_map, folding = map_of_tokens(problem, array, _piece(problem, box))
    assert_legal(tensor_map)
    batch, head = (data.draw(st.integers(0, shape[axis] - 1)) for axis in (0, -2))
    token = [data.draw(st.integers(0, n + 300)) for n in shape[1:-2]]
    pieces = _record(problem, plan, FORWARD, Division(1, 1, 1), [folding] * 4)[f"{side}_pieces"][0]
    at = coordinates(problem.rank, folding, batch, head, token)
    lines = math.ceil(padded(problem.head_dim) / LINE)
    loaded = load_tokens(tensor_map, at, problem.rank, pieces, lines)
    assert loaded.shape == (ROWS if of_query else plan.form.columns, lines * LINE)
    inside = np.array(list(itertools.product(*map(range, box))))
    tokens = inside * [axis.dilation for axis in problem.axes] + token
    columns = padded(problem.head_dim)  # the products reach no further
    wanted = offsets_of(array, batch, head, tokens, columns)
    np.testing.assert_array_equal(loaded[:, :columns], wanted)


@given(problem=supported(dims=ALL_DIMS), n=st.integers(1, 300), data=st.data())
def test_a_box_of_additional_values_begins_anywhere(problem, n, data):
    array = data.draw(laid_out((problem.batch, n, problem.kv_heads, problem.value_dim)))
    assert unreadable("additional_values", array, 1) is None
    keys = data.draw(st.sampled_from([64, 128]))
    tensor_map = map_of_additional(array, keys)
    assert_legal(tensor_map)
    first = data.draw(st.integers(0, n))
    batch, head = (data.draw(st.integers(0, array.shape[axis] - 1)) for axis in (0, -2))
    lines = math.ceil(width(problem.value_dim) / LINE)
    at = coordinates(1, None, batch, head, [first])
    loaded = load_tokens(tensor_map, at, 1, (1, keys, 0), lines)
    tokens = np.arange(first, first + keys)[:, None]
    wanted = offsets_of(array, batch, head, tokens, lines * LINE)
    np.testing.assert_array_equal(loaded, wanted)


# What TMA cannot load

SHAPE = (2, 10, 12, 4, 64)
PLAIN = Array(Pointer(0), SHAPE, "float16", contiguous(SHAPE), 0)


def with_stride(axis, stride):
    strides = [*PLAIN.strides]
    strides[axis] = stride
    return replace(PLAIN, strides=tuple(strides))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (replace(PLAIN, misalignment=2), "at an address that is a multiple of 16"),
        (replace(PLAIN, misalignment=8), "at an address that is a multiple of 16"),
        (with_stride(-1, 2), "head vectors of value to be contiguous"),
        (with_stride(-1, -1), "head vectors of value to be contiguous"),
        (with_stride(-1, 0), "head vectors of value to be contiguous"),
        (with_stride(-2, 65), "multiples of 16 bytes, not 130 along axis 3"),
        (with_stride(2, 260), "multiples of 16 bytes, not 520 along axis 2"),
        (with_stride(1, 0), "positive multiples of 16 bytes, not 0 along axis 1"),
        (with_stride(0, -8), "positive multiples of 16 bytes, not -16 along axis 0"),
        (with_stride(0, 1 << 39), r"not 1099511627776 along axis 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused_by_its_name(array, reason):
    told = unreadable("value", array, 2)
    assert told is not None
    assert reason in told
    assert "value" in told


def test_what_can_be_loaded_is_not_refused():
    assert unreadable("value", PLAIN, 2) is None
    assert unreadable("value", with_stride(0, (1 << 39) - 8), 2) is None
    # The stride of an axis with one index is never taken
    one = replace(with_stride(0, 3), shape=(1, *SHAPE[1:]))
    assert unreadable("value", one, 2) is None


VIDEO = (2, 4, 5, 6, 3, 64)


@pytest.mark.parametrize(
    ("shape", "order", "is_readable"),
    [
        (VIDEO, "btttHD", True),  # heads are neighbors: folded into the dimensions
        (VIDEO, "bHtttD", True),  # heads first: folded into the batch
        (VIDEO, "btHttD", False),
        (VIDEO, "HbtttD", False),
        ((1, *VIDEO[1:]), "btHttD", True),
        ((*VIDEO[:4], 1, 64), "btHttD", True),
        ((*VIDEO[:-1], 72), "bHtttD", True),
        ((*VIDEO[:-1], 72), "btttHD", False),  # a line may hold the next head's first elements
    ],
)
def test_three_axes_leave_none_for_heads(shape, order, is_readable):
    places = {"b": [0], "t": [1, 2, 3], "H": [4], "D": [5]}
    axes = [places[letter].pop(0) for letter in order]
    strides, stride = [0] * 6, 1
    for axis in reversed(axes):
        strides[axis] = stride
        stride *= shape[axis]
    reason = unreadable("key", Array(Pointer(0), shape, "float16", tuple(strides), 0), 3)
    if is_readable:
        assert reason is None
    else:
        assert reason is not None
        assert "needs key with heads that are neighbors" in reason
