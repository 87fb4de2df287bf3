"""How the kernels for small windows cut a problem: exact counts and a cost model, without a GPU.

A block takes a box of rows, one part of it a warp, and brings the columns of its window union to
shared memory in stages: boxes that are whole along every axis but the first. A warp multiplies its
rows with its tile, a box of columns out of the stage. Tiles are as large as the widest window union
of any warp. `cuneigh._gpu.passes` says what rows, columns and windows are.

A batch-head is a head of the rows in one element of the batch. Blocks go through several of them
along the inner axis, which is that of the heads or that of the batch, with one set of tables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from cuneigh._backends.fused.small import tma
from cuneigh._backends.fused.small.forms import (
    DIMS,
    MOST_KEPT,
    ROWS,
    TILE_EXTENTS,
    Form,
    bit_bytes,
    column_bytes,
    forms,
    has_tma,
    table_bytes,
)
from cuneigh._device import Device
from cuneigh._gpu.boxes import (
    Box,
    UnionCounts,
    count_unions,
    longest_extents,
    mostly_full,
    powers_of_two,
)
from cuneigh._gpu.costs import Cycles, begun, blocks_in_shared_memory
from cuneigh._gpu.linear import Speed
from cuneigh._gpu.passes import DKV, DQ, FORWARD, HVP_DKV, HVP_DQ, JVP, Pass
from cuneigh._problem import Problem
from cuneigh._window import Promise

SMALLEST_SCALE = 1e-37
"""Smaller scales are 0 in float32, where hidden logits would not stay hidden."""
LINE = 128
"""Bytes of shared memory, in all of its banks."""
SHORTEST_TILE = 8
"""Columns: slots past the end of a tile repeat some of its first eight."""
MOST_STAGES = 8
LARGEST_QUOTIENT = 1 << 20
"""`FastDivmod` of cuda/fused/small/problem.cuh takes a dividend times its divisor below this."""
MASKED_AHEAD = 2
"""`kAhead` of cuda/fused/small/hidden.cuh, where TMA brings stages."""
LONGEST = {FORWARD: 128, JVP: 128, DQ: 128, DKV: 128, HVP_DQ: 64, HVP_DKV: 64}
"""The longest head dimensions that there are kernels of a pass for."""


@dataclass(frozen=True, slots=True)
class SmallPlan:
    """The boxes of one problem. Shapes are run-time arguments."""

    form: Form
    columns: int
    """Slots of a tile."""
    warp_box: Box
    warps: Box
    tile: Box
    stage: Box
    one_stage: bool
    """Whether one stage holds the window union of every block."""
    batch_heads: int
    """Batch-heads that a block works through, along the inner axis."""
    by_tma: bool = False
    """Whether TMA brings stages, and in gradients the rows."""

    def __str__(self) -> str:
        boxes = self.warps, self.warp_box, self.tile, self.stage
        warps, rows, columns, stage = ("x".join(map(str, box)) for box in boxes)
        return f"{warps} warps of {rows} rows, tiles of {columns} columns out of stages of {stage}"


def count(problem: Problem, plan: SmallPlan, pass_: Pass) -> tuple[UnionCounts, ...]:
    """The counts along every axis."""
    return tuple(
        count_unions(axis, box, warps, pass_)
        for axis, box, warps in zip(problem.axes, plan.warp_box, plan.warps, strict=True)
    )


def stages(problem: Problem, plan: SmallPlan, pass_: Pass) -> int:
    """Stages that the widest window union of a block is cut into."""
    return math.ceil(count(problem, plan, pass_)[0].widest_block / plan.stage[0])


def usual_columns(problem: Problem, plan: SmallPlan, pass_: Pass) -> int:
    """Columns along the first axis in the window union of a block away from borders.

    The fits of kernels without tangents count the widest union for all.
    """
    widest = count(problem, plan, pass_)[0].widest_block
    if pass_ != HVP_DKV:
        return widest
    axis, rows = problem.axes[0], plan.warp_box[0] * plan.warps[0]
    return min(widest, math.ceil((rows - 1 + axis.kernel_size) / axis.stride))


def inner(problem: Problem) -> Literal["heads", "batch"]:
    """The axis that blocks go along with one set of tables.

    Heads that share a key head do not have equal strides for queries and keys, so that blocks can
    only go along others.
    """
    return "heads" if problem.group_size == 1 and problem.heads > problem.batch else "batch"


def sizes(problem: Problem, pass_: Pass) -> tuple[int, int]:
    """Lengths of the inner axis and of the outer one, out of batch and heads."""
    lengths = problem.batch, pass_.heads(problem)
    return lengths if inner(problem) == "batch" else (lengths[1], lengths[0])


# Costs

FORWARD_CYCLES = Cycles(
    1 / 280, logit=0.215, copy=0.131, box=186, row=0.284, warp=153, block=89, start=14_400
)
BACKWARD_CYCLES = Cycles(
    1 / 290, logit=0.0, copy=0.096, box=479, row=0.528, warp=100, block=432, start=19_100
)
JVP_CYCLES = Cycles(
    1 / 600, logit=0.684, copy=0.096, box=471, row=0.379, warp=403, block=0, start=22_500
)
HVP_CYCLES = Cycles(
    1 / 600, logit=0.615, copy=0.0, box=666, row=0.38, warp=564, block=0, start=23_400
)
TMA_COPIES = 0.7
"""What TMA takes to bring a column, of what copies take."""
BYTES = Speed(17)
"""Bytes that a multiprocessor's share of the memory brings in a cycle."""


