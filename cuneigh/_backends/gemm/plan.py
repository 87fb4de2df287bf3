"""How the batched-GEMM backend cuts a problem into tiles and chunks: exact counts, no GPU needed.

A tile is a box of queries of one dilation group, for one batch and the query heads that share
a key head, and its halo: a box of keys that holds every window of those queries. The boxes of one
problem all have the same extents and so do their halos, so that a strided batch of matrix products
covers many of them. A chunk is as many tiles as fit in the workspace.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh import _settings
from cuneigh._device import Device
from cuneigh._gpu import rates as gpu_rates
from cuneigh._gpu.linear import Speed
from cuneigh._gpu.rates import CACHE_BYTES, MEMORY_BYTES
from cuneigh._problem import DTYPES, Problem
from cuneigh._window import Axis

NAME = "gemm"

WORKSPACE_BYTES = 512 << 20
"""Workspace for the tiles of a chunk unless CUNEIGH_WORKSPACE_BYTES says otherwise."""

MOST_QUERIES = 256
"""Queries of a box along one axis: the kernels keep what each of them sees in shared memory."""

MOST_TILES = 65535
"""Tiles of a chunk: what one launch of a batch takes on every GPU."""

COLUMNS = 8
"""Rows of a dense matrix are padded to a multiple of this, so that they stay aligned."""

MOST_COLUMNS = 1 << 30
"""Columns of a tile that its kernels can count."""


class Cut(NamedTuple):
    """One axis cut into boxes of `size` queries."""

    size: int
    boxes: int
    halo: int
    """Keys that hold the windows of any box: the longest of their unions."""


@dataclass(frozen=True, slots=True)
class GemmPlan:
    """The tiles of one problem and what they take."""

    cuts: tuple[Cut, ...]
    rows: int
    """Queries of a tile, those of all heads of its group."""
    columns: int
    """Keys of a tile, the additional ones and padding included."""
    tiles: int
    tile_bytes: int
    sum_bytes: int
    """Workspace that the limit does not count: float32 sums of the gradients of half-precision keys
    and values, of one pair of a batch and a key head, where a pair has more tiles than a chunk."""
    chunk: int
    """Tiles that are worked on at a time: those of whole pairs of a batch and a key head, or some
    of one pair."""
    direct: bool
    """Whether the products read and write tokens where they are: nothing is packed."""
    milliseconds: float
    """Predicted time."""

    def __str__(self) -> str:
        box = "x".join(map(str, self.box))
        how = "in place" if self.direct else "packed"
        size = f"{self.rows} by {self.columns}"
        return (
            f"boxes of {box} queries, {self.tiles} tiles of {size}, {self.chunk} at a time, {how}"
        )

    @property
    def box(self) -> tuple[int, ...]:
        return tuple(cut.size for cut in self.cuts)

    @property
    def boxes(self) -> tuple[int, ...]:
        return tuple(cut.boxes for cut in self.cuts)

    @property
    def halo(self) -> tuple[int, ...]:
        return tuple(cut.halo for cut in self.cuts)

    @property
    def keys(self) -> int:
        """Keys of a halo."""
        return math.prod(self.halo)

    @property
    def pair_tiles(self) -> int:
        """Tiles of one batch and key head."""
        return math.prod(self.boxes)

    @property
    def chunk_bytes(self) -> int:
        """Workspace of the tiles of a chunk."""
        return self.chunk * self.tile_bytes

    @property
    def bytes(self) -> int:
        """All of the workspace."""
        return self.chunk_bytes + self.sum_bytes

    def packets(self, problem: Problem) -> int:
        """Packets of 16 bytes of a row of products."""
        return self.columns * DTYPES[problem.accumulator] // 16

    def lanes(self, problem: Problem) -> int:
        """Lanes that share a row of products: as few as hold four packets each, up to a warp."""
        packets = self.packets(problem)
        return next((lanes for lanes in (4, 8, 16) if packets <= 4 * lanes), 32)

    def chunks(self) -> list[range]:
        """The tiles of every chunk, in order. No chunk holds parts of two pairs."""
        if self.chunk >= self.pair_tiles:
            spans = [range(self.tiles)]
        else:
            spans = [
                range(first, first + self.pair_tiles)
                for first in range(0, self.tiles, self.pair_tiles)
            ]
        return [
            span[first : first + self.chunk]
            for span in spans
            for first in range(0, len(span), self.chunk)
        ]


def workspace_limit() -> int:
    """Bytes of workspace that the tiles of a chunk may take."""
    given = _settings.WORKSPACE_BYTES.read()
    return WORKSPACE_BYTES if given is None else given


def allows_tf32() -> bool:
    """Whether products may round float32 factors to TF32: CUNEIGH_ALLOW_TF32=1."""
    return bool(_settings.ALLOW_TF32.read())


def is_backward(problem: Problem) -> bool:
    return problem.operation.endswith("backward")


class Work(NamedTuple):
    """The rates of one kind of operations: by default what was fitted to an H200."""

    memory_bytes: Speed = MEMORY_BYTES
    cache_bytes: Speed = CACHE_BYTES
    float32_flops: Speed = Speed(38e9)
    float64_flops: Speed = Speed(38e9)
    """Operations of matrix products that are bound by arithmetic, in a millisecond."""
    tile_ms: float = 4e-6
    chunk_ms: float = 0.02
    """Starting and ending a tile, and the launches of a chunk."""
    call_ms: float = 0.055
    """What the host takes for a call, at least; it cannot be captured in a CUDA graph."""


class Rates(NamedTuple):
    """What predictions are made of (bench/NOTES.md says how it was measured)."""

    results: Work = Work()
    gradients: Work = Work(call_ms=0.13)

    def of(self, problem: Problem) -> Work:
        return self.gradients if is_backward(problem) else self.results


RATES = Rates()


def plan_of(problem: Problem, device: Device, contiguous: bool) -> GemmPlan:
    """The plan for `device` under the limits that the environment sets."""
    rates = gpu_rates.of(NAME, device, RATES)
    return make_plan(problem, workspace_limit(), allows_tf32(), contiguous, rates)


def model(problem: Problem, device: Device, plans: Mapping[str, Any], rates: Rates) -> Any:
    """The predicted milliseconds of a plan, by operation, with these rates."""
    plan: GemmPlan = plans[problem.operation]
    chunks = math.ceil(plan.tiles / plan.chunk)
    size = plan.rows, plan.columns, plan.tiles, chunks
    on_gpu = predicted(problem, *size, allows_tf32(), plan.direct, rates)
    return max(on_gpu, rates.of(problem).call_ms)


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call is expected to take, in milliseconds."""
    rates = gpu_rates.of(NAME, device, RATES)
    return max(plan_of(problem, device, contiguous=True).milliseconds, rates.of(problem).call_ms)


