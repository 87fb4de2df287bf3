"""How the kernels for small windows cut a problem: exact counts and a cost model, no GPU needed.

A block takes a box of rows, one part of it a warp, and brings the columns that they meet to shared
memory in slabs, which are whole along every axis but the first. A warp multiplies its rows with its
list: a box of columns out of the slab, as large as any warp's rows meet. Rows and columns are
queries and keys, or the other way round, as in `_fused_plan`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh._backends.fused import plan as _fused_plan
from cuneigh._backends.fused.plan import PRODUCTS, Role, rows_are_keys, shapes
from cuneigh._device import Device
from cuneigh._problem import Problem
from cuneigh._window import Axis

Indices = npt.NDArray[np.int64]

ROWS = 16
"""Rows of a warp: those of one tensor core instruction."""
SMALLEST_SCALE = 1e-37
"""Smaller ones are 0 in float32, where what is hidden would not stay so."""
LINE = 128
"""Bytes of shared memory, in all of its banks."""
SHORTEST_LIST = 8
"""Columns: places past the end of a list repeat some of the first eight."""
MOST_SLABS = 8
LARGEST_QUOTIENT = 1 << 20
"""What `Divisor` of cuda/fused/small/small.cuh divides times what it divides by is below this."""
SIDES = 48
"""Entries that tables have for the sides of a list."""


def dims(role: Role) -> tuple[int, ...]:
    """Head dimensions that the kernels are made for."""
    return (32, 64, 128) if role == "forward" else (32, 64)


class Form(NamedTuple):
    """What is compiled into a kernel beside dtype and dimensions, but for the places of a list."""

    warps: int
    buffers: int
    """Slabs in shared memory; of two, one arrives while the other is worked on."""
    blocks: int
    """Blocks of a multiprocessor that registers are left for."""


@dataclass(frozen=True, slots=True)
class HaloPlan:
    """The boxes of one problem. Shapes are run-time arguments."""

    form: Form
    columns: int
    """Places of a list."""
    warp_box: tuple[int, ...]
    warps: tuple[int, ...]
    list: tuple[int, ...]
    slab: tuple[int, ...]
    whole: bool
    """Whether one slab holds all that a block meets."""
    part: int
    """Entries of the inner axis that a block works through; see `inner`."""

    def __str__(self) -> str:
        boxes = self.warps, self.warp_box, self.list, self.slab
        warps, rows, columns, slab = ("x".join(map(str, box)) for box in boxes)
        return f"{warps} warps of {rows} rows, lists of {columns} columns out of slabs of {slab}"


class Counts(NamedTuple):
    """What is met along one axis."""

    blocks: int
    warps: int
    """Warps that have rows."""
    met: int
    """Columns that warps meet, in all."""
    sight: int
    """The most columns that a warp meets."""
    reach: int
    """The most columns that a block meets."""


@lru_cache(maxsize=8192)
def count_axis(axis: Axis, warp_box: int, warps: int, rows_are_keys: bool = False) -> Counts:
    """The counts along one axis."""
    total = axis.key_length if rows_are_keys else axis.length
    size = warp_box * warps
    blocks = active = met = sight = reach = 0
    longer = total % axis.dilation
    for group, groups in ((0, longer), (longer, axis.dilation - longer)):
        length = axis.key_group_length(group) if rows_are_keys else axis.group_length(group)
        if not groups or not length:
            continue
        index = np.arange(length, dtype=np.int64)
        meets = axis.inverse if rows_are_keys else axis.window
        begin, end = meets(index, np.full_like(index, group))
        of_warps, of_blocks = (unions(begin, end, box) for box in (warp_box, size))
        blocks += groups * len(of_blocks)
        active += groups * len(of_warps)
        met += groups * int(of_warps.sum())
        sight = max(sight, int(of_warps.max()))
        reach = max(reach, int(of_blocks.max()))
    return Counts(blocks, active, met, sight, reach)


def unions(begin: Indices, end: Indices, box: int) -> Indices:
    """Columns that each box of rows meets, of which a row meets [begin, end)."""
    first = np.arange(0, len(begin), box)
    last = np.minimum(first + box, len(begin)) - 1
    lengths: Indices = end[last] - begin[first]
    return lengths


def along(problem: Problem, plan: HaloPlan, role: Role) -> tuple[Counts, ...]:
    """The counts along every axis."""
    return tuple(
        count_axis(axis, box, warps, rows_are_keys(role))
        for axis, box, warps in zip(problem.axes, plan.warp_box, plan.warps, strict=True)
    )


def slabs(problem: Problem, plan: HaloPlan, role: Role) -> int:
    """Slabs that the longest reach of a block is cut into."""
    return math.ceil(along(problem, plan, role)[0].reach / plan.slab[0])


def inner(problem: Problem) -> str:
    """The axis that blocks walk along with one set of tables: ``"heads"`` or ``"batch"``.

    Heads that share a key head do not lie at equal steps for queries and keys, so that only others
    can be walked along.
    """
    return "heads" if problem.group_size == 1 and problem.heads > problem.batch else "batch"


def sizes(problem: Problem, role: Role) -> tuple[int, int]:
    """Lengths of the inner axis and of the outer one, out of batch and heads."""
    heads = problem.kv_heads if rows_are_keys(role) else problem.heads
    lengths = problem.batch, heads
    return lengths if inner(problem) == "batch" else (lengths[1], lengths[0])


def forms(
    problem: Problem, capability: tuple[int, int], role: Role, whole: bool
) -> dict[Form, tuple[int, ...]]:
    """The forms that were fast, and the places that a list can have in each.

    The compiler reports what registers allow, of which its code needs more from sm_100 on. `whole`
    if one slab holds all that a block meets; without, running sums need registers.
    """
    longest = max(problem.head_dim, problem.value_dim)
    newer = capability[0] > 9
    if role != "forward":
        blocks = 4 if longest <= 32 else 3 if role == "query" else 2
        return {Form(4, 1, blocks): (64, 80, 112, 128)}
    if longest <= 32:
        if not whole:
            return {Form(4, 2, 3): (64,)}
        return {Form(4, 2, 4): (48, 64, 80, 112), Form(4, 1, 3): (144,)}
    if longest <= 64:
        if not whole:
            return {Form(4, 1, 3 if newer else 4): (64,)}
        fits = problem.head_dim == problem.value_dim and not newer
        of_eight = (48, 64, 80, 112) if fits else (48, 64, 80)
        return {Form(8, 1, 2): of_eight, Form(4, 1, 3): (48, 64, 80, 112, 144)}
    if whole:
        return {Form(4, 1, 3): (48, 64, 80, 112)}
    return {Form(4, 1, 2): (64, 80)} if newer else {Form(4, 1, 3): (64,), Form(4, 1, 2): (80,)}


class Cycles(NamedTuple):
    """Cycles of a multiprocessor, fitted to measurements on an H200 (bench/NOTES.md)."""

    product: float
    """A multiply-add of the tensor cores, on one of four schedulers."""
    logit: float
    """One logit's way through mask and softmax, on one of four schedulers."""
    copy: float
    """Bringing 16 bytes of a slab to shared memory."""
    slab: float
    """What a block does once for each slab: waiting and meeting."""
    row: float
    """Bringing 16 bytes of a row to shared memory, or writing as many of a result."""
    warp: float
    """A warp's share of filling the tables."""
    block: float
    """What else a block does once."""
    start: float
    """Until the first slabs are there, which nothing hides where all blocks begin at once."""