class Rates(NamedTuple):
    """The fits of all kernels, those of an H200 unless others are given."""

    forward: Cycles = FORWARD_CYCLES
    backward: Cycles = BACKWARD_CYCLES
    jvp: Cycles = JVP_CYCLES
    hvp: Cycles = HVP_CYCLES
    bytes: Speed = BYTES

    def cycles_of(self, pass_: Pass) -> Cycles:
        """The fit for a kernel."""
        if pass_ in (HVP_DQ, HVP_DKV):
            return self.hvp
        return {FORWARD: self.forward, JVP: self.jvp}.get(pass_, self.backward)


H200 = Rates()


def batch_head_cost(problem: Problem, plan: SmallPlan, pass_: Pass, cycles: Cycles) -> Any:
    """Cycles that a block takes for one batch-head."""
    counts = count(problem, plan, pass_)
    loads = math.ceil(usual_columns(problem, plan, pass_) / plan.stage[0])
    blocks = math.prod(count.blocks for count in counts)
    active = math.prod(count.warps for count in counts) / blocks
    # A warp whose window union does not begin with a stage may end in one more
    shifted = loads > 1 and plan.warps[0] > 1
    visits = min(loads, math.ceil(counts[0].widest_warp / plan.stage[0]) + shifted)
    dims = problem.head_dim + problem.value_dim
    columns = plan.columns
    if pass_.rows_are_keys:  # sixteens of columns outside of all windows of a warp are skipped
        mean = min(counts[0].warp_columns / counts[0].warps, plan.tile[0])
        columns = min(columns, 16 * math.ceil(mean * math.prod(plan.tile[1:]) / 16))
    visit = ROWS * columns * (dims * cycles.product * pass_.products + cycles.logit)
    if pass_ == HVP_DQ and plan.columns > MOST_KEPT:  # most is computed twice
        visit *= 12 / 7
    chunks = dims / 8 * (2 if pass_.moves else 1)
    copy = cycles.copy * TMA_COPIES if plan.by_tma else cycles.copy
    load = math.prod(plan.stage) * chunks * copy + cycles.box
    if pass_.rows_are_keys:
        visits, loads = visits * problem.group_size, loads * problem.group_size
    row = chunks * cycles.row * (1 if pass_ in (FORWARD, JVP) else 2)
    return loads * load + active * (visits * visit / 4 + ROWS * row)


def resident(problem: Problem, plan: SmallPlan, device: Device, pass_: Pass) -> int:
    """Blocks that a multiprocessor works on at a time."""
    taken = shared_bytes(problem, plan, pass_) + static_bytes(problem, plan, pass_)
    return min(plan.form.blocks, blocks_in_shared_memory(device, taken))


def cost(
    problem: Problem, plan: SmallPlan, device: Device, pass_: Pass, rates: Rates = H200
) -> Any:
    """Predicted cycles of all multiprocessors of `device` together."""
    (cycles,) = costs(problem, plan, device, pass_, [plan.batch_heads], rates)
    return cycles


def costs(
    problem: Problem,
    plan: SmallPlan,
    device: Device,
    pass_: Pass,
    choices: Sequence[int],
    rates: Rates,
) -> list[Any]:
    """The costs of the plan with each of these numbers of batch-heads a block."""
    cycles = rates.cycles_of(pass_)
    length, outer = sizes(problem, pass_)
    boxes = outer * math.prod(count.blocks for count in count(problem, plan, pass_))
    of_one = batch_head_cost(problem, plan, pass_, cycles)
    tables = cycles.warp * plan.form.warps + cycles.block
    multiprocessors = max(device.sm_count, 1)
    beside = resident(problem, plan, device, pass_)
    # The fits of kernels without tangents count those of all blocks alike
    fours = plan.form.warps / 4 if pass_.moves else 1.0
    at_least = transfers(problem, pass_) / rates.bytes / multiprocessors
    start = cycles.start * begun(problem)

    def cost_with(batch_heads: int) -> Any:
        blocks = math.ceil(boxes * math.ceil(length / batch_heads) / multiprocessors)
        rounds, last = divmod(blocks, beside)
        block = tables + batch_heads * of_one
        busy = (rounds * waiting(beside, fours) + (waiting(last, fours) if last else 0)) * block
        rounds += last > 0
        # The fewer rounds there are, the more do blocks begin at once in each
        again = 1 / (rounds - 1) if rounds > 1 else 0.0
        return (max(busy, at_least) + start * (1 + again)) * multiprocessors

    return [cost_with(batch_heads) for batch_heads in choices]


