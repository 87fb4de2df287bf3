"""Boxes of rows and columns: their shapes, and exact counts of what is in the windows of a box.

`passes` says what rows and columns are. The window union of a box of rows holds the columns that
lie in the window of at least one of its rows. By the contract of windows (`cuneigh._window`) it is
one range along each axis, from the begin of the first row's window to the end of the last row's.

All of that is separable: what is counted along each axis multiplies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from cuneigh._gpu.passes import FORWARD, Pass
from cuneigh._window import Axis

Indices = npt.NDArray[np.int64]
Box = tuple[int, ...]
"""Tokens along each axis."""
Value = TypeVar("Value")


Windows = Callable[[Indices], tuple[Indices, Indices]]
"""Begins and ends of the windows of some rows of a dilation group, by their index in it."""


def groups_of(axis: Axis, pass_: Pass) -> Iterator[tuple[int, int, Windows]]:
    """How many dilation groups have a length, that length in rows, and the windows of rows.

    Groups have one of two lengths, and all groups of a length are alike.
    """
    longer = pass_.length(axis) % axis.dilation
    for group, groups in ((0, longer), (longer, axis.dilation - longer)):
        length = pass_.group_length(axis, group)
        if groups and length:
            yield groups, length, partial(_windows, pass_.window(axis), group)


def _windows(
    window: Callable[[Any, Any], tuple[Indices, Indices]], group: int, index: Indices
) -> tuple[Indices, Indices]:
    return window(index, np.full_like(index, group))


def ends_of_boxes(length: int, size: int) -> tuple[Indices, Indices]:
    """The first and the last row of each box of `size` among `length` rows."""
    first = np.arange(0, length, size, dtype=np.int64)
    return first, np.minimum(first + size, length) - 1


class WalkCounts(NamedTuple):
    """What blocks walk over, along one axis or in a whole layout.

    A block takes a box of rows, of which each warp (or warpgroup) has a part, and walks over boxes
    of columns that cover its window union: from its begin on, or from a bit before (`Pass.adds`).
    """

    blocks: int
    """Boxes of rows."""
    loads: int
    """Pairs of a block and a box of columns that it loads."""
    visits: int
    """Pairs of a warp and a box of columns that it does not skip."""
    full: int
    """Visits in which every column lies in the window of every row; in others some are masked.

    If `Pass.adds`, only those of warps whose rows all exist.
    """
    longest: int
    """Boxes of columns of the longest walk."""


LONG_AXIS = 8192
"""Tokens of an axis from which on two short counts take less time than one of all boxes."""


GRANULE = 8
"""Columns, side by side along the last axis, whose sums lie together (`Pass.adds`)."""


def last_of(rank: int) -> list[bool]:
    """Of each axis, whether it is the last one."""
    return [r == rank - 1 for r in range(rank)]


def granule_lead(axis: Axis, tile: int, pass_: Pass) -> int:
    """How many columns the first granule along the last axis begins before the first column.

    So many that the window union of a `tile` of rows far from the borders begins with a granule.
    """
    middle = pass_.length(axis) // 2 // tile * tile
    begin, _ = pass_.window(axis)(middle, 0)
    return int(-begin % GRANULE)


@lru_cache(maxsize=8192)
def count_walk(
    axis: Axis,
    warp_box: int,
    warps: int,
    column_box: int,
    pass_: Pass = FORWARD,
    is_last: bool = False,
) -> WalkCounts:
    """The counts along one axis, by the kernels' own rules; `is_last` tells the last axis."""
    granule, lead = 1, 0
    if pass_.adds and is_last:
        granule, lead = GRANULE, granule_lead(axis, warp_box * warps, pass_)

    def count(axis: Axis) -> WalkCounts:
        return _count_walk(axis, warp_box, warps, column_box, pass_, granule, lead)

    return WalkCounts(*_count_repeated(axis, math.lcm(warp_box * warps, granule), count))


