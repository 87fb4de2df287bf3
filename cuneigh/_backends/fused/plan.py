"""How the kernels for windows of any size cut a problem: counts and a cost model, no GPU needed.

A block takes a box of rows, one part of it a warp, and walks over boxes of columns that start where
the window union of its rows starts. A warp skips a box of columns of which none lies in the window
of one of its rows. The block may do so for several batch-heads, each a head of the rows in one
element of the batch. `cuneigh._gpu.passes` says what rows, columns and windows are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cuneigh._device import Device
from cuneigh._gpu.boxes import (
    Box,
    WalkCounts,
    count_walk,
    count_walks,
    longest_extents,
    mostly_full,
    powers_of_two,
)
from cuneigh._gpu.costs import Cycles, blocks_in_shared_memory
from cuneigh._gpu.passes import DQ, FORWARD, HVP_DQ, JVP, Pass
from cuneigh._problem import DTYPES, Problem

Value = TypeVar("Value", bound=Hashable)

WARPS = 4
"""Warps of a block: one on each scheduler of a multiprocessor, and two blocks beside each other."""


class Area(NamedTuple):
    """The sizes of the boxes of a block that are compiled into a kernel."""

    row_tiles: int
    """Sixteens of rows that a warp takes."""
    columns: int
    """Slots of a box of columns; the box may have fewer columns."""
    warps: int = WARPS


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """The boxes of one problem. Areas are compiled in, shapes are run-time arguments."""

    area: Area
    warp_box: Box
    warps: Box
    column_box: Box
    batch_heads: int = 1
    """Batch-heads that a block works through."""

    def __str__(self) -> str:
        boxes = self.warps, self.warp_box, self.column_box
        warps, rows, columns = ("x".join(map(str, box)) for box in boxes)
        shapes = f"{warps} warps of {rows} rows, {columns} columns in {self.area.columns} slots"
        if self.batch_heads == 1:
            return shapes
        return f"{shapes}, {self.batch_heads} batch-heads a block"


def count(problem: Problem, plan: FusedPlan, pass_: Pass = FORWARD) -> WalkCounts:
    """The counts of one batch-head, the additional keys left out."""
    along = [
        count_walk(axis, *sizes, pass_)
        for axis, *sizes in zip(
            problem.axes, plan.warp_box, plan.warps, plan.column_box, strict=True
        )
    ]
    totals = WalkCounts(*(math.prod(values) for values in zip(*along, strict=True)))
    # Slots past the end of a box are masked, so that a box with such slots is never full.
    return totals if math.prod(plan.column_box) == plan.area.columns else totals._replace(full=0)


# Costs

HALF_FORWARD = Cycles(1 / 261, logit=0.0, mask=0.39, copy=0.42, box=87, row=0.0, block=2080)
SHORT_FORWARD = Cycles(1 / 233, logit=0.12, mask=0.45, copy=0.0, box=205, row=1.52, block=0)
"""Of vectors of at most 64 elements."""
HALF_BACKWARD = Cycles(1 / 265, logit=0.0, mask=0.26, copy=0.58, box=314, row=0.0, block=2170)
LONG_BACKWARD = Cycles(
    1 / 196, logit=0.0, mask=1.08, copy=0.6, box=88, row=0.0, block=6_540, start=15_200
)
"""Of vectors of more than 128 elements."""
FLOAT32 = Cycles(1 / 40, logit=0.0, mask=1.36, copy=0.4, box=216, row=2.2, block=0)


class Rates(NamedTuple):
    """The fits of all kernels, those of an H200 unless others are given."""

    half_forward: Cycles = HALF_FORWARD
    short_forward: Cycles = SHORT_FORWARD
    half_backward: Cycles = HALF_BACKWARD
    long_backward: Cycles = LONG_BACKWARD
    float32: Cycles = FLOAT32


H200 = Rates()


def cycles_of(problem: Problem, pass_: Pass, rates: Rates = H200) -> Cycles:
    """The fit for a kernel."""
    if problem.dtype == "float32":
        return rates.float32
    longest = max(problem.head_dim, problem.value_dim)
    if pass_ != FORWARD:
        is_long = longest > 128 and not pass_.moves
        return rates.long_backward if is_long else rates.half_backward
    return rates.short_forward if longest <= 64 else rates.half_forward


def cost(problem: Problem, plan: FusedPlan, pass_: Pass = FORWARD, rates: Rates = H200) -> Any:
    """Predicted cycles of a multiprocessor for one batch-head of the rows."""
    return cost_of(problem, plan.area, count(problem, plan, pass_), pass_, rates)


def cost_of(
    problem: Problem, area: Area, counts: WalkCounts, pass_: Pass, rates: Rates = H200
) -> Any:
    """The cost for these counts, which may be arrays of the counts of many plans."""
    row_tiles, columns, warps = area
    cycles = cycles_of(problem, pass_, rates)
    logits = 16 * row_tiles * columns
    dims = problem.head_dim + problem.value_dim
    chunks = dims * DTYPES[problem.dtype] / 16 * (2 if pass_.moves else 1)
    visit = logits * (dims * cycles.product * pass_.products + cycles.logit)
    partial = logits * cycles.mask
    load = columns * chunks * cycles.copy + cycles.box
    block = 16 * row_tiles * warps * chunks * cycles.row + cycles.block
    # The warps of a block wait for each other, each on its own scheduler.
    walks = (
        counts.loads * load
        + (counts.visits * visit + (counts.visits - counts.full) * partial) / warps
    )
    # A block of keys walks over the queries of all heads that share them.
    return counts.blocks * block + walks * (problem.group_size if pass_.rows_are_keys else 1)


# The choice of a plan


@lru_cache(maxsize=1024)
def make_plan(
    problem: Problem, device: Device, pass_: Pass = FORWARD, rates: Rates = H200
) -> FusedPlan:
    """The cheapest plan for `device`, where any area fits."""
    fitting = areas(problem, device, pass_)
    cheapest = (cheapest_shapes(problem, area, pass_, rates) for area in fitting)
    best = min(cheapest, key=lambda candidate: cost(problem, candidate, pass_, rates))
    return with_batch_heads(problem, best, device, rates) if pass_ == FORWARD else best


def cheapest_shapes(problem: Problem, area: Area, pass_: Pass, rates: Rates = H200) -> FusedPlan:
    """The first of the cheapest of `candidates`; all of them are counted at once."""
    rows, boxes = row_boxes(problem, area), column_boxes(problem, area.columns, pass_)
    counts = count_walks(problem.axes, rows, boxes, pass_)
    full: Any = counts.full * np.array([math.prod(box) == area.columns for box in boxes])
    costs = cost_of(problem, area, counts._replace(full=full), pass_, rates)
    row_index, box_index = np.unravel_index(costs.argmin(), costs.shape)
    return FusedPlan(area, *rows[row_index], boxes[box_index])


def plans_to_try(
    problem: Problem, device: Device, pass_: Pass, most: int, rates: Rates = H200
) -> list[FusedPlan]:
    """The cheapest plans of every area, `most` in all, the cheapest first."""
    found: list[tuple[float, FusedPlan]] = []
    for area in areas(problem, device, pass_):
        rows, boxes = row_boxes(problem, area), column_boxes(problem, area.columns, pass_)
        counts = count_walks(problem.axes, rows, boxes, pass_)
        full: Any = counts.full * np.array([math.prod(box) == area.columns for box in boxes])
        costs = cost_of(problem, area, counts._replace(full=full), pass_, rates)
        for place in np.argsort(costs, axis=None, kind="stable")[:most]:
            row, box = np.unravel_index(place, costs.shape)
            found.append((float(costs[row, box]), FusedPlan(area, *rows[row], boxes[box])))
    found.sort(key=lambda pair: pair[0])
    plans = [candidate for _, candidate in found[:most]]
    if pass_ == FORWARD:
        return [with_batch_heads(problem, candidate, device, rates) for candidate in plans]
    return plans


TABLES = 1000
"""Cycles of a block's tables along each axis, those that other blocks do not hide."""
IN_STEP = 1.04
"""How much longer blocks take that go through several batch-heads in step with each other."""


