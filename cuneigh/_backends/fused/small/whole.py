"""How the kernel for all gradients of whole dilation groups cuts a problem (whole.cu).

A block holds all tokens of a dilation group, one batch-head at a time. They are cut into boxes of
up to sixteen rows, each of which a warp takes once as queries and once as keys. A batch-head is
what cuneigh/_backends/fused/small/plan.py says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuneigh._backends.fused.small import forms as small_forms
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._backends.fused.small import tma
from cuneigh._backends.fused.small.forms import ROWS
from cuneigh._backends.fused.small.plan import H200, Rates, SmallPlan
from cuneigh._device import Device
from cuneigh._gpu.boxes import Box, count_unions, ends_of_boxes, groups_of
from cuneigh._gpu.costs import Cycles, begun, blocks_in_shared_memory
from cuneigh._gpu.passes import DKV, DQ, Pass
from cuneigh._problem import Problem
from cuneigh._window import Axis

DIMS = (32,)
"""Head dimensions: a multiprocessor holds too few blocks with longer vectors."""
ARRAYS = 5
"""Key, value, query, the gradient of the output, and the output."""
COLUMNS_PER_THREAD = 2
"""Columns of a stage whose statistics a thread computes, at most."""


class WholeForm(NamedTuple):
    """What is compiled into a kernel beside dtype and dimensions."""

    warps: int
    boxes: int
    """Boxes of rows that a block has room for."""
    buffers: int
    """Stages in shared memory; of two, one arrives while the other is worked on."""
    blocks: int
    """Blocks of a multiprocessor that registers are left for."""
    contiguous: bool
    """Whether the columns of a tile follow each other in the stage, too."""

    @property
    def columns(self) -> int:
        """Slots of a tile: as many as a block has room for rows."""
        return ROWS * self.boxes


@dataclass(frozen=True, slots=True)
class WholePlan:
    """The boxes of one problem. Shapes are run-time arguments."""

    form: WholeForm
    box: Box
    """Rows of a box along each axis."""
    boxes: Box
    query_tile: Box
    """Columns that a box of queries is multiplied with, out of the stage."""
    key_tile: Box
    stage: Box
    batch_heads: int
    """Batch-heads that a block works through, along the inner axis."""

    def __str__(self) -> str:
        boxes, rows, queries, keys, stage = (
            "x".join(map(str, box))
            for box in (self.boxes, self.box, self.query_tile, self.key_tile, self.stage)
        )
        return (
            f"{self.form.warps} warps for {boxes} boxes of {rows} rows, tiles of {queries} and "
            f"{keys} columns out of {stage}"
        )

    def of_pass(self, pass_: Pass) -> SmallPlan:
        """The boxes of a pass in the words of the kernels that compute one."""
        form = small_forms.Form(self.form.warps, self.form.buffers, self.form.blocks)
        tile = self.key_tile if pass_.rows_are_keys else self.query_tile
        return SmallPlan(
            form,
            self.form.columns,
            self.box,
            self.boxes,
            tile,
            self.stage,
            True,
            self.batch_heads,
            True,
        )


def takes(problem: Problem, capability: tuple[int, int]) -> bool:
    """Whether there is a kernel for this kind of problem."""
    return (
        problem.operation == "backward"
        and all(small_plan.takes(problem, pass_) for pass_ in (DQ, DKV))
        and tma.takes(problem, capability, DQ)
        and not problem.has_key_mask
        and problem.head_dim in DIMS
        and problem.group_size == 1
        and problem.tokens == problem.key_tokens
    )


FORMS = tuple(
    WholeForm(*shape, contiguous)
    for shape in ((4, 4, 2, 4), (7, 14, 1, 2), (8, 16, 1, 2))
    for contiguous in (False, True)
)
"""The forms that there are."""


def make_plan(problem: Problem, device: Device, rates: Rates = H200) -> WholePlan | None:
    """The cheapest plan for `device`; None if there is none."""
    return next(iter(plans_to_try(problem, device, 1, rates)), None)


@lru_cache(maxsize=1024)
def plans_to_try(
    problem: Problem, device: Device, most: int, rates: Rates = H200
) -> list[WholePlan]:
    """The cheapest plans, the cheapest first."""
    if not takes(problem, device.capability):
        return []
    fitting = [
        with_batch_heads(problem, plan, device, rates)
        for plan in candidates(problem)
        if resident(problem, plan, device)
    ]
    return sorted(fitting, key=lambda plan: cost(problem, plan, device, rates))[:most]


def candidates(problem: Problem) -> Iterator[WholePlan]:
    """All boxes, each with one batch-head a block."""
    lengths = tuple(-(-axis.length // axis.dilation) for axis in problem.axes)
    for box in small_plan.warp_boxes(problem, DQ):
        boxes = tuple(-(-length // size) for length, size in zip(lengths, box, strict=True))
        tiles = [tile_of(problem, box, pass_) for pass_ in (DQ, DKV)]
        # Tiles are equal along all axes but the first, so that the phases of both fit one stage
        widest = tuple(map(max, tiles[0][1:], tiles[1][1:]))
        for inner in {widest, lengths[1:]}:
            query_tile, key_tile = ((*tile[:1], *inner) for tile in tiles)
            for form in FORMS:
                stage = tma.padded_stage(query_tile, lengths)
                plan = WholePlan(form, box, boxes, query_tile, key_tile, stage, 1)
                if form.contiguous == (inner == lengths[1:]) and _is_possible(problem, plan):
                    yield plan


def _is_possible(problem: Problem, plan: WholePlan) -> bool:
    """Whether the kernel has room for the boxes, the tiles and the stage."""
    areas = math.prod(plan.query_tile), math.prod(plan.key_tile)
    inner = plan.query_tile[1:]
    return (
        math.prod(plan.boxes) <= plan.form.boxes
        and min(areas) >= small_plan.SHORTEST_TILE
        and max(areas) <= plan.form.columns
        and sum(inner) + len(inner) <= small_forms.TILE_EXTENTS
        and math.prod(plan.stage) <= COLUMNS_PER_THREAD * 32 * plan.form.warps
        and tma.fits(problem, plan.stage)
    )


def tile_of(problem: Problem, box: Box, pass_: Pass) -> Box:
    """The widest window union of a box along each axis."""
    return tuple(
        count_unions(axis, size, 1, pass_).widest_warp
        for axis, size in zip(problem.axes, box, strict=True)
    )


def with_batch_heads(
    problem: Problem, plan: WholePlan, device: Device, rates: Rates = H200
) -> WholePlan:
    """The plan with the cheapest number of batch-heads a block."""
    length, _ = small_plan.sizes(problem, DQ)
    choices = sorted({math.ceil(length / n) for n in range(1, min(length, 64) + 1)})
    plans = [replace(plan, batch_heads=choice) for choice in choices]
    return min(plans, key=lambda plan: cost(problem, plan, device, rates))


# Costs

WAITS = 1.1
"""How much longer blocks take than the rates of the passes say."""


def batch_head_cost(problem: Problem, plan: WholePlan, cycles: Cycles) -> Any:
    """Cycles that a block takes for one batch-head."""
    dims = 2 * problem.head_dim
    columns = 0.0  # that the busiest warp multiplies its rows with, times products
    for pass_ in (DQ, DKV):
        sixteens = np.sort(sixteens_of(problem, plan, pass_).ravel())[::-1]
        rounds = -(-sixteens.size // plan.form.warps)
        columns += 16 * float(sixteens[:rounds].mean()) * rounds * pass_.products
    visits = plan.form.warps * ROWS * columns * dims * cycles.product / 4
    load = math.prod(plan.stage) * ARRAYS / 2 * dims / 8 * cycles.copy * small_plan.TMA_COPIES
    rows = math.prod(plan.boxes) * ROWS * dims / 8 * cycles.row * 2
    return load + cycles.box + visits + rows


def sixteens_of(problem: Problem, plan: WholePlan, pass_: Pass) -> np.ndarray[tuple[int, ...], Any]:
    """Sixteens of columns that each box is multiplied with."""
    tile = plan.of_pass(pass_).tile
    lines = extents(problem.axes[0], plan.box[0], pass_) * math.prod(tile[1:])
    return np.broadcast_to(-(-lines[:, None] // 16), (lines.size, math.prod(plan.boxes[1:])))


def extents(axis: Axis, size: int, pass_: Pass) -> np.ndarray[tuple[int], Any]:
    """The lengths of the window unions of all boxes of the longest group along an axis."""
    _, length, windows = max(groups_of(axis, pass_), key=lambda group: group[1])
    first, last = ends_of_boxes(length, size)
    return windows(last)[1] - windows(first)[0]


def cost(problem: Problem, plan: WholePlan, device: Device, rates: Rates = H200) -> Any:
    """Predicted cycles of all multiprocessors of `device` together."""
    cycles = rates.backward
    length, outer = small_plan.sizes(problem, DQ)
    blocks = outer * groups(problem) * math.ceil(length / plan.batch_heads)
    multiprocessors = max(device.sm_count, 1)
    beside = resident(problem, plan, device)
    rounds, last = divmod(math.ceil(blocks / multiprocessors), beside)
    tables = 2 * (cycles.warp * plan.form.boxes + cycles.block)
    block = tables + plan.batch_heads * batch_head_cost(problem, plan, cycles)
    busy = rounds * small_plan.waiting(beside) + (small_plan.waiting(last) if last else 0)
    at_least = transfers(problem) / rates.bytes / multiprocessors
    start = cycles.start * begun(problem)
    return (max(busy * block * WAITS, at_least) + start) * multiprocessors


def groups(problem: Problem) -> int:
    """Dilation groups that have tokens."""
    return math.prod(min(axis.dilation, axis.length) for axis in problem.axes)


def transfers(problem: Problem) -> int:
    """Bytes of all that is read and written, each once."""
    vectors = problem.batch * math.prod(problem.tokens) * problem.heads
    return 2 * vectors * problem.head_dim * (ARRAYS + 3)


def resident(problem: Problem, plan: WholePlan, device: Device) -> int:
    """Blocks that a multiprocessor works on at a time."""
    taken = shared_bytes(problem, plan) + 8 * plan.form.buffers
    return min(plan.form.blocks, blocks_in_shared_memory(device, taken))


def shared_bytes(problem: Problem, plan: WholePlan) -> int:
    """Bytes of dynamic shared memory: tables, and stages at multiples of `tma.ALIGNMENT`."""
    stage = ARRAYS * array_bytes(problem, plan)
    return table_bytes(problem, plan.form) + tma.ALIGNMENT + plan.form.buffers * stage


def array_bytes(problem: Problem, plan: WholePlan) -> int:
    """Bytes of the vectors of an array; contiguous tiles may end past the last column."""
    columns = math.prod(plan.stage) + (15 if plan.form.contiguous else 0)
    return tma.vo_offset(problem, (columns,))


def table_bytes(problem: Problem, form: WholeForm) -> int:
    """Bytes of `WholeTables` of cuda/fused/small/whole.cu."""
    bits = small_forms.bit_bytes(form.columns)
    of_pass = form.boxes * 32 * 2 * bits + 4 * form.columns + 4 * form.boxes
    size = 2 * _multiple(of_pass, 2 * bits)
    size += 16 * ROWS * form.boxes + 8 * COLUMNS_PER_THREAD * 32 * form.warps + ROWS * form.boxes
    return _multiple(size + small_forms.table_bytes(problem, form.columns, form.boxes), 2 * bits)


def _multiple(size: int, of: int) -> int:
    return math.ceil(size / of) * of
