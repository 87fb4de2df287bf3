"""How the Hopper kernel cuts a problem, by exact counts and a cost model; no GPU needed.

A tile of queries is what a block works on: a box of 64 queries for each of its warpgroups, side by
side along one axis, or in query heads that share a key head. It visits boxes of keys from the begin
of its window union on. A warpgroup passes over a box of which none of its queries sees any key, and
masks one that some of its queries do not see whole. (cuda/hopper/tile.cuh)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuneigh._device import Device
from cuneigh._gpu.boxes import Box, WalkCounts, count_walk, count_walks, powers_of_two
from cuneigh._gpu.costs import Cycles
from cuneigh._gpu.rates import H200
from cuneigh._problem import Problem

ROWS = 64
"""Queries of a warpgroup: the rows of one wgmma instruction."""
LINE = 64
"""Elements of a line of shared memory, the widest that TMA swizzles."""
VALUE_DIMS = (32, 64, 96, 128, 192, 256)
"""Columns that the products with the values have."""
LONGEST_SPAN = 256
"""Tokens from the first to the last of a box that TMA loads at once."""


class Form(NamedTuple):
    """What is compiled into a kernel beside dtype and dimensions."""

    warpgroups: int
    """Of consumers."""
    keys: int
    """Of a box."""
    stages: int
    """Boxes of keys, and of values, in shared memory."""
    query_slots: int
    """Boxes of queries in shared memory."""


@dataclass(frozen=True, slots=True)
class HopperPlan:
    """The boxes of one problem. Shapes are run-time arguments."""

    form: Form
    query_box: Box
    warpgroups: Box
    """Boxes of queries of a tile along each axis."""
    heads: int
    """Query heads of a tile."""
    key_box: Box

    @property
    def tile_box(self) -> Box:
        """Queries of a tile along each axis, in each of its heads."""
        return tuple(n * box for n, box in zip(self.warpgroups, self.query_box, strict=True))

    def __str__(self) -> str:
        boxes = self.warpgroups, self.query_box, self.key_box
        warpgroups, queries, keys = ("x".join(map(str, box)) for box in boxes)
        heads = f" of {self.heads} heads" if self.heads > 1 else ""
        return f"{warpgroups} warpgroups{heads} of {queries} queries, boxes of {keys} keys"


def padded_head_dim(problem: Problem) -> int:
    """The dimension that logits are summed over."""
    return math.ceil(problem.head_dim / 16) * 16


def padded_value_dim(problem: Problem) -> int:
    """The columns of the output."""
    return next(dim for dim in VALUE_DIMS if dim >= problem.value_dim)


def is_dilated(problem: Problem) -> bool:
    return any(axis.dilation > 1 for axis in problem.axes)


@lru_cache(maxsize=1024)
def form_of(problem: Problem, device: Device) -> Form:
    """The form for these dimensions: as much of shared memory as there is holds boxes."""
    longest = max(padded_head_dim(problem), padded_value_dim(problem))
    # Where three warpgroups of consumers leave the producers 32 registers each, the geometry of
    # three dilated axes does not fit.
    crowded = problem.rank == 3 and is_dilated(problem) and padded_value_dim(problem) > 64
    warpgroups = 3 if longest <= 128 and not crowded else 2
    form = Form(warpgroups, 128 if longest <= 128 else 64, stages=2, query_slots=warpgroups)
    for bigger in ("query_slots",) * warpgroups + ("stages",) * 2:
        candidate = form._replace(**{bigger: getattr(form, bigger) + 1})
        if shared_bytes(problem, candidate) <= device.shared_memory:
            form = candidate
    return form


def shared_bytes(problem: Problem, form: Form) -> int:
    """Bytes of `ForwardSmem` of cuda/hopper/forward.cu."""
    rank = problem.rank
    query_lines = math.ceil(padded_head_dim(problem) / LINE)
    value_lines = math.ceil(padded_value_dim(problem) / LINE)
    coordinates = form.warpgroups * most_coordinates(rank)
    lines = form.query_slots * ROWS * query_lines
    lines += form.stages * form.keys * (query_lines + value_lines)
    size = 128 * lines + 16 * form.stages * coordinates
    # MaskTables: prefixes, their bases, numbers, coordinates, window unions
    tables = 16 * (128 + 2 * rank) + 4 * rank + 64 * rank + 16 * coordinates + 1024 * rank
    size += math.ceil(tables / 16) * 16
    size += 2 * (16 + 16 * rank)  # tiles
    size += 4 * form.stages * form.warpgroups  # visibility
    size += 60 * rank + 128 + 4 * rank + 12  # the problem, and the last box of keys
    barriers = 4 + 2 * form.query_slots + 4 * form.stages
    return math.ceil((math.ceil(size / 8) * 8 + 8 * barriers) / 16) * 16


def most_coordinates(rank: int) -> int:
    """`kMostCoordinates` of cuda/hopper/mask.cuh: the most that a box of queries may have."""
    return ROWS if rank == 1 else 36


# Costs


# Cycles of a multiprocessor, fitted to measurements on an H200 (bench/NOTES.md)
SHORT = Cycles(
    1 / 3410, logit=0.064, copy=0.0, box=354, row=0.0, block=2690, mask=0.0191, start=17_700
)
"""Of vectors of at most 64 elements."""
MIDDLE = Cycles(
    1 / 2910, logit=0.0, copy=0.0, box=1770, row=0.0, block=4100, mask=0.0072, start=9_650
)
LONG = Cycles(
    1 / 2520, logit=0.043, copy=0.0, box=553, row=0.0, block=2720, mask=0.0201, start=13_200
)
"""Of vectors of more than 128 elements."""


def constants(problem: Problem) -> Cycles:
    """The fit for a kernel."""
    longest = max(problem.head_dim, problem.value_dim)
    return SHORT if longest <= 64 else MIDDLE if longest <= 128 else LONG


def cost_of(problem: Problem, form: Form, counts: WalkCounts, heads: int) -> Any:
    """Predicted cycles of all multiprocessors together for these counts of one head.

    The counts may be arrays, of those of many plans; `heads` are those of a tile.
    """
    cycles = constants(problem)
    logits = ROWS * form.keys
    dims = problem.head_dim + problem.value_dim
    additional = counts.blocks * form.warpgroups * math.ceil((problem.additional or 0) / form.keys)
    visit = logits * (dims * cycles.product + cycles.logit)
    of_warpgroups = (counts.visits + additional) * visit
    of_warpgroups += (counts.visits - counts.full) * logits * cycles.mask
    of_blocks = counts.loads * cycles.box + counts.blocks * cycles.block
    return (of_warpgroups * heads + of_blocks) * problem.batch * (problem.heads / heads)


def cost(problem: Problem, plan: HopperPlan, device: Device) -> float:
    """Predicted cycles of all multiprocessors together, those that wait for the last included."""
    counts = count(problem, plan)
    cycles: float = cost_of(problem, plan.form, counts, plan.heads)
    tiles = counts.blocks * problem.batch * problem.heads // plan.heads
    multiprocessors = max(device.sm_count, 1)
    rounds = math.ceil(tiles / multiprocessors) * multiprocessors / tiles
    return cycles * rounds + constants(problem).start * multiprocessors


def count(problem: Problem, plan: HopperPlan) -> WalkCounts:
    """The counts of one head, the additional keys left out."""
    along = [
        count_walk(axis, *sizes)
        for axis, *sizes in zip(
            problem.axes, plan.query_box, plan.warpgroups, plan.key_box, strict=True
        )
    ]
    return WalkCounts(*(math.prod(values) for values in zip(*along, strict=True)))


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call with the plan for `device` is expected to take on an H200."""
    cycles = cost(problem, make_plan(problem, device), device)
    return 2 * H200.launch_ms + cycles / H200.cycles


