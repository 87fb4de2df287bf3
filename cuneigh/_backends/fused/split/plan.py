"""How the kernels for few queries cut a problem, and how long they take: no GPU needed.

A block takes a box of rows: a few queries, each in the query heads that share a key head, so that
their keys are read once. It goes over boxes of keys, which all lie in the window union of its rows.
Where there are fewer such blocks than a GPU works on at a time, the keys are split among several.
What these have summed up is joined by themselves, if they are a cluster, or by a second kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from cuneigh._device import Device
from cuneigh._gpu.boxes import UnionCounts, count_unions
from cuneigh._gpu.costs import blocks_in_shared_memory, clusters_at_once
from cuneigh._gpu.linear import Speed
from cuneigh._gpu.passes import FORWARD, Pass
from cuneigh._gpu.rates import CACHE_BYTES, LAUNCH_MS, MEMORY_BYTES
from cuneigh._gpu.rates import CYCLES as ALL_CYCLES
from cuneigh._problem import Problem
from cuneigh._window import Promise

MOST_QUERIES = 64
"""Longer calls have blocks enough, and are bound by arithmetic."""
MOST_SPLITS = 128
CLUSTER_SIZE = 8
"""Blocks of a cluster: the most that every GPU has room for."""
LEAST_BOXES = 8
"""Boxes of keys below which there is nothing to split."""
SMALLEST_SCALE = 1e-37
"""Smaller scales are 0 in float32, where hidden logits would not stay hidden."""


class Form(NamedTuple):
    """What is compiled into a kernel beside dtype and dimensions."""

    row_tiles: int
    """Sixteens of rows of a warp."""
    row_warps: int
    """Warps with other rows."""
    key_warps: int
    """Warps with other keys of a box."""
    columns: int
    """Keys of a box."""
    stages: int
    """Boxes of keys in shared memory."""
    blocks: int
    """Blocks of a multiprocessor that registers are left for."""
    cluster: int = 1
    """Blocks of a cluster, which are all splits of a box of rows and join their sums; or 1."""

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles * self.row_warps

    @property
    def warps(self) -> int:
        return self.row_warps * self.key_warps


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """The cut of one problem. All but the form are run-time arguments."""

    form: Form
    queries: int
    """Of a box of rows."""
    heads: int
    """Query heads of a box of rows."""
    splits: int
    """Blocks that share the keys of a box of rows."""

    def __str__(self) -> str:
        form = self.form
        warps = f"{form.row_warps}x{form.key_warps} warps of {16 * form.row_tiles} rows"
        rows = f"{self.queries} queries of {self.heads} heads"
        splits = f"{self.splits} splits" + (" in a cluster" if form.cluster > 1 else "")
        return f"{warps}, {rows}, boxes of {form.columns} keys, {splits}"

    def split(self, splits: int) -> SplitPlan:
        """The same with other splits."""
        return replace(self, splits=splits)

    @property
    def is_joined_later(self) -> bool:
        """Whether a second kernel joins the sums of the splits."""
        return self.splits > self.form.cluster


def count(problem: Problem, plan: SplitPlan) -> UnionCounts:
    """The boxes of queries, and the keys that these see."""
    return count_unions(problem.axes[0], plan.queries, 1)


def blocks(problem: Problem, plan: SplitPlan) -> int:
    """Blocks of the kernel."""
    head_boxes = math.ceil(problem.group_size / plan.heads)
    boxes = count(problem, plan).blocks * head_boxes * problem.kv_heads * problem.batch
    return boxes * plan.splits


# Costs: cycles and rates of an H200, fitted to the times of bench/decode.py (bench/NOTES.md)

LATENCY = 320.0
"""Cycles of a block's box of keys apart from its products: a barrier, and a chain through them."""
START = 5070.0
"""Cycles until a block's first keys have come, and those at its end."""
BYTES = Speed(32.7)
"""Bytes that one multiprocessor receives in a cycle when others don't compete."""
PRODUCT = 1 / 171
"""Cycles of a multiply-add of the tensor cores, on one of four schedulers."""
CYCLES = 1.755e6
"""In a millisecond."""


class Rates(NamedTuple):
    """What predictions are made of: that of an H200 unless others are given."""

    latency: float = LATENCY
    start: float = START
    bytes: Speed = BYTES
    product: float = PRODUCT
    memory_bytes: Speed = MEMORY_BYTES
    cache_bytes: Speed = CACHE_BYTES
    launch_ms: float = LAUNCH_MS


H200 = Rates()


def predicted_ms(problem: Problem, plan: SplitPlan, device: Device, rates: Rates = H200) -> Any:
    """How long the launches of a plan are expected to take, in milliseconds."""
    form, keys = plan.form, count(problem, plan).widest_block
    beside = resident(problem, form, device)
    at_once = beside * max(device.sm_count, 1)
    if form.cluster > 1:
        at_once = clusters_at_once(at_once, form.cluster) * form.cluster
    total = blocks(problem, plan)
    busy = min(beside, math.ceil(total / max(device.sm_count, 1)))  # blocks of a multiprocessor
    dims = problem.head_dim + problem.value_dim
    box = form.columns * dims
    products = form.rows * box * rates.product / 4
    of_box = max(products + rates.latency, busy * products, busy * 2 * box / rates.bytes)
    walk = math.ceil(math.ceil(keys / form.columns) / plan.splits) * of_box
    rounds = math.ceil(total / at_once)
    key_bytes = (
        2
        * dims
        * problem.batch
        * problem.kv_heads
        * min(problem.key_tokens[0], count(problem, plan).warp_columns)
    )
    of_blocks = (rounds * walk + (rounds - 1) * rates.start) / CYCLES
    of_keys = max(key_bytes / rates.memory_bytes, of_blocks)
    milliseconds = rates.launch_ms + rates.start / CYCLES + of_keys
    if plan.is_joined_later:
        rows = problem.batch * problem.heads * problem.tokens[0]
        sums = 2 * 4 * (problem.value_dim + 2) * rows * plan.splits
        milliseconds += rates.launch_ms + sums / rates.cache_bytes
    return milliseconds