def _count_repeated(
    axis: Axis, size: int, count: Callable[[Axis], tuple[int, ...]]
) -> tuple[int, ...]:
    """`count(axis)`, for a count of boxes of `size` rows, in a time that grows with the window.

    Far from the borders everything repeats after as many rows as boxes and strides have in common.
    So a long axis has the counts of a short one, and for every repetition that this one lacks as
    much again as one repetition more adds to it.
    """
    period = math.lcm(size, axis.stride)
    repetitions = (axis.length // axis.dilation - 2 * axis.kernel_size) // period - 4
    if repetitions < 2 or axis.length < LONG_AXIS or axis.is_part or axis.length != axis.layout:
        return count(axis)

    def without(repetitions: int) -> tuple[int, ...]:
        length = axis.length - repetitions * period * axis.dilation
        return count(replace(axis, length=length, key_length=length, layout=length))

    short, longer = without(repetitions), without(repetitions - 1)
    return tuple(a + repetitions * (b - a) for a, b in zip(short, longer, strict=True))


def _count_walk(
    axis: Axis,
    warp_box: int,
    warps: int,
    column_box: int,
    pass_: Pass,
    granule: int,
    lead: int,
) -> WalkCounts:
    """`count_walk`, box by box."""
    blocks = loads = visits = full = longest = 0
    for groups, length, windows in groups_of(axis, pass_):
        # Of the warps that have rows, and their blocks' first and last warps
        first, last = ends_of_boxes(length, warp_box)
        first_warp, last_warp = ends_of_boxes(len(first), warps)
        (any_begin, all_end), (all_begin, any_end) = windows(first), windows(last)
        low, high = any_begin[first_warp], any_end[last_warp]
        low = low - (low + lead) % granule
        boxes = -(-(high - low) // column_box)
        blocks += groups * len(boxes)
        loads += groups * int(boxes.sum())
        longest = max(longest, int(boxes.max()))
        # Relative to the first column of the walk: columns in the window of all rows, of any
        origin = np.repeat(low, warps)[: len(first)]
        whole = np.maximum((all_end - origin) // column_box + (origin - all_begin) // column_box, 0)
        if pass_.adds:
            whole[first + warp_box > length] = 0
        begin, end = (any_begin - origin) // column_box, (origin - any_end) // column_box
        visits -= groups * int((begin + end).sum())
        full += groups * int(whole.sum())
    return WalkCounts(blocks, loads, visits, full, longest)


def count_walks(
    axes: Sequence[Axis],
    row_boxes: Sequence[tuple[Box, Box]],
    column_boxes: Sequence[Box],
    pass_: Pass = FORWARD,
) -> WalkCounts:
    """The counts of a whole layout for each pair of row boxes and column boxes, as arrays.

    A row box is that of a warp and the number of warps along each axis. Extents that pairs have in
    common along an axis are counted once.
    """
    totals = np.ones((len(WalkCounts._fields), len(row_boxes), len(column_boxes)))
    for r, (axis, is_last) in enumerate(zip(axes, last_of(len(axes)), strict=True)):
        of_rows, row = distinct([(warp_box[r], warps[r]) for warp_box, warps in row_boxes])
        of_columns, column = distinct([box[r] for box in column_boxes])
        counts = [
            [count_walk(axis, *sizes, extent, pass_, is_last) for extent in of_columns]
            for sizes in of_rows
        ]
        totals *= np.moveaxis(np.array(counts, dtype=float), -1, 0)[:, row][:, :, column]
    return WalkCounts(*totals)


def distinct(values: Sequence[Value]) -> tuple[list[Value], list[int]]:
    """The values without repetition, and the index of each among them."""
    index = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return list(index), [index[value] for value in values]


class UnionCounts(NamedTuple):
    """The window unions of blocks and of warps, along one axis."""

    blocks: int
    """Boxes of rows."""
    warps: int
    """Warps that have rows."""
    warp_columns: int
    """Columns in the window unions of all warps."""
    widest_warp: int
    """Columns in the widest window union of a warp."""
    widest_block: int
    """Columns in the widest window union of a block."""


@lru_cache(maxsize=8192)
def count_unions(axis: Axis, warp_box: int, warps: int, pass_: Pass = FORWARD) -> UnionCounts:
    """The counts along one axis; of parts the widest ones there can be, wherever these start."""

    def count(axis: Axis) -> UnionCounts:
        return _count_unions(axis, warp_box, warps, pass_)

    counts = UnionCounts(*_count_repeated(axis, warp_box * warps, count))
    if not axis.is_part:
        return counts
    return counts._replace(
        widest_warp=_widest_union(axis, warp_box, pass_),
        widest_block=_widest_union(axis, warp_box * warps, pass_),
    )


def _widest_union(axis: Axis, size: int, pass_: Pass) -> int:
    """Columns that the window union of a box of `size` rows has at most, wherever parts start."""
    k, s = axis.kernel_size, axis.stride
    given = math.ceil((axis.length if pass_.rows_are_keys else axis.key_length) / axis.dilation)
    if not pass_.rows_are_keys:
        return min(given, k + s * math.ceil((size - 1) / s))
    if axis.border == "shift" and not axis.is_causal:
        # The first and the last kernel_size keys are seen by all queries up to the border
        if math.ceil(axis.layout / axis.dilation) <= 2 * k + size:
            return given
        size += k
    return min(given, s * math.ceil((size - 1 + k) / s) + s)


def _count_unions(axis: Axis, warp_box: int, warps: int, pass_: Pass) -> UnionCounts:
    """`count_unions`, box by box."""
    blocks = active = columns = widest_warp = widest_block = 0
    for groups, length, windows in groups_of(axis, pass_):
        first, last = ends_of_boxes(length, warp_box)
        first_warp, last_warp = ends_of_boxes(len(first), warps)
        begin, end = windows(first)[0], windows(last)[1]
        of_warps, of_blocks = end - begin, end[last_warp] - begin[first_warp]
        blocks += groups * len(of_blocks)
        active += groups * len(of_warps)
        columns += groups * int(of_warps.sum())
        widest_warp = max(widest_warp, int(of_warps.max()))
        widest_block = max(widest_block, int(of_blocks.max()))
    return UnionCounts(blocks, active, columns, widest_warp, widest_block)


@lru_cache(maxsize=64)
def powers_of_two(rank: int, area: int) -> tuple[Box, ...]:
    """Boxes of exactly `area`, a power of two, with extents that are powers of two."""
    sizes = [1 << i for i in range(area.bit_length())]
    return tuple(box for box in itertools.product(sizes, repeat=rank) if math.prod(box) == area)


def longest_extents(tokens: Box, axes: tuple[Axis, ...], area: int) -> list[int]:
    """The most tokens of a box of `area` along each axis: no more than a dilation group has."""
    return [
        min(area, math.ceil(length / axis.dilation))
        for length, axis in zip(tokens, axes, strict=True)
    ]


def mostly_full(boxes: Collection[Box], area: int) -> list[Box]:
    """The boxes that leave less than a quarter of `area` unused, or the largest if none does."""
    good = [box for box in boxes if math.prod(box) > area * 3 // 4]
    return good or [max(boxes, key=math.prod)]