def resident(problem: Problem, area: Area, device: Device, pass_: Pass) -> int:
    """Blocks that a multiprocessor works on at a time."""
    blocks = blocks_per_multiprocessor(problem, device.capability, area, pass_)
    in_registers = max(blocks, 65536 // (256 * 32 * area.warps))
    return min(in_registers, blocks_in_shared_memory(device, shared_bytes(problem, area, pass_)))


def with_batch_heads(
    problem: Problem, plan: FusedPlan, device: Device, rates: Rates = H200
) -> FusedPlan:
    """The plan with the number of batch-heads a block that makes all multiprocessors ready first.

    Blocks with many of them fill tables less often. Blocks with few leave less to do for the last
    blocks, and even out that some walks are longer than others.
    """
    all_heads = problem.batch * problem.heads
    counts = count(problem, plan)
    at_once = resident(problem, plan.area, device, FORWARD) * max(device.sm_count, 1)
    of_one: float = cost(problem, plan, FORWARD, rates) / counts.blocks
    longest = counts.longest * counts.blocks / max(counts.loads, 1)  # parts may see nothing

    def cycles(batch_heads: int) -> float:
        rounds = math.ceil(counts.blocks * math.ceil(all_heads / batch_heads) / at_once)
        alike = rounds - 1 + longest  # the last round may be all long walks
        of_block = TABLES * problem.rank + batch_heads * of_one
        return alike * of_block * (IN_STEP if batch_heads > 1 else 1.0)

    choices = {1} | {math.ceil(all_heads / n) for n in range(1, min(all_heads, 64) + 1)}
    return replace(plan, batch_heads=min(sorted(choices), key=cycles))


def many_batch_heads(problem: Problem, pass_: Pass, batch_heads: int) -> bool:
    """Whether to take a kernel that can go through several batch-heads.

    With three axes a kernel that can is slower with one of them, too.
    """
    return pass_ == FORWARD and (batch_heads > 1 or problem.rank < 3)


def candidates(problem: Problem, area: Area, pass_: Pass = FORWARD) -> Iterator[FusedPlan]:
    """The shapes that these areas can have."""
    for of_rows in row_boxes(problem, area):
        for column_box in column_boxes(problem, area.columns, pass_):
            yield FusedPlan(area, *of_rows, column_box)


def row_boxes(problem: Problem, area: Area) -> list[tuple[Box, Box]]:
    """Boxes of a warp's rows, and of a block's warps."""
    of_rows, of_warps = (
        powers_of_two(problem.rank, size) for size in (16 * area.row_tiles, area.warps)
    )
    return list(itertools.product(of_rows, of_warps))


@lru_cache(maxsize=1024)
def column_boxes(problem: Problem, area: int, pass_: Pass) -> tuple[Box, ...]:
    """Boxes of at most `area` columns, as long as possible along the last axis."""
    longest = longest_extents(pass_.column_tokens(problem), problem.axes, area)
    leading = itertools.product(*(range(1, most + 1) for most in longest[:-1]))
    boxes = {
        (*box, min(longest[-1], area // math.prod(box)))
        for box in leading
        if math.prod(box) <= area
    }
    return tuple(sorted(mostly_full(boxes, area)))


# What is compiled into kernels


def areas(problem: Problem, device: Device, pass_: Pass = FORWARD) -> tuple[Area, ...]:
    """The areas to choose from: the fast ones that fit into shared memory.

    Where none does, fewer columns and then fewer warps make a block that fits.
    """
    sizes = fast_sizes(problem, device.capability, pass_)
    least = (1, 8 if problem.dtype == "float32" else 16)
    for warps, some in itertools.product((WARPS, 2, 1), (sizes, (least,))):
        fitting = tuple(
            area
            for area in (Area(*size, warps) for size in some)
            if shared_bytes(problem, area, pass_) <= device.shared_memory
        )
        if fitting:
            return fitting
    return ()


def fast_sizes(
    problem: Problem, capability: tuple[int, int], pass_: Pass
) -> tuple[tuple[int, int], ...]:
    """(row_tiles, columns) that fit into registers, as the compiler reports, and were fast."""
    sizes = _fast_sizes(problem, capability, pass_)
    if problem.is_ordinary:
        return sizes
    # A walk over parts, or past hidden keys, takes some registers more.
    roomy = tuple(size for size in sizes if size not in FULL.get(pass_.name, ()))
    return roomy or ((1, 16),)


FULL = {"dkv": ((1, 64),)}
"""Sizes of a pass whose kernels have no register left, apart from those of small dimensions."""


def _fast_sizes(
    problem: Problem, capability: tuple[int, int], pass_: Pass
) -> tuple[tuple[int, int], ...]:
    """Those of ordinary problems."""
    longest = max(problem.head_dim, problem.value_dim)
    if pass_ == JVP:
        if problem.dtype == "float32":
            roomy = longest <= 32 and capability[0] > 7
            return ((1, 32), (1, 16)) if roomy else ((1, 16),)
        if longest > 64:
            return ((1, 16),) if problem.rpb_dtype else ((1, 32), (1, 16))
        return ((1, 32),) if problem.rpb_dtype else ((1, 64), (1, 32))
    if pass_.moves:
        roomy = longest <= 64 or pass_ == HVP_DQ
        return ((1, 32), (1, 16)) if roomy and problem.dtype != "float32" else ((1, 16),)
    if problem.dtype == "float32":
        if longest > 128:
            return ((1, 16),)
        if pass_ != FORWARD:
            return ((1, 32), (1, 16)) if longest <= 64 else ((1, 16),)
        if longest > 64:
            return ((2, 16), (1, 32), (1, 16))
        return ((2, 32), (1, 32), (1, 16)) if problem.rank == 1 else ((1, 32), (1, 16))
    if longest > 128:
        return ((1, 32), (1, 16)) if pass_ == FORWARD else ((1, 16),)
    if pass_ != FORWARD:
        if longest <= 64 or capability[0] != 9 or problem.rpb_dtype:
            return ((1, 32),)
        return ((2, 32), (1, 64), (1, 32)) if pass_ == DQ else ((1, 64), (1, 32))
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
    problem: Problem, capability: tuple[int, int], area: Area, pass_: Pass
) -> int:
    """Blocks to leave registers for; more of them hide latencies, as long as nothing spills."""
    blocks = _blocks(problem, capability, area, pass_)
    return blocks if problem.is_ordinary or blocks == 1 else blocks - 1


def _blocks(problem: Problem, capability: tuple[int, int], area: Area, pass_: Pass) -> int:
    """Those of ordinary problems."""
    longest = max(problem.head_dim, problem.value_dim)
    if longest > 64 or capability[0] > 9 or pass_.moves:
        return 1
    if problem.dtype == "float32":
        roomy = area.columns == 16 or (pass_ == FORWARD and problem.rank < 3)
        if pass_ == DQ or area.row_tiles > 1 or not roomy:
            return 1
        return 3 if longest > 32 else 4
    if pass_ != FORWARD:
        return 1
    if problem.rpb_dtype:
        return 2 if area.columns > 32 else 3
    if area.row_tiles > 1:
        return 2 if longest > 32 and area.columns > 48 else 3
    return 4 if area.columns > 32 else 5


def padded(dim: int) -> int:
    """The head dimension that a kernel is compiled for."""
    return math.ceil(dim / 16) * 16


def shared_bytes(problem: Problem, area: Area, pass_: Pass = FORWARD) -> int:
    """Bytes of the memory of the kernel in cuda/fused: of `ForwardSmem`, `BackwardSmem`, ..."""

    def pitch(dim: int) -> int:
        """Bytes from one vector to the next: `kVectorPitch` of cuda/fused/vectors.cuh."""
        size = DTYPES[problem.dtype] * padded(dim)
        swizzled = problem.dtype != "float32" and size % 128 == 0
        return size if swizzled else size + 16

    key, value, rank = pitch(problem.head_dim), pitch(problem.value_dim), problem.rank
    rows, columns = 16 * area.row_tiles * area.warps, area.columns
    size = rows * (key if pass_ in (FORWARD, JVP) else key + value)
    size += 2 * columns * (key + value)
    if pass_ not in (FORWARD, JVP):
        size += 8 * (2 * columns if pass_.rows_are_keys else rows)  # statistics of the queries
    size *= 2 if pass_.moves else 1  # as much for tangents
    # `Tables` of cuda/fused/tables.cuh:
    size += 2 * area.warps * math.ceil((48 + 4 * rank) / 16) * 16  # walk
    size += 16 * rank * area.warps  # warp_union
    size += (16 + 16 * has_additional(problem, pass_) + 8) * columns  # vector and scalar offsets
    size += 8 * rank + 8 * rank + 4  # block_union, first, share
    size += 8 * rank * (columns + 1)  # prefix_mask
    size += rows * (8 + 8 * rank + 4 * rank + 4)  # row_mask, window, token, bias_offset
    return math.ceil(size / 16) * 16


def has_additional(problem: Problem, pass_: Pass) -> bool:
    """Whether a kernel walks over additional keys after the window."""
    return not pass_.rows_are_keys and bool(problem.additional)