def cost(problem: Problem, plan: SplitPlan, device: Device, rates: Rates = H200) -> float:
    """The same in cycles of all multiprocessors together, the first launch left out."""
    milliseconds: float = predicted_ms(problem, plan, device, rates) - rates.launch_ms
    return milliseconds * ALL_CYCLES


# The choice of a plan


def takes(problem: Problem, pass_: Pass) -> bool:
    """Whether there is a kernel for this kind of problem."""
    return (
        pass_ == FORWARD
        and problem.rank == 1
        and problem.tokens[0] <= MOST_QUERIES
        and problem.dtype in ("float16", "bfloat16")
        and not problem.rpb_dtype
        and not problem.additional
        and not problem.has_key_mask
        and Promise.INSIDE in problem.promises
        and SMALLEST_SCALE < problem.scale < 1 / SMALLEST_SCALE
    )


@lru_cache(maxsize=1024)
def make_plan(
    problem: Problem, device: Device, pass_: Pass = FORWARD, rates: Rates = H200
) -> SplitPlan | None:
    """The plan expected to be the fastest on `device`; None if there is none."""
    plans = plans_to_try(problem, device, pass_, 1, rates)
    return plans[0] if plans else None


def plans_to_try(
    problem: Problem, device: Device, pass_: Pass, most: int, rates: Rates = H200
) -> list[SplitPlan]:
    """Those expected to be the fastest, the fastest first."""
    if not takes(problem, pass_):
        return []
    plans = candidates(problem, device)
    return sorted(plans, key=lambda plan: predicted_ms(problem, plan, device, rates))[:most]


def candidates(problem: Problem, device: Device) -> Iterator[SplitPlan]:
    """Every form with every number of splits that makes a difference."""
    for form in forms(problem, device):
        plan = whole(problem, form)
        boxes = math.ceil(count(problem, plan).widest_block / form.columns)
        if boxes < LEAST_BOXES:
            continue
        walks = {math.ceil(boxes / splits) for splits in range(1, MOST_SPLITS + 1)}
        numbers = {math.ceil(boxes / walk) for walk in walks}
        for splits in sorted(numbers) if form.cluster == 1 else [form.cluster]:
            yield plan.split(splits)


def whole(problem: Problem, form: Form) -> SplitPlan:
    """The plan of a form with as many rows a block as there may be, and one split."""
    heads = min(problem.group_size, form.rows)
    longest = math.ceil(problem.tokens[0] / problem.axes[0].dilation)
    return SplitPlan(form, min(form.rows // heads, longest), heads, 1)


# What is compiled into kernels


@lru_cache(maxsize=1024)
def forms(problem: Problem, device: Device) -> tuple[Form, ...]:
    """The forms that fit into registers, as the compiler reports, and into shared memory."""
    if device.capability < (8, 0):
        return ()
    short = max(problem.head_dim, problem.value_dim) <= 128
    shapes = [(1, 1, 4, 64, 1), (1, 4, 1, 64 if short else 32, 1)]
    if short:
        shapes += [(1, 2, 2, 64, 1), (2, 4, 1, 32, 1)]
    if device.capability >= (9, 0):  # with more rows another kernel joins faster
        shapes += [(1, 1, 8, 128, CLUSTER_SIZE)] * short + [(1, 1, 4, 64, CLUSTER_SIZE)]
    found: list[Form] = []
    for row_tiles, row_warps, key_warps, columns, cluster in shapes:
        blocks = 2 if short and row_tiles == 1 and key_warps < 8 else 1
        for stages in (3, 2):
            form = Form(row_tiles, row_warps, key_warps, columns, stages, blocks, cluster)
            if shared_bytes(problem, form) <= device.shared_memory:
                found.append(form)
                break
    return tuple(found)


def resident(problem: Problem, form: Form, device: Device) -> int:
    """Blocks that a multiprocessor works on at a time."""
    in_registers = max(form.blocks, 65536 // (256 * 32 * form.warps))
    return min(in_registers, blocks_in_shared_memory(device, shared_bytes(problem, form)))


def padded(dim: int) -> int:
    """The head dimension that a kernel is compiled for."""
    return math.ceil(dim / 16) * 16


def shared_bytes(problem: Problem, form: Form) -> int:
    """Bytes of `Smem` of cuda/fused/split/forward.cu."""

    def pitch(dim: int) -> int:
        """Bytes from one vector to the next: `kVectorPitch` of cuda/fused/vectors.cuh."""
        size = 2 * padded(dim)
        return size if size % 128 == 0 else size + 16

    key, value = pitch(problem.head_dim), pitch(problem.value_dim)
    boxes = form.stages * form.columns * (key + value)
    value_dim = padded(problem.value_dim)
    sums = form.key_warps * form.rows * 4 * (value_dim + 8 + 2)
    owned = form.rows * 4 * (value_dim + 2) if form.cluster > 1 else 0
    return max(boxes, sums) + owned + form.rows * (key + 16)