@lru_cache(maxsize=8192)
def cut_axis(axis: Axis, size: int) -> Cut:
    """The boxes of `size` queries along an axis, and the longest union of their windows.

    Groups have one of two lengths, those of the first and the last group.
    """
    longer = axis.length % axis.dilation
    boxes = halo = 0
    for group, count in ((0, longer), (axis.dilation - 1, axis.dilation - longer)):
        if count == 0:
            continue
        length = axis.group_length(group)
        groups: npt.NDArray[np.int64] = np.full(math.ceil(length / size), group, np.int64)
        first = size * np.arange(len(groups), dtype=np.int64)
        begin, _ = axis.window(first, groups)
        _, end = axis.window(np.minimum(first + size, length) - 1, groups)
        boxes += count * len(first)
        halo = max(halo, int((end - begin).max(initial=0)))
    return Cut(size, boxes, halo)


@lru_cache(maxsize=1024)
def make_plan(
    problem: Problem,
    limit: int = WORKSPACE_BYTES,
    tf32: bool = False,
    contiguous: bool = True,
    rates: Rates = RATES,
) -> GemmPlan:
    """The fastest plan within `limit` bytes, by the cost model; if there is none, the smallest.

    `contiguous`: whether the strides of tokens and heads let products read them in place.
    """
    best = smallest = None
    for cuts in candidates(problem):
        for direct in (False, True):
            candidate = make(problem, cuts, limit, tf32, direct and contiguous, rates)
            if candidate is None or (direct and not candidate.direct):
                continue
            if smallest is None or candidate.tile_bytes < smallest.tile_bytes:
                smallest = candidate
            if candidate.chunk_bytes <= limit and (
                best is None or candidate.milliseconds < best.milliseconds
            ):
                best = candidate
    assert smallest is not None
    return best or smallest