def waiting(blocks: int, fours: float = 1.0) -> float:
    """How often longer blocks take together than one would if it never waited for anything.

    While a warp of theirs waits others go on, which have `fours` times four warps a block.
    """
    return blocks + 1 / (blocks * fours)


def transfers(problem: Problem, pass_: Pass) -> int:
    """Bytes of all that is read and written, each once."""
    special = {FORWARD: (1, 1), DQ: (2, 1), DKV: (1, 2), HVP_DKV: (2, 3)}
    queries, keys = special.get(pass_, (2, 2))
    vectors = queries * math.prod(problem.tokens) * problem.heads
    vectors += keys * math.prod(problem.key_tokens) * problem.kv_heads
    return 2 * problem.batch * vectors * (problem.head_dim + problem.value_dim)


# The choice of a plan


def takes(problem: Problem, pass_: Pass) -> bool:
    """Whether there is a kernel for this kind of problem."""
    return (
        max(problem.head_dim, problem.value_dim) <= LONGEST.get(pass_, 0)
        and problem.dtype in ("float16", "bfloat16")
        and {problem.head_dim, problem.value_dim} <= {*DIMS}
        and not problem.rpb_dtype
        and not problem.additional
        and Promise.INSIDE in problem.promises
        and SMALLEST_SCALE < problem.scale < 1 / SMALLEST_SCALE
    )


@lru_cache(maxsize=1024)
def make_plan(
    problem: Problem, device: Device, pass_: Pass = FORWARD, rates: Rates = H200
) -> SmallPlan | None:
    """The cheapest plan for `device`; None if there is none."""
    if not takes(problem, pass_) or device.capability < (8, 0):
        return None
    fitting = _fitting(problem, device, pass_, rates)
    return min(fitting, key=lambda plan: cost(problem, plan, device, pass_, rates), default=None)


def plans_to_try(
    problem: Problem, device: Device, pass_: Pass, most: int, rates: Rates = H200
) -> list[SmallPlan]:
    """The cheapest plans, the cheapest first."""
    if not takes(problem, pass_) or device.capability < (8, 0):
        return []
    fitting = _fitting(problem, device, pass_, rates)
    return sorted(fitting, key=lambda plan: cost(problem, plan, device, pass_, rates))[:most]


def _fitting(problem: Problem, device: Device, pass_: Pass, rates: Rates) -> Iterator[SmallPlan]:
    """The plans that a multiprocessor holds."""
    for candidate in candidates(problem, device, pass_):
        if resident(problem, candidate, device, pass_):
            yield with_batch_heads(problem, candidate, device, pass_, rates)


def with_batch_heads(
    problem: Problem, plan: SmallPlan, device: Device, pass_: Pass, rates: Rates
) -> SmallPlan:
    """The plan with the cheapest number of batch-heads a block.

    Blocks with many of them fill tables less often; blocks with few leave less to do for the last
    blocks.
    """
    length, _ = sizes(problem, pass_)
    choices = sorted({math.ceil(length / n) for n in range(1, min(length, 64) + 1)})
    of_choices = costs(problem, plan, device, pass_, choices, rates)
    return replace(plan, batch_heads=choices[of_choices.index(min(of_choices))])


def candidates(problem: Problem, device: Device, pass_: Pass = FORWARD) -> Iterator[SmallPlan]:
    """All shapes that a tile and a stage can have, each with one batch-head a block."""
    for one_stage in (True, False):
        kinds = forms(problem, device.capability, pass_, one_stage)
        for (form, slots), box in itertools.product(kinds.items(), warp_boxes(problem, pass_)):
            for warps in powers_of_two(problem.rank, form.warps):
                plan = SmallPlan(form, 0, box, warps, (), (), one_stage, 1)
                for tiled in _with_tiles(problem, pass_, plan, slots):
                    yield tiled
                    yield from _with_tma(problem, device, pass_, tiled)


