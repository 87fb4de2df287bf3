"""Exact counts of boxes along an axis: those of a long axis follow from those of short ones."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_window import parts

from cuneigh._gpu import boxes
from cuneigh._gpu.boxes import count_unions, count_walk
from cuneigh._gpu.passes import BACKWARD, DKV, DQ, FORWARD
from cuneigh._window import Axis, Promise


@st.composite
def axes(draw) -> Axis:
    dilation = draw(st.integers(1, 4))
    length = draw(st.integers(dilation, 3000))
    kernel_size = draw(st.integers(1, min(40, length // dilation)))
    stride = draw(st.integers(1, kernel_size))
    return Axis(length, length, kernel_size, stride, dilation, draw(st.booleans()))


@given(
    axis=axes(),
    warp_box=st.integers(1, 16),
    warps=st.integers(1, 4),
    column_box=st.sampled_from((1, 2, 3, 8, 64)),
    pass_=st.sampled_from((FORWARD, DQ, DKV, BACKWARD)),
    is_last=st.booleans(),
)
def test_counts_are_those_of_box_by_box(axis, warp_box, warps, column_box, pass_, is_last):
    walk = axis, warp_box, warps, column_box, pass_, is_last
    unions = axis, warp_box, warps, pass_
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        for long_axis in (0, 1 << 62):
            patch.setattr(boxes, "LONG_AXIS", long_axis)
            counts.append((count_walk.__wrapped__(*walk), count_unions.__wrapped__(*unions)))
    assert counts[0] == counts[1]


def test_an_axis_that_is_long_takes_no_longer():
    start = time.process_time()
    counts = count_walk(Axis(10**9, 10**9, 501, 1, 1, False), 1, 3, 1)
    assert counts.blocks == -(-(10**9) // 3)
    assert time.process_time() - start < 0.5


@given(
    axis=parts(),
    starts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    box=st.integers(1, 16),
    warps=st.integers(1, 4),
    pass_=st.sampled_from((FORWARD, DKV)),
)
def test_what_is_counted_for_parts_holds_wherever_they_start(axis, starts, box, warps, pass_):
    """Of ranges that are not unrolled: what a plan for small windows has room for."""
    planned = axis.anywhere()
    ends = (axis.layout - axis.length, axis.layout - axis.key_length)
    there = axis
    if axis.border != "wrap":
        there = axis.at(*(min(start, end) for start, end in zip(starts, ends, strict=True)))
    if there.anywhere() != planned or Promise.INSIDE not in there.promises or not axis.length:
        return
    counts = count_unions(planned, box, warps, pass_)
    rows, window = pass_.group_length, pass_.window(there)
    blocks = 0
    for group in range(there.dilation):
        length = rows(there, group)
        for size, widest in ((box, counts.widest_warp), (box * warps, counts.widest_block)):
            for first in range(0, length, size):
                last = min(first + size, length) - 1
                begin, end = window(first, group)[0], window(last, group)[1]
                assert end - begin <= widest, there
                blocks += size == box * warps
    assert blocks == (counts.blocks if warps > 1 else 2 * counts.blocks)