# The choice of a plan


@lru_cache(maxsize=1024)
def make_plan(problem: Problem, device: Device) -> HopperPlan:
    """The cheapest plan for `device`."""
    form = form_of(problem, device)
    best: tuple[float, HopperPlan] | None = None
    keys = key_boxes(problem, form)
    for warpgroups, heads in arrangements(problem, form):
        rows = [(box, warpgroups) for box in query_boxes(problem)]
        counts = count_walks(problem.axes, rows, keys)
        costs = cost_of(problem, form, counts, heads)
        row, key = np.unravel_index(costs.argmin(), costs.shape)
        plan = HopperPlan(form, rows[row][0], warpgroups, heads, keys[key])
        total = cost(problem, plan, device)
        if best is None or total < best[0]:
            best = total, plan
    assert best is not None, "every problem has an arrangement along its last axis"
    return best[1]


def arrangements(problem: Problem, form: Form) -> list[tuple[Box, int]]:
    """Boxes of queries of a tile along each axis, and its query heads."""
    rank, warpgroups = problem.rank, form.warpgroups
    found = [
        (tuple(warpgroups if r == axis else 1 for r in range(rank)), 1) for axis in range(rank)
    ]
    if problem.group_size % warpgroups == 0:
        found.append(((1,) * rank, warpgroups))
    return found


def query_boxes(problem: Problem) -> list[Box]:
    """Boxes of a warpgroup's queries that can be loaded, and whose masks can be made."""
    most = most_coordinates(problem.rank)
    boxes = powers_of_two(problem.rank, ROWS)
    return [box for box in boxes if sum(box) <= most and loadable(problem, box)]


def key_boxes(problem: Problem, form: Form) -> list[Box]:
    """Boxes of keys that can be loaded."""
    boxes = powers_of_two(problem.rank, form.keys)
    return [box for box in boxes if loadable(problem, box)]


def loadable(problem: Problem, box: Box) -> bool:
    """Whether TMA loads the box, in pieces along its first axis."""
    spans = zip(box[1:], problem.axes[1:], strict=True)
    return all(span(extent, axis.dilation) <= LONGEST_SPAN for extent, axis in spans)


def span(extent: int, dilation: int) -> int:
    """Tokens from the first to the last of `extent` tokens of a dilation group."""
    return (extent - 1) * dilation + 1


def pieces(problem: Problem, box: Box) -> int:
    """Loads along the first axis that bring a box."""
    count = 1
    while span(box[0] // count, problem.axes[0].dilation) > LONGEST_SPAN:
        count *= 2
    return count