FORWARD = Cycles(1 / 280, 0.215, copy=0.131, slab=186, row=0.284, warp=153, block=89, start=14_400)
BACKWARD = Cycles(1 / 290, 0.0, copy=0.096, slab=479, row=0.528, warp=100, block=432, start=19_100)
BYTES = 17.0
"""That a multiprocessor's share of the memory brings in a cycle."""


def constants(role: Role) -> Cycles:
    """The fit for a kernel."""
    return FORWARD if role == "forward" else BACKWARD


def entry_cost(problem: Problem, plan: HaloPlan, role: Role) -> float:
    """Cycles that a block takes for one entry of the inner axis."""
    cycles = constants(role)
    counts = along(problem, plan, role)
    cuts = slabs(problem, plan, role)
    blocks = math.prod(count.blocks for count in counts)
    active = math.prod(count.warps for count in counts) / blocks
    # A warp that does not begin with a slab may end in one more
    shifted = cuts > 1 and plan.warps[0] > 1
    visits = min(cuts, math.ceil(counts[0].sight / plan.slab[0]) + shifted)
    dims = problem.head_dim + problem.value_dim
    columns = plan.columns
    if rows_are_keys(role):  # sixteens of columns that no row of a warp meets are skipped
        mean = min(counts[0].met / counts[0].warps, plan.list[0])
        columns = min(columns, 16 * math.ceil(mean * math.prod(plan.list[1:]) / 16))
    visit = ROWS * columns * (dims * cycles.product * PRODUCTS[role] + cycles.logit)
    slab = math.prod(plan.slab) * dims / 8 * cycles.copy + cycles.slab
    if rows_are_keys(role):
        visits, cuts = visits * problem.group_size, cuts * problem.group_size
    row = dims / 8 * cycles.row * (1 if role == "forward" else 2)
    return cuts * slab + active * (visits * visit / 4 + ROWS * row)