def _with_tiles(
    problem: Problem, pass_: Pass, plan: SmallPlan, slots: tuple[int, ...]
) -> Iterator[SmallPlan]:
    """The plan, which has no tile and no stage, with all that it can have.

    `slots` are the numbers of slots of a tile that there are kernels for.
    """
    first, *others = count(problem, plan, pass_)
    tile_inner = tuple(count.widest_warp for count in others)
    stage_inner = tuple(count.widest_block for count in others)
    cuts = (1,) if plan.one_stage else range(2, MOST_STAGES + 1)
    heights = {math.ceil(first.widest_block / count) for count in cuts}
    if not plan.one_stage:  # blocks at borders may take two
        heights.add(usual_columns(problem, plan, pass_))
    for height in sorted(heights):
        tile = (min(height, first.widest_warp), *tile_inner)
        stage = (height, *stage_inner)
        if sum(tile_inner) + len(tile_inner) > TILE_EXTENTS:
            continue
        if not _is_counted(stage):
            continue
        if math.prod(tile) < SHORTEST_TILE:
            continue
        for columns in slots:
            if math.prod(tile) <= columns:
                yield replace(plan, columns=columns, tile=tile, stage=stage)
                break


def _is_counted(stage: Box) -> bool:
    """Whether `FastDivmod` divides the numbers of all columns of a stage."""
    return math.prod(stage) * max(*stage, 1) < LARGEST_QUOTIENT


def _with_tma(
    problem: Problem, device: Device, pass_: Pass, plan: SmallPlan
) -> Iterator[SmallPlan]:
    """The plan with TMA, if there is a kernel and the plan fits without TMA, too.

    TMA cannot read every array; where it cannot, the launch takes the plan without it.
    """
    if not has_tma(problem, device.capability, pass_, plan.form, plan.columns):
        return
    stage = tma.padded_stage(plan.tile, plan.stage)
    if tma.fits(problem, stage) and tma.fits(problem, plan.warp_box) and _is_counted(stage):
        padded = replace(plan, stage=stage)
        if resident(problem, padded, device, pass_):
            yield replace(padded, by_tma=True)


def warp_boxes(problem: Problem, pass_: Pass) -> list[Box]:
    """Boxes that leave few of a warp's rows unused."""
    longest = longest_extents(pass_.row_tokens(problem), problem.axes, ROWS)
    boxes = [
        box
        for box in itertools.product(*(range(1, most + 1) for most in longest))
        if math.prod(box) <= ROWS
    ]
    return mostly_full(boxes, ROWS)


# Shared memory


def has_masked_columns(problem: Problem, pass_: Pass) -> bool:
    return problem.has_key_mask and not pass_.rows_are_keys


def shared_bytes(problem: Problem, plan: SmallPlan, pass_: Pass = FORWARD) -> int:
    """Bytes of `SmallSmem` of cuda/fused/small/smem.cuh, which a launch asks for."""
    rows, columns, buffers = ROWS * plan.form.warps, math.prod(plan.stage), plan.form.buffers
    values = {FORWARD: 0, JVP: 0, DQ: 2}.get(pass_, 1)  # vectors of a row beside the first
    row = problem.head_dim + values * problem.value_dim
    tables = table_bytes(problem, plan.columns, plan.form.warps)
    has_row_boxes = plan.by_tma and pass_ != FORWARD
    pitch = 2 * row if row % 64 == 0 or has_row_boxes else 2 * row + 16
    arrays = math.ceil(tables / LINE) * LINE + buffers * rows * pitch
    if plan.by_tma:
        vectors = tma.ALIGNMENT + buffers * 2 * tma.vo_offset(problem, plan.stage)
        of_columns = (math.ceil(columns / 4) * 16 + columns * 8) * pass_.rows_are_keys
    else:
        vectors = columns * buffers * column_bytes(problem)
        of_columns = columns * (16 + 8 * buffers * pass_.rows_are_keys)
    tiles = plan.form.warps * (64 * bit_bytes(plan.columns) + 4)
    tiles *= stages(problem, plan, pass_)
    if has_masked_columns(problem, pass_):
        tiles += 4 * math.ceil(columns / 32)
    return math.ceil(arrays / LINE) * LINE + vectors + of_columns + tiles


def static_bytes(problem: Problem, plan: SmallPlan, pass_: Pass) -> int:
    """Bytes of the static shared memory: `QueryRows`, `Rows`, `MovingRows` and `HvpRows`.

    And what there is for a mask: `RowMask` of hidden.cuh, or what `SeenColumns` has for TMA.
    """
    rows = ROWS * plan.form.warps
    origins = {FORWARD: 3, HVP_DQ: 14, HVP_DKV: 14}.get(pass_, 8)
    offsets = {FORWARD: 3, DQ: 7, HVP_DQ: 8}.get(pass_, 4)
    mask = 0
    if problem.has_key_mask and pass_.rows_are_keys:
        mask = 24 + 4 * rows + 4 * plan.form.warps
    if plan.by_tma and has_masked_columns(problem, pass_):
        mask = 4 * MASKED_AHEAD * 32 * plan.form.warps
    barriers = plan.by_tma * (plan.form.buffers if pass_ == FORWARD else 1)
    return mask + 24 * origins + 4 * offsets * rows + 8 * barriers
