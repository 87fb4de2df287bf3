"""How the Hopper kernels cut a problem, by exact counts; no GPU needed.

A tile of rows is what a block works on: a box of 64 rows for each of its warpgroups, side by side
along one axis, or in query heads that share a key head. It visits boxes of columns from the begin
of its window union on. A warpgroup passes over a box of which none of its rows sees any column, and
masks one that some of its rows do not see whole. (cuda/hopper/tile.cuh; `_gpu.passes` says what
rows and columns are.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cuneigh._device import Device
from cuneigh._gpu.boxes import GRANULE, Box, WalkCounts, count_unions, count_walk, last_of
from cuneigh._gpu.passes import BACKWARD, DKV, DQ, FORWARD, JVP, Pass
from cuneigh._gpu.records import axis_type, has_parts
from cuneigh._problem import Problem

ROWS = 64
"""Of a warpgroup: those of one wgmma instruction."""
LINE = 64
"""Elements of a line of shared memory, the widest that TMA swizzles."""
WIDTHS = (32, 64, 96, 128, 192, 256)
"""Columns that products into sums have."""
LONGEST_SPAN = 256
"""Tokens from the first to the last of a box that TMA loads at once."""


class Form(NamedTuple):
    """What is compiled into a kernel beside dtype and dimensions."""

    warpgroups: int
    """Boxes of rows of a tile, one for each warpgroup of consumers unless they are pairs."""
    columns: int
    """Of a box."""
    stages: int
    """Boxes of columns in shared memory."""
    row_slots: int
    """Boxes of rows in shared memory."""
    pairs: bool = False
    """Whether two warpgroups of consumers share a box of rows (cuda/hopper/dkv_long.cu)."""
    cluster: int = 0
    """Of the kernel for a chunk of queries: blocks that share the boxes of a tile; 0 for others."""

    @property
    def consumers(self) -> int:
        """Warpgroups of consumers."""
        return self.warpgroups * (2 if self.pairs else 1)


@dataclass(frozen=True, slots=True)
class HopperPlan:
    """The boxes of one problem. Shapes are run-time arguments."""

    form: Form
    row_box: Box
    warpgroups: Box
    """Boxes of rows of a tile along each axis."""
    heads: int
    """Row heads of a tile."""
    column_box: Box

    @property
    def tile_box(self) -> Box:
        """Rows of a tile along each axis, in each of its heads."""
        return tuple(n * box for n, box in zip(self.warpgroups, self.row_box, strict=True))

    def __str__(self) -> str:
        boxes = self.warpgroups, self.row_box, self.column_box
        each = "pairs of warpgroups" if self.form.pairs else "warpgroups"
        number, rows, columns = ("x".join(map(str, box)) for box in boxes)
        heads = f" of {self.heads} heads" if self.heads > 1 else ""
        blocks = f", {self.form.cluster} blocks for each" if self.form.cluster > 1 else ""
        return f"{number} {each}{heads} of {rows} rows, boxes of {columns} columns{blocks}"


def ways(problem: Problem) -> list[tuple[Pass, ...]]:
    """The ways to compute an operation: the passes of each, in their order.

    One kernel for all gradients has five products where two kernels have seven, but needs the whole
    layout without dilation, and cannot have additional keys, which are no rows. It makes whole
    lines of dQ, of which vectors of up to 32 elements would fill half at most; where a line is all
    of dQ, it takes 128 queries at once, for which it has room if a line is all of dO, too. For sums
    of more than 128 elements it has no registers.
    """
    if problem.operation == "forward":
        return [(FORWARD,)]
    if problem.operation == "jvp":
        return [(JVP,)]
    whole = not (has_parts(problem) or is_dilated(problem) or problem.additional)
    longest = max(problem.head_dim, problem.value_dim)
    if whole and (
        (problem.head_dim > LINE and longest <= 128) or (problem.head_dim > 32 and longest <= LINE)
    ):
        return [(BACKWARD,), (DQ, DKV)]
    return [(DQ, DKV)]


def padded(dim: int) -> int:
    """A dimension that products sum over."""
    return math.ceil(dim / 16) * 16


def width(dim: int) -> int:
    """The columns of products into sums of this dimension."""
    return next(width for width in WIDTHS if width >= dim)


def is_dilated(problem: Problem) -> bool:
    return any(axis.dilation > 1 for axis in problem.axes)


def are_pairs(problem: Problem, pass_: Pass) -> bool:
    """Whether two warpgroups share a box of rows: one may have no registers for both sums then."""
    return pass_ == DKV and max(problem.head_dim, problem.value_dim) > 128


def most_warpgroups(problem: Problem, pass_: Pass) -> int:
    """As many as there are registers for."""
    longest = max(problem.head_dim, problem.value_dim)
    if are_pairs(problem, pass_):
        return 1
    # Two sums fill the registers that one does with vectors twice as long. A jvp has logits twice,
    # too.
    if longest > (64 if pass_ == DKV else 128) or pass_ in (BACKWARD, JVP):
        return 2
    if has_parts(problem) and not _producers_have_registers(problem, pass_):
        return 2
    # So does the search for tiles of hidden keys
    if problem.has_key_mask and pass_ == DKV and problem.rank == 3 and is_dilated(problem):
        return 2
    return 3


@lru_cache(maxsize=1024)
def form_of(problem: Problem, device: Device, pass_: Pass, warpgroups: int) -> Form:
    """The form for these dimensions: as much of shared memory as there is holds boxes."""
    longest = max(problem.head_dim, problem.value_dim)
    columns = 128 if longest <= {FORWARD: 128, JVP: 64, BACKWARD: 64}.get(pass_, 0) else 64
    form = Form(
        warpgroups, columns, stages=2, row_slots=warpgroups, pairs=are_pairs(problem, pass_)
    )
    if shared_bytes(problem, form, pass_) > device.shared_memory and pass_ == DQ:
        form = form._replace(columns=32)
    if longest > 128 and pass_ in (DQ, DKV):
        return form  # rings of three take registers, which are few
    # Where warpgroups read each other's rows, those of a tile come together
    slots = warpgroups if pass_.adds else 1
    rows, boxes = (("row_slots", slots),) * (warpgroups // slots), (("stages", 1),) * 2
    # Gradients of keys release queries late: more boxes are better than the next tile's keys
    for bigger, by in boxes + rows if pass_ == DKV else rows + boxes:
        candidate = form._replace(**{bigger: getattr(form, bigger) + by})
        if shared_bytes(problem, candidate, pass_) <= device.shared_memory:
            form = candidate
    return form


def _producers_have_registers(problem: Problem, pass_: Pass) -> bool:
    """Whether three warpgroups leave the producers enough registers for the windows of parts.

    A key mask takes some, too.
    """
    if is_dilated(problem) or (problem.has_key_mask and pass_ != FORWARD):
        return False
    return (
        pass_ in (FORWARD, DKV)
        or problem.rank == 1
        or max(problem.head_dim, problem.value_dim) <= 64
    )


def multiplies_ahead(problem: Problem, form: Form, pass_: Pass) -> bool:
    """Whether products of a box begin before the last one of the box before it.

    For that consumers take registers from the producers, who need them for dilation, the windows
    of parts, and masks; nor have consumers any for a scale that is not positive. Along three axes
    it gains nothing (bench/NOTES.md).
    """
    if pass_ != DKV or form.warpgroups != 2 or problem.rank == 3 or problem.scale <= 0:
        return False
    return not (is_dilated(problem) or has_parts(problem) or problem.has_key_mask)


def _aligned(size: int) -> int:
    return math.ceil(size / 16) * 16


def shared_bytes(problem: Problem, form: Form, pass_: Pass) -> int:
    """Bytes of `SharedMemory` of cuda/hopper/shared.cuh."""
    if form.cluster:
        return _chunk_bytes(problem, form)
    rank = problem.rank
    qk_lines, vo_lines = (math.ceil(dim / LINE) for dim in (problem.head_dim, problem.value_dim))
    coordinates = form.warpgroups * most_coordinates(rank)
    row_lines = qk_lines if pass_ in (FORWARD, JVP) else qk_lines + vo_lines
    lines = form.row_slots * ROWS * row_lines + form.stages * form.columns * (qk_lines + vo_lines)
    lines *= 2 if pass_.moves else 1  # as many for tangents
    masked = has_masked_columns(problem, pass_)
    size = 128 * lines
    size += form.stages * (8 * form.columns + 128 if pass_.rows_are_keys else 16)  # statistics
    if pass_.adds:
        # SumMemory: dS of all warpgroups, of two boxes; contributions to dQ; units of four boxes
        rows = form.warpgroups * ROWS
        size += 2 * rows * form.columns * 2 + rows * 4 * LINE + 4 * 4 * form.columns
    if form.pairs:
        size += 2 * ROWS * form.columns * 2  # PairMemory
    # MaskTables: words, prefixes, their bases, numbers, coordinates, window unions, hidden rows,
    # places of columns; what is empty takes a byte
    size += 16 * form.stages * (coordinates + masked)
    tables = 16 * (128 + 2 * rank) + 4 * rank + 64 * rank + 16 * coordinates + 1024 * rank
    hidden = problem.has_key_mask and pass_.adds
    tables += 2 * (form.warpgroups * ROWS // 8 if hidden else 1)
    size += _aligned(tables + (rank * form.columns if pass_.adds else 1))
    size += 2 * (28 + 16 * rank + 4 * masked)  # tiles
    size += 4 * form.stages * form.warpgroups + 4 + 4  # visibility, the first number, overflows
    axes = rank * (36 + axis_type(has_parts(problem)).itemsize)
    # The problem, the last box of columns, and barriers begin at multiples of 16
    size = _aligned(_aligned(_aligned(size) + axes + 188) + 4 * rank + 12)
    barriers = 4 + 2 * form.row_slots + 4 * form.stages + 8
    if masked:
        barriers += form.stages
    return _aligned(size + 8 * barriers)


def _chunk_bytes(problem: Problem, form: Form) -> int:
    """Bytes of `ChunkMemory` of cuda/hopper/chunk.cuh."""
    qk_lines, vo_lines = (math.ceil(dim / LINE) for dim in (problem.head_dim, problem.value_dim))
    lines = form.row_slots * ROWS * qk_lines + form.stages * form.columns * (qk_lines + vo_lines)
    return 128 * lines + 8 * (2 + form.warpgroups + 4 * form.stages)


def has_masked_columns(problem: Problem, pass_: Pass) -> bool:
    return problem.has_key_mask and not pass_.rows_are_keys


def count_seen_boxes(problem: Problem, plan: HopperPlan, pass_: Pass) -> tuple[int, int]:
    """`SeenBoxes` of cuda/hopper/seen.cuh: places of tiles, and boxes of columns of each.

    Tiles of all heads at a place count once. Parts have as many boxes as there can be, wherever
    they start.
    """
    most = 1
    for axis, *rows, columns in zip(
        problem.axes, plan.row_box, plan.warpgroups, plan.column_box, strict=True
    ):
        most *= math.ceil(count_unions(axis, *rows, pass_).widest_block / columns)
    return problem.batch * count(problem, plan, pass_).blocks, most


def sum_granules(problem: Problem, lead: int) -> int:
    """Granules, of all heads and batch entries, of the sums of dQ; `lead` is `granule_lead`."""
    *others, last = problem.tokens
    return problem.batch * problem.heads * math.prod(others) * math.ceil((last + lead) / GRANULE)


def granule_sums(problem: Problem) -> int:
    """Sums of dQ of a granule: those of whole lines."""
    return GRANULE * math.ceil(problem.head_dim / LINE) * LINE


def sum_bytes(problem: Problem) -> int:
    """Bytes of the sums of dQ, at most."""
    return sum_granules(problem, GRANULE - 1) * granule_sums(problem) * 4


def takes_first_axis_first(problem: Problem, plan: HopperPlan) -> bool:
    """Whether tiles that follow each other are neighbors along the first axis, not the last.

    Of the queries that tiles at work have in their window unions, and of their sums, as few as may
    be should take room in the cache.
    """
    axes = range(problem.rank)
    return _at_work(problem, plan, axes) < _at_work(problem, plan, axes[::-1])


AT_WORK = 132
"""Tiles that are worked on at the same time, by an H200."""


def _at_work(problem: Problem, plan: HopperPlan, order: Iterable[int]) -> int:
    """About how many queries tiles at work see, if they follow each other along axes in `order`."""
    left, queries = AT_WORK, 1
    for r in order:
        axis, size = problem.axes[r], plan.tile_box[r]
        tiles = math.ceil(axis.key_length / size)
        queries *= min(axis.length, min(left, tiles) * size + axis.kernel_size - 1)
        left = math.ceil(left / tiles)
    return queries


def most_coordinates(rank: int) -> int:
    """`kMostCoordinates` of cuda/hopper/mask.cuh: the most that a box of rows may have."""
    return ROWS if rank == 1 else 36


# Division of tiles


class Division(NamedTuple):
    """How tiles are divided among blocks.

    Where the last round has so few tiles that most multiprocessors would be idle, those tiles are
    divided: each block takes some of the warpgroups.
    """

    tiles: int
    whole: int
    """Tiles that are not divided; blocks begin with them."""
    parts: int
    """Of each of the others."""
    shares: int = 1
    """Of the boxes of every tile, if blocks take one share each."""

    @property
    def blocks(self) -> int:
        """What blocks take, one after another: whole tiles and parts, or one share."""
        return (self.whole + (self.tiles - self.whole) * self.parts) * self.shares


def division(problem: Problem, plan: HopperPlan, device: Device, pass_: Pass = FORWARD) -> Division:
    """The division of all tiles."""
    heads = problem.batch * pass_.heads(problem) // plan.heads
    tiles = count(problem, plan, pass_).blocks * heads
    if plan.form.cluster:
        return Division(tiles, tiles, 1, plan.form.cluster)
    multiprocessors = max(device.sm_count, 1)
    last = tiles % multiprocessors
    # Others have no rows, where a tile is longer than the layout
    warpgroups = plan.heads * math.prod(
        min(n, math.ceil(math.ceil(pass_.length(axis) / axis.dilation) / box))
        for axis, n, box in zip(problem.axes, plan.warpgroups, plan.row_box, strict=True)
    )
    parts = 1
    # In the backward pass a warpgroup needs what the others make
    while not pass_.adds and last and parts < warpgroups and last * (parts + 1) <= multiprocessors:
        parts += 1
    return Division(tiles, tiles - last if parts > 1 else tiles, parts)


def count(problem: Problem, plan: HopperPlan, pass_: Pass = FORWARD) -> WalkCounts:
    """The counts of one row head and one column head, the additional keys left out."""
    along = [
        count_walk(axis, *sizes, pass_, is_last)
        for axis, is_last, *sizes in zip(
            problem.axes,
            last_of(problem.rank),
            plan.row_box,
            plan.warpgroups,
            plan.column_box,
            strict=True,
        )
    ]
    return WalkCounts(*(math.prod(values) for values in zip(*along, strict=True)))


# Boxes that are loaded


def span(extent: int, dilation: int) -> int:
    """Tokens from the first to the last of `extent` tokens of a dilation group."""
    return (extent - 1) * dilation + 1


def pieces(problem: Problem, box: Box) -> int:
    """Loads along the first axis that bring a box."""
    count = 1
    while span(box[0] // count, problem.axes[0].dilation) > LONGEST_SPAN:
        count *= 2
    return count