def candidates(problem: Problem) -> list[tuple[Cut, ...]]:
    """The boxes to choose from: sizes that divide the groups evenly, and powers of two."""
    per_axis = []
    for axis in problem.axes:
        length = axis.group_length(0)
        longest = min(length, MOST_QUERIES)
        even = {math.ceil(length / count) for count in range(1, 17)}
        divisors = {size for size in range(8, longest + 1) if length % size == 0}
        powers = {1 << exponent for exponent in range(9)}
        few = {size for size in even | powers | divisors if size <= longest}
        per_axis.append([cut_axis(axis, size) for size in sorted(few)])
    most = MOST_QUERIES if problem.rank == 1 else 2 * MOST_QUERIES
    return [
        cuts for cuts in itertools.product(*per_axis) if math.prod(cut.size for cut in cuts) <= most
    ]


def make(
    problem: Problem,
    cuts: tuple[Cut, ...],
    limit: int,
    tf32: bool,
    direct: bool,
    rates: Rates = RATES,
) -> GemmPlan | None:
    """The plan for given boxes; None if its matrices would be too long.

    With `direct` the products read tokens in place if `in_place` finds that they can.
    """
    additional = problem.additional or 0
    if direct:
        direct_cuts = in_place(problem, cuts)
        cuts, direct = direct_cuts or cuts, direct_cuts is not None
    rows = problem.group_size * math.prod(cut.size for cut in cuts)
    columns = round_up(math.prod(cut.halo for cut in cuts) + additional, COLUMNS)
    if columns > MOST_COLUMNS:
        return None
    pair_tiles = math.prod(cut.boxes for cut in cuts)
    tiles = pair_tiles * problem.batch * problem.kv_heads
    tile_bytes = matrix_bytes(problem, rows, columns, direct)
    most = min(max(limit // tile_bytes, 1), MOST_TILES)
    if most >= pair_tiles:
        sums = 0
        chunk = balanced(tiles, most // pair_tiles * pair_tiles, pair_tiles)
    else:
        sums = sum_bytes(problem)
        chunk = balanced(pair_tiles, most, 1)
    size = rows, columns, tiles, math.ceil(tiles / chunk)
    milliseconds = predicted(problem, *size, tf32, direct, rates)
    return GemmPlan(cuts, rows, columns, tiles, tile_bytes, sums, chunk, direct, milliseconds)


def in_place(problem: Problem, cuts: tuple[Cut, ...]) -> tuple[Cut, ...] | None:
    """The cuts that let products read and write tokens where they are; None if these cannot be.

    One stride must lead from row to row of a matrix. So boxes and halos are whole along all axes
    but the first, nothing but a single axis is dilated, and no two heads or kinds of keys share a
    matrix. Boxes are full, halos stay inside the layout, and the address of every matrix is a
    multiple of 16.
    """
    axis, *inner = problem.axes
    cut, *inner_cuts = cuts
    packet = 16 // DTYPES[problem.dtype]
    inner_tokens = math.prod(other.length for other in inner)
    halo = round_up(cut.halo, COLUMNS // math.gcd(inner_tokens, COLUMNS))
    if (
        problem.operation != "jvp"  # which has more matrices than those of one tile may be
        and problem.group_size == 1
        and not problem.additional
        and axis.length == axis.key_length
        and axis.length % (axis.dilation * cut.size) == 0
        and halo <= axis.length // axis.dilation
        and (axis.dilation == 1 or not inner)
        and all(other.dilation == 1 for other in inner)
        and all(other.length == taken.size for other, taken in zip(inner, inner_cuts, strict=True))
        and problem.head_dim % packet == 0
        and problem.value_dim % packet == 0
    ):
        whole = (taken._replace(halo=taken.size) for taken in inner_cuts)
        return (cut._replace(halo=halo), *whole)
    return None


def balanced(total: int, most: int, unit: int) -> int:
    """The size of a chunk when `total` is cut into as few equal chunks of whole units as can be."""
    chunks = math.ceil(total / most)
    return round_up(math.ceil(total / chunks), unit)


def round_up(n: int, unit: int) -> int:
    return math.ceil(n / unit) * unit


def matrix_bytes(problem: Problem, rows: int, columns: int, direct: bool) -> int:
    """Workspace of one tile: its packed rows, its dense products, and gradients of its halo."""
    element, number = DTYPES[problem.dtype], DTYPES[problem.accumulator]
    shared = element == number  # weights overwrite the products
    product, weights = rows * columns * number, rows * columns * element
    uses_key, uses_value = USES[problem.operation]
    dims = uses_key * problem.head_dim + uses_value * problem.value_dim
    packed = 0 if direct else (rows + columns) * dims * element
    addresses = 8 * MOST_MATRICES * direct
    halos = columns * dims * number
    match problem.operation:
        case "forward":
            return product + (not shared) * weights + packed + addresses
        case "backward":
            query = 0 if direct else rows * problem.head_dim * element
            return 2 * product + 2 * (not shared) * weights + packed + query + halos + addresses
        case "jvp":
            return 2 * product + 2 * (not shared) * weights + 2 * packed
        case "qk":
            return product + packed + addresses
        case "qk_backward":
            query = 0 if direct else rows * problem.head_dim * element
            return weights + packed + query + halos + addresses
        case "av":
            return weights + packed + addresses
        case "av_backward":
            return product + weights + packed + halos + addresses
        case "hvp":
            raise AssertionError("`unsupported` refuses it")


USES = {
    "forward": (True, True),
    "backward": (True, True),
    "jvp": (True, True),
    "qk": (True, False),
    "qk_backward": (True, False),
    "av": (False, True),
    "av_backward": (False, True),
}
"""Whether an operation has to do with queries and keys, and with values and outputs."""

MOST_MATRICES = 12
"""Matrices of one tile."""


def sum_bytes(problem: Problem) -> int:
    """Workspace for the sums of one pair of a batch and a key head with more tiles than a chunk.

    Gradients whose dtype is the accumulator's are summed where they will be.
    """
    if not problem.operation.endswith("backward") or problem.dtype == problem.accumulator:
        return 0
    uses_key, uses_value = USES[problem.operation]
    dims = uses_key * problem.head_dim + uses_value * problem.value_dim
    keys = math.prod(problem.key_tokens) + (problem.additional or 0)
    return keys * dims * DTYPES[problem.accumulator]


# The cost model

GRADIENTS = 1.9
"""What gradients take beyond the time of their bytes."""


def predicted(
    problem: Problem,
    rows: int,
    columns: int,
    tiles: int,
    chunks: int,
    tf32: bool,
    direct: bool,
    rates: Rates,
) -> Any:
    """Milliseconds of one call: its products and its passes over memory, one after another."""
    element, number = DTYPES[problem.dtype], DTYPES[problem.accumulator]
    uses_key, uses_value = USES[problem.operation]
    dims = uses_key * problem.head_dim + uses_value * problem.value_dim
    gradients, work = is_backward(problem), rates.of(problem)
    # Bytes of one element of a dense product that matrix products move, and that kernels move.
    in_products, in_kernels = {
        "forward": (number + element, number + element),
        "backward": (2 * number + 3 * element, 2 * number + 2 * element),
        "jvp": (4 * number + 3 * element, 3 * number + 3 * element),
        "qk": (number, number),
        "qk_backward": (2 * element, element),
        "av": (element, element),
        "av_backward": (number + element, number + element),
    }[problem.operation]
    elements = rows * columns
    traffic: float = elements * in_products + 2 * rows * dims * element
    if gradients:
        traffic += columns * dims * number
    key_bytes = columns * dims * element
    arithmetic: Any = 0.0
    by_dtype = {"float32": work.float32_flops, "float64": work.float64_flops}
    if problem.dtype in by_dtype and not (tf32 and problem.dtype == "float32"):
        products = {"backward": 2.5, "jvp": 3.0, "forward": 1.0}.get(
            problem.operation, 1.0 + gradients
        )
        # Blocks of a product overhang its matrices, and each has a beginning and an end.
        area = (round_up(rows, 8) + 8) * (round_up(columns, 32) + 16)
        arithmetic = 2.0 * area * dims * products / by_dtype[problem.dtype]
    else:
        traffic += traffic * (round_up(rows, 64) / rows - 1) / 2
    moved = traffic / work.memory_bytes
    kernels = elements * in_kernels / work.memory_bytes
    if direct:
        moved += key_bytes / work.cache_bytes
    else:  # gathered: read mostly from the cache, written, read by the product; and scattered
        moved += key_bytes / work.memory_bytes
        kernels += (1.4 * key_bytes + 3 * rows * dims * element) / work.memory_bytes
    if gradients:
        kernels += columns * dims * number / work.memory_bytes
        kernels, moved = GRADIENTS * kernels, GRADIENTS * moved
    return tiles * (max(moved, arithmetic) + kernels + work.tile_ms) + chunks * work.chunk_ms