def resident(problem: Problem, plan: HaloPlan, device: Device, role: Role) -> int:
    """Blocks that a multiprocessor works on at a time."""
    reserved = 1024  # of each block's shared memory, by the driver
    taken = shared_bytes(problem, plan, role) + static_bytes(plan, role) + reserved
    return min(plan.form.blocks, (device.shared_memory + reserved) // taken)


def cost(problem: Problem, plan: HaloPlan, device: Device, role: Role) -> float:
    """Predicted cycles of all multiprocessors of `device` together."""
    (cycles,) = costs(problem, plan, device, role, [plan.part])
    return cycles


def costs(
    problem: Problem, plan: HaloPlan, device: Device, role: Role, parts: Sequence[int]
) -> list[float]:
    """The costs of the plan with each of these parts."""
    cycles = constants(role)
    length, outer = sizes(problem, role)
    boxes = outer * math.prod(count.blocks for count in along(problem, plan, role))
    entry = entry_cost(problem, plan, role)
    tables = cycles.warp * plan.form.warps + cycles.block
    multiprocessors = max(device.sm_count, 1)
    beside = resident(problem, plan, device, role)
    at_least = transfers(problem, role) / BYTES / multiprocessors

    def of_part(part: int) -> float:
        rounds, last = divmod(math.ceil(boxes * math.ceil(length / part) / multiprocessors), beside)
        block = tables + part * entry
        busy = (rounds * waiting(beside) + (waiting(last) if last else 0)) * block
        rounds += last > 0
        # The fewer rounds there are, the more do blocks begin at once in each
        start = cycles.start * (1 + 1 / (rounds - 1) if rounds > 1 else 1)
        return (max(busy, at_least) + start) * multiprocessors

    return [of_part(part) for part in parts]


def waiting(blocks: int) -> float:
    """How often longer blocks take together than one would if it never waited for anything."""
    return blocks + 1 / blocks


def transfers(problem: Problem, role: Role) -> int:
    """Bytes of all that is read and written, each once."""
    queries, keys = {"forward": (1, 1), "query": (2, 1)}.get(role, (1, 2))
    vectors = queries * math.prod(problem.tokens) * problem.heads
    vectors += keys * math.prod(problem.key_tokens) * problem.kv_heads
    return 2 * problem.batch * vectors * (problem.head_dim + problem.value_dim)


def with_part(problem: Problem, plan: HaloPlan, device: Device, role: Role) -> HaloPlan:
    """The plan with the cheapest part.

    Long parts fill tables less often; short ones leave less to do for the last blocks.
    """
    length, _ = sizes(problem, role)
    parts = sorted({math.ceil(length / count) for count in range(1, min(length, 64) + 1)})
    of_parts = costs(problem, plan, device, role, parts)
    return replace(plan, part=parts[of_parts.index(min(of_parts))])


def takes(problem: Problem, role: Role) -> bool:
    """Whether there is a kernel for this kind of problem."""
    return (
        problem.dtype in ("float16", "bfloat16")
        and {problem.head_dim, problem.value_dim} <= {*dims(role)}
        and not problem.rpb_dtype
        and not problem.additional
        and SMALLEST_SCALE < problem.scale < 1 / SMALLEST_SCALE
    )


@lru_cache(maxsize=1024)
def make_plan(problem: Problem, device: Device, role: Role = "forward") -> HaloPlan | None:
    """The cheapest plan for `device`; None if there is none, or the boxes of `_fused_plan` are
    expected to be faster."""
    if not takes(problem, role) or device.capability < (8, 0):
        return None
    fitting = (
        with_part(problem, candidate, device, role)
        for candidate in candidates(problem, device, role)
        if resident(problem, candidate, device, role)
    )
    best = min(fitting, key=lambda candidate: cost(problem, candidate, device, role), default=None)
    other = _fused_plan.make_plan(problem, device, role)
    if best is not None and other is not None:
        heads = problem.kv_heads if rows_are_keys(role) else problem.heads
        of_all = _fused_plan.cost(problem, other, role) * problem.batch * heads
        of_all += constants(role).start * max(device.sm_count, 1)
        if of_all < cost(problem, best, device, role):
            return None
    return best


def candidates(problem: Problem, device: Device, role: Role = "forward") -> Iterator[HaloPlan]:
    """All shapes that a list and a slab can have; of each the part is 1."""
    for whole in (True, False):
        kinds = forms(problem, device.capability, role, whole)
        for (form, columns), box in itertools.product(kinds.items(), warp_boxes(problem, role)):
            for warps in shapes(problem.rank, form.warps):
                plan = HaloPlan(form, 0, box, warps, (), (), whole, 1)
                yield from _cuts(problem, role, plan, columns)


def _cuts(
    problem: Problem, role: Role, plan: HaloPlan, columns: tuple[int, ...]
) -> Iterator[HaloPlan]:
    """The lists and slabs that a plan without them can have; `columns`: the places of lists."""
    first, *others = along(problem, plan, role)
    across = tuple(count.sight for count in others)
    reach = tuple(count.reach for count in others)
    cuts = (1,) if plan.whole else range(2, MOST_SLABS + 1)
    for height in sorted({math.ceil(first.reach / count) for count in cuts}):
        high = min(height, first.sight)
        if sum(across) + len(across) > SIDES:
            continue
        if height * math.prod(reach) * max(height, *reach, 1) >= LARGEST_QUOTIENT:
            continue
        if high * math.prod(across) < SHORTEST_LIST:
            continue
        for places in columns:
            if high * math.prod(across) <= places:
                shape = (high, *across), (height, *reach)
                yield HaloPlan(plan.form, places, plan.warp_box, plan.warps, *shape, plan.whole, 1)
                break


def warp_boxes(problem: Problem, role: Role) -> list[tuple[int, ...]]:
    """Boxes that leave few of a warp's rows unused."""
    lengths = problem.key_tokens if rows_are_keys(role) else problem.tokens
    longest = [
        min(ROWS, math.ceil(length / axis.dilation))
        for length, axis in zip(lengths, problem.axes, strict=True)
    ]
    boxes = [
        box
        for box in itertools.product(*(range(1, most + 1) for most in longest))
        if math.prod(box) <= ROWS
    ]
    good = [box for box in boxes if math.prod(box) > ROWS * 3 // 4]
    return good or [max(boxes, key=math.prod)]


def sides(rank: int) -> int:
    """Entries of the table of a list's sides: one more along each axis than the list is long.

    The first axis needs none of them.
    """
    return 1 if rank == 1 else SIDES


def bit_bytes(columns: int) -> int:
    """Bytes of `Bits`, a bit for each fourth of a list's columns."""
    return 4 if columns <= 128 else 8


def table_bytes(problem: Problem, columns: int, warps: int) -> int:
    """Bytes of `HaloTables` of cuda/fused/small/small.cuh."""
    rank, rows = problem.rank, ROWS * warps
    size = bit_bytes(columns) * 4 * sides(rank) + 4 * columns
    size += 8 * rank * (1 + warps + rows) + rows  # what block, warps and rows meet
    size += 8 + 8 * rank + 12  # the block's rows, the size and number of slabs
    return math.ceil(size / 8) * 8 + 3 * 24  # where the columns are found


def column_bytes(problem: Problem) -> int:
    """Bytes of `kColumnBytes` of cuda/fused/small/small.cuh."""
    return math.ceil((problem.head_dim + problem.value_dim) / 64) * 128


def shared_bytes(problem: Problem, plan: HaloPlan, role: Role = "forward") -> int:
    """Bytes of `HaloMemory` of cuda/fused/small/small.cuh, which a launch asks for."""
    rows, places = ROWS * plan.form.warps, math.prod(plan.slab)
    values = {"forward": 0, "query": 2}.get(role, 1)  # vectors of a row beside the first
    row = problem.head_dim + values * problem.value_dim
    tables = table_bytes(problem, plan.columns, plan.form.warps)
    pitch = 2 * row if row % 64 == 0 else 2 * row + 16
    arrays = math.ceil(tables / LINE) * LINE + plan.form.buffers * rows * pitch
    slab = plan.form.buffers * column_bytes(problem) + 16 + 8 * rows_are_keys(role)
    lists = slabs(problem, plan, role) * plan.form.warps * (64 * bit_bytes(plan.columns) + 4)
    return math.ceil(arrays / LINE) * LINE + places * slab + lists


def static_bytes(plan: HaloPlan, role: Role) -> int:
    """Bytes of shared memory that a kernel has beside: where arrays and rows are found."""
    rows = ROWS * plan.form.warps
    return 3 * 24 + 12 * rows if role == "forward" else 8 * 24 + 32 * rows
