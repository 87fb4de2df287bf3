"""How the fused kernels cut a problem into boxes: exact counts and a cost model, no GPU needed.

A block takes a box of rows, one part of it a warp, and walks over boxes of columns that start where
the union of what its rows meet starts. A warp skips a box of columns that none of its rows meets.
The block may do so for several entries, a head of the rows in one element of the batch each.
Rows are queries and columns the keys of their windows, or rows are keys and columns the queries
that see them. All of that is separable: what is counted along each axis multiplies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from cuneigh._device import Device
from cuneigh._problem import DTYPES, Problem
from cuneigh._window import Axis

WARPS = 4
"""Warps of a block: one on each scheduler of a multiprocessor, and two blocks beside each other."""


class Area(NamedTuple):
    """The sizes of the boxes of a block that are compiled into a kernel."""

    row_tiles: int
    """Sixteens of rows that a warp takes."""
    columns: int
    """Columns of a box, places past its end included."""
    warps: int = WARPS


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """The boxes of one problem. Areas are compiled in, shapes are run-time arguments."""

    area: Area
    warp_box: tuple[int, ...]
    warps: tuple[int, ...]
    column_box: tuple[int, ...]
    part: int = 1
    """Entries that a block works through."""

    def __str__(self) -> str:
        boxes = self.warps, self.warp_box, self.column_box
        warps, rows, columns = ("x".join(map(str, box)) for box in boxes)
        places = f"{warps} warps of {rows} rows, {columns} columns in {self.area.columns} places"
        return places if self.part == 1 else f"{places}, {self.part} entries a block"


class Counts(NamedTuple):
    """What is walked along one axis, or over a whole layout."""

    blocks: int
    """Boxes of rows."""
    tiles: int
    """Pairs of a box of rows and a box of columns that it loads."""
    visits: int
    """Pairs of a warp and a box of columns of which it meets something."""
    full: int
    """Those in which every row of the warp meets every column."""
    most: int
    """Boxes of columns of the longest walk."""


Role = Literal["forward", "query", "key_value", "key", "value"]
"""What a kernel computes: the output, or the gradients of one or two operands."""


def roles(problem: Problem) -> tuple[Role, ...]:
    """The kernels of an operation."""
    if problem.operation == "forward":
        return ("forward",)
    # The sums of longer vectors fill the registers of a kernel.
    if max(problem.head_dim, problem.value_dim) > 128:
        return ("query", "key", "value")
    return ("query", "key_value")


def rows_are_keys(role: Role) -> bool:
    return role not in ("forward", "query")


@lru_cache(maxsize=8192)
def count_axis(
    axis: Axis, warp_box: int, warps: int, column_box: int, rows_are_keys: bool = False
) -> Counts:
    """The counts along one axis, by the kernel's own rules."""
    total = axis.key_length if rows_are_keys else axis.length
    size = warp_box * warps
    blocks = tiles = visits = full = most = 0
    longer = total % axis.dilation
    for group, groups in ((0, longer), (longer, axis.dilation - longer)):
        if not groups:
            continue
        length = axis.key_group_length(group) if rows_are_keys else axis.group_length(group)
        index = np.arange(length, dtype=np.int64)
        meets = axis.inverse if rows_are_keys else axis.window
        begin, end = meets(index, np.full_like(index, group))
        first = np.arange(0, length, size)
        reach = begin[first], end[np.minimum(first + size, length) - 1]
        boxes = -(-(reach[1] - reach[0]) // column_box)
        blocks += groups * len(first)
        tiles += groups * int(boxes.sum())
        most = max(most, int(boxes.max()))
        for warp in range(warps):
            mine = first + warp * warp_box
            has = mine < length
            low, high = mine[has], np.minimum(mine[has] + warp_box, length) - 1
            any_begin, any_end = begin[low] - reach[0][has], end[high] - reach[0][has]
            all_begin, all_end = begin[high] - reach[0][has], end[low] - reach[0][has]
            visits += groups * int((-(-any_end // column_box) - any_begin // column_box).sum())
            whole = np.maximum(all_end // column_box - -(-all_begin // column_box), 0)
            full += groups * int(whole.sum())
    return Counts(blocks, tiles, visits, full, most)


def count(problem: Problem, plan: FusedPlan, role: Role = "forward") -> Counts:
    """The counts of one (batch, head), the additional keys left out."""
    along = [
        count_axis(axis, *sizes, rows_are_keys(role))
        for axis, *sizes in zip(
            problem.axes, plan.warp_box, plan.warps, plan.column_box, strict=True
        )
    ]
    totals = Counts(*(math.prod(values) for values in zip(*along, strict=True)))
    # Places past the end of a box are masked, so that a box that has some is never full.
    return totals if math.prod(plan.column_box) == plan.area.columns else totals._replace(full=0)


class Cycles(NamedTuple):
    """Cycles of one scheduler, of which a multiprocessor has four.

    Non-negative least squares fits of measurements on an H200 (bench/NOTES.md).
    """

    product: float
    """A multiply-add of the tensor cores."""
    exponential: float
    """One logit's way through the softmax."""
    mask: float
    """Masking one logit."""
    copy: float
    """Bringing 16 bytes of a column to shared memory."""
    tile: float
    """What a block does once for each box of columns: waiting and meeting."""
    row: float
    """Reading 16 bytes of a row and writing them in the end."""
    block: float
    """What a block does once."""


HALF_FORWARD = Cycles(1 / 261, exponential=0.0, mask=0.39, copy=0.42, tile=87, row=0.0, block=2080)
SHORT_FORWARD = Cycles(1 / 233, exponential=0.12, mask=0.45, copy=0.0, tile=205, row=1.52, block=0)
"""Of vectors of at most 64 elements."""
HALF_BACKWARD = Cycles(
    1 / 265, exponential=0.0, mask=0.26, copy=0.58, tile=314, row=0.0, block=2170
)
FLOAT32 = Cycles(1 / 40, exponential=0.0, mask=1.36, copy=0.4, tile=216, row=2.2, block=0)


PRODUCTS: dict[Role, float] = {
    "forward": 1.0,
    "query": 1.5,
    "key_value": 2.0,
    "key": 1.5,
    "value": 1.0,
}
"""Matrix products of a role, those of the forward counted as one."""


def constants(problem: Problem, role: Role) -> Cycles:
    """The fit for a kernel."""
    if problem.dtype == "float32":
        return FLOAT32
    if role != "forward":
        return HALF_BACKWARD
    return SHORT_FORWARD if max(problem.head_dim, problem.value_dim) <= 64 else HALF_FORWARD


def cost(problem: Problem, plan: FusedPlan, role: Role = "forward") -> float:
    """Predicted cycles of one (batch, head) on one scheduler of a multiprocessor."""
    return float(cost_of(problem, plan.area, count(problem, plan, role), role))


def cost_of(problem: Problem, area: Area, counts: Counts, role: Role) -> Any:
    """The same for these counts, which may be arrays of those of many plans."""
    row_tiles, columns, warps = area
    cycles = constants(problem, role)
    logits = 16 * row_tiles * columns
    dims = problem.head_dim + problem.value_dim
    chunks = dims * DTYPES[problem.dtype] / 16
    visit = logits * (dims * cycles.product * PRODUCTS[role] + cycles.exponential)
    partial = logits * cycles.mask
    tile = columns * chunks * cycles.copy + cycles.tile
    block = 16 * row_tiles * warps * chunks * cycles.row + cycles.block
    # The warps of a block wait for each other, each on its own scheduler.
    return (
        counts.blocks * block
        + counts.tiles * tile
        + (counts.visits * visit + (counts.visits - counts.full) * partial) / warps
    )


@lru_cache(maxsize=1024)
def make_plan(problem: Problem, device: Device, role: Role = "forward") -> FusedPlan:
    """The cheapest plan for `device`, where any area fits."""
    cheapest = (cheapest_shapes(problem, area, role) for area in areas(problem, device, role))
    best = min(cheapest, key=lambda candidate: cost(problem, candidate, role))
    return with_part(problem, best, device) if role == "forward" else best


def cheapest_shapes(problem: Problem, area: Area, role: Role) -> FusedPlan:
    """The first of the cheapest of `candidates`; all of them are counted at once."""
    rows, boxes = row_shapes(problem, area), column_shapes(problem, area.columns, role)
    totals = np.ones((len(Counts._fields), len(rows), len(boxes)))
    for r, axis in enumerate(problem.axes):
        of_rows, row = distinct([(warp_box[r], warps[r]) for warp_box, warps in rows])
        of_boxes, box = distinct([column_box[r] for column_box in boxes])
        counts = [
            [count_axis(axis, *sizes, column_box, rows_are_keys(role)) for column_box in of_boxes]
            for sizes in of_rows
        ]
        totals *= np.moveaxis(np.array(counts, dtype=float), -1, 0)[:, row][:, :, box]
    totals[Counts._fields.index("full")] *= [math.prod(box) == area.columns for box in boxes]
    costs = cost_of(problem, area, Counts(*totals), role)
    row_index, box_index = np.unravel_index(costs.argmin(), costs.shape)
    return FusedPlan(area, *rows[row_index], boxes[box_index])


TABLES = 1000
"""Cycles of a block's tables along each axis, those that other blocks do not hide."""
IN_STEP = 1.04
"""How much longer blocks take that walk through several entries in step with each other."""


def resident(problem: Problem, area: Area, device: Device, role: Role) -> int:
    """Blocks that a multiprocessor works on at a time."""
    reserved = 1024  # of each block's shared memory, by the driver
    blocks = blocks_per_multiprocessor(problem, device.capability, area, role)
    in_registers = max(blocks, 65536 // (256 * 32 * area.warps))
    in_memory = (device.shared_memory + reserved) // (shared_bytes(problem, area, role) + reserved)
    return min(in_registers, in_memory)


def with_part(problem: Problem, plan: FusedPlan, device: Device) -> FusedPlan:
    """The plan with the part that makes all multiprocessors ready first.

    Long parts fill tables less often; short ones leave less to do for the last blocks, and even out
    that some walks are longer than others.
    """
    entries = problem.batch * problem.heads
    counts = count(problem, plan)
    at_once = resident(problem, plan.area, device, "forward") * max(device.sm_count, 1)
    entry = cost(problem, plan) / counts.blocks
    longest = counts.most * counts.blocks / counts.tiles

    def cycles(part: int) -> float:
        rounds = math.ceil(counts.blocks * math.ceil(entries / part) / at_once)
        alike = rounds - 1 + longest  # the last round may be all long walks
        return alike * (TABLES * problem.rank + part * entry) * (IN_STEP if part > 1 else 1.0)

    parts = {1} | {math.ceil(entries / count) for count in range(1, min(entries, 64) + 1)}
    return replace(plan, part=min(sorted(parts), key=cycles))


def several(problem: Problem, role: Role, part: int) -> bool:
    """Whether a kernel can walk through several entries: along three axes that slows its walks."""
    return role == "forward" and (part > 1 or problem.rank < 3)


def distinct(values: list[Any]) -> tuple[list[Any], list[int]]:
    """The values without repetition, and the place of each among them."""
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return list(places), [places[value] for value in values]


def candidates(problem: Problem, area: Area, role: Role = "forward") -> Iterator[FusedPlan]:
    """The shapes that these areas can have."""
    for of_rows in row_shapes(problem, area):
        for column_box in column_shapes(problem, area.columns, role):
            yield FusedPlan(area, *of_rows, column_box)


def row_shapes(problem: Problem, area: Area) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of a warp's rows, and of a block's warps."""
    of_rows, of_warps = (shapes(problem.rank, size) for size in (16 * area.row_tiles, area.warps))
    return list(itertools.product(of_rows, of_warps))


def areas(problem: Problem, device: Device, role: Role = "forward") -> tuple[Area, ...]:
    """The areas to choose from: the fast ones that fit into shared memory.

    Where none does, fewer columns and then fewer warps make a block that fits.
    """
    sizes = fast_sizes(problem, device.capability, role)
    least = (1, 8 if problem.dtype == "float32" else 16)
    for warps, some in itertools.product((WARPS, 2, 1), (sizes, (least,))):
        fitting = tuple(
            area
            for area in (Area(*size, warps) for size in some)
            if shared_bytes(problem, area, role) <= device.shared_memory
        )
        if fitting:
            return fitting
    return ()


def fast_sizes(
    problem: Problem, capability: tuple[int, int], role: Role
) -> tuple[tuple[int, int], ...]:
    """(row_tiles, columns) that fit into registers, as the compiler reports, and were fast."""
    longest = max(problem.head_dim, problem.value_dim)
    if problem.dtype == "float32":
        if longest > 128:
            return ((1, 16),)
        if role != "forward":
            return ((1, 32), (1, 16)) if longest <= 64 else ((1, 16),)
        if longest > 64:
            return ((2, 16), (1, 32), (1, 16))
        return ((2, 32), (1, 32), (1, 16)) if problem.rank == 1 else ((1, 32), (1, 16))
    if longest > 128:
        return ((1, 32), (1, 16)) if role == "forward" else ((1, 16),)
    if role != "forward":
        if longest <= 64 or capability[0] != 9 or problem.rpb_dtype:
            return ((1, 32),)
        return ((2, 32), (1, 64), (1, 32)) if role == "query" else ((1, 64), (1, 32))
    if problem.rpb_dtype or (longest <= 64 and capability[0] != 9):
        return ((1, 64), (1, 32))
    if longest <= 32:
        return ((2, 64), (1, 32))
    if longest <= 64:
        return ((2, 48) if problem.rank == 1 else (2, 64), (1, 64), (1, 32))
    if capability[0] != 9:
        return ((2, 32), (1, 64), (1, 32))
    return ((2, 64) if problem.rank < 3 else (2, 48), (1, 64), (1, 32))


def blocks_per_multiprocessor(
    problem: Problem, capability: tuple[int, int], area: Area, role: Role
) -> int:
    """Blocks to leave registers for; more of them hide latencies, as long as nothing spills."""
    longest = max(problem.head_dim, problem.value_dim)
    if longest > 64 or capability[0] > 9:
        return 1
    if problem.dtype == "float32":
        roomy = area.columns == 16 or (role == "forward" and problem.rank < 3)
        if role == "query" or area.row_tiles > 1 or not roomy:
            return 1
        return 3 if longest > 32 else 4
    if role != "forward":
        return 1
    if problem.rpb_dtype:
        return 2 if area.columns > 32 else 3
    if area.row_tiles > 1:
        return 2 if longest > 32 and area.columns > 48 else 3
    return 4 if area.columns > 32 else 5


def padded(dim: int) -> int:
    """The head dimension that a kernel is compiled for."""
    return math.ceil(dim / 16) * 16


def shared_bytes(problem: Problem, area: Area, role: Role = "forward") -> int:
    """Bytes of `ForwardSmem` of cuda/fused/forward.cu or `BackwardSmem` of fused/backward.cu."""

    def pitch(dim: int) -> int:
        size = DTYPES[problem.dtype] * padded(dim)
        whole_lines = problem.dtype != "float32" and size % 128 == 0
        return size if whole_lines else size + 16

    key, value, rank = pitch(problem.head_dim), pitch(problem.value_dim), problem.rank
    rows, columns = 16 * area.row_tiles * area.warps, area.columns
    size = rows * (key if role == "forward" else key + value)
    size += 2 * columns * (key + value)
    if role != "forward":
        size += 8 * (2 * columns if rows_are_keys(role) else rows)  # statistics of the queries
    size += 8 * rank * (columns + 1)  # bits of the columns before a coordinate
    size += (16 + 16 * has_additional(problem, role) + 8) * columns  # steps to the columns
    size += 2 * area.warps * math.ceil((48 + 4 * rank) / 16) * 16  # boxes of the walk
    size += 8 * rank + 4  # where the rows begin, and which of the blocks with them this is
    size += 8 * rank + 16 * rank * area.warps  # what block and warps meet
    size += rows * (
        8 + 8 * rank + 4 * rank + 4
    )  # the rows' visible columns, windows, tokens, biases
    return math.ceil(size / 16) * 16


def has_additional(problem: Problem, role: Role) -> bool:
    """Whether a kernel walks additional keys after the window."""
    return not rows_are_keys(role) and bool(problem.additional)


@lru_cache(maxsize=64)
def shapes(rank: int, area: int) -> tuple[tuple[int, ...], ...]:
    """Boxes of exactly `area`, a power of two."""
    sizes = [1 << i for i in range(area.bit_length())]
    return tuple(box for box in itertools.product(sizes, repeat=rank) if math.prod(box) == area)


@lru_cache(maxsize=1024)
def column_shapes(problem: Problem, area: int, role: Role) -> tuple[tuple[int, ...], ...]:
    """Boxes of at most `area` columns that leave less than a quarter of it unused."""
    lengths = problem.tokens if rows_are_keys(role) else problem.key_tokens
    longest = [
        min(area, math.ceil(length / axis.dilation))
        for length, axis in zip(lengths, problem.axes, strict=True)
    ]
    leading = itertools.product(*(range(1, most + 1) for most in longest[:-1]))
    boxes = {
        (*box, min(longest[-1], area // math.prod(box)))
        for box in leading
        if math.prod(box) <= area
    }
    good = [box for box in boxes if math.prod(box) > area * 3 // 4]
    return tuple(sorted(good or [max(boxes, key=math.prod)]))
