"""How long the Hopper kernels are expected to take with a plan: fits, and what is made of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from cuneigh._backends.hopper.plan import (
    ROWS,
    Form,
    HopperPlan,
    count,
    division,
    multiplies_ahead,
)
from cuneigh._device import Device
from cuneigh._gpu.boxes import WalkCounts
from cuneigh._gpu.costs import Cycles, begun, clusters_at_once
from cuneigh._gpu.passes import BACKWARD, DKV, DQ, FORWARD, JVP, Pass
from cuneigh._problem import Problem

PART_OF_ROUND = {1: 1.0, 2: 0.7, 3: 0.45}
"""How long a round takes in which blocks work on parts of tiles, by the number of parts.

A warpgroup alone leaves much of the tensor cores' time unused, hence more than its share.
"""

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


OF_CHUNK = Cycles(
    1 / 3400, logit=0.02, copy=0.0, box=1400, row=4.5, block=1000, mask=0.0, start=500
)
"""Of tiles of few queries; `row` is of what the blocks of a cluster exchange."""
OF_BACKWARD = Cycles(1 / 1570, logit=0.0, copy=0.0, box=800, row=0.0, block=13_000, mask=0.024)
OF_SHORT_BACKWARD = Cycles(
    1 / 3000, logit=0.0, copy=0.0, box=2_800, row=0.0, block=15_000, mask=0.02, start=20_000
)
"""Of vectors of at most 64 elements."""
OF_DQ = Cycles(1 / 1810, logit=0.051, copy=0.0, box=53, row=0.0, block=7_230, mask=0.0491)
OF_DKV = Cycles(1 / 2510, logit=0.0, copy=0.0, box=1_420, row=0.0, block=8_630, mask=0.0504)
OF_DKV_AHEAD = OF_DKV._replace(box=1_100)
"""Of those that `multiplies_ahead` names."""
OF_LONG_DQ = Cycles(
    1 / 4700, logit=0.0, copy=0.0, box=1_760, row=0.0, block=8_090, mask=0.0314, start=8_000
)
"""Of vectors of more than 128 elements."""
OF_LONG_DKV = Cycles(
    1 / 2670, logit=0.0, copy=0.0, box=1_120, row=0.0, block=6_350, mask=0.129, start=12_000
)
"""Of such vectors, where pairs of warpgroups share a box."""
OF_SHORT_JVP = Cycles(
    1 / 2400, logit=0.0997, copy=0.0, box=297, row=0.0, block=2_660, mask=0.0332, start=23_000
)
"""Of vectors of at most 64 elements."""
OF_JVP = Cycles(1 / 1815, logit=0.0, copy=0.0, box=576, row=0.0, block=6_010, mask=0.0785)


class Rates(NamedTuple):
    """The fits of all kernels, those of an H200 unless others are given."""

    short: Cycles = SHORT
    middle: Cycles = MIDDLE
    long: Cycles = LONG
    chunk: Cycles = OF_CHUNK
    short_backward: Cycles = OF_SHORT_BACKWARD
    backward: Cycles = OF_BACKWARD
    dq: Cycles = OF_DQ
    dkv: Cycles = OF_DKV
    dkv_ahead: Cycles = OF_DKV_AHEAD
    long_dq: Cycles = OF_LONG_DQ
    long_dkv: Cycles = OF_LONG_DKV
    short_jvp: Cycles = OF_SHORT_JVP
    jvp: Cycles = OF_JVP

    def cycles_of(self, problem: Problem, form: Form, pass_: Pass) -> Cycles:
        """The fit for a kernel."""
        if form.cluster:
            return self.chunk
        if multiplies_ahead(problem, form, pass_):
            return self.dkv_ahead
        longest = max(problem.head_dim, problem.value_dim)
        if pass_ in (DQ, DKV) and longest > 128:
            return self.long_dq if pass_ == DQ else self.long_dkv
        if pass_ in (DQ, DKV):
            return self.dq if pass_ == DQ else self.dkv
        if pass_ == BACKWARD:
            return self.short_backward if longest <= 64 else self.backward
        if pass_ == JVP:
            return self.short_jvp if longest <= 64 else self.jvp
        return self.short if longest <= 64 else self.middle if longest <= 128 else self.long


H200 = Rates()


def cost_of(
    problem: Problem, form: Form, counts: WalkCounts, heads: int, pass_: Pass, rates: Rates = H200
) -> Any:
    """Predicted cycles of all multiprocessors together for these counts of one head.

    The counts may be arrays, of those of many plans; `heads` are those of a tile.
    """
    cycles = rates.cycles_of(problem, form, pass_)
    logits = ROWS * form.columns
    dims = problem.head_dim + problem.value_dim
    walks = problem.group_size if pass_.rows_are_keys else 1  # one for each column head
    visits, full, loads = (walks * n for n in (counts.visits, counts.full, counts.loads))
    if not pass_.rows_are_keys:
        boxes = math.ceil((problem.additional or 0) / form.columns)
        visits = visits + counts.blocks * form.warpgroups * boxes
        full = full + counts.blocks * form.warpgroups * boxes
    visit = logits * (dims * pass_.products * cycles.product + cycles.logit)
    of_warpgroups = visits * visit + (visits - full) * logits * cycles.mask
    of_blocks = loads * cycles.box + counts.blocks * cycles.block
    return (of_warpgroups * heads + of_blocks) * problem.batch * (pass_.heads(problem) / heads)


def cost(
    problem: Problem,
    plan: HopperPlan,
    device: Device,
    pass_: Pass = FORWARD,
    rates: Rates = H200,
) -> Any:
    """Predicted cycles of all multiprocessors together, those that wait for the last included."""
    counts, form = count(problem, plan, pass_), plan.form
    work, multiprocessors = division(problem, plan, device, pass_), max(device.sm_count, 1)
    if form.cluster:
        # The time of a tile is that of the block with most boxes
        share = math.ceil(counts.longest / form.cluster) / max(counts.longest, 1)
        of_share = {name: share * getattr(counts, name) for name in ("loads", "visits", "full")}
        counts = counts._replace(**of_share)
        at_once = clusters_at_once(multiprocessors, form.cluster)
        rounds: float = math.ceil(work.tiles / at_once)
    else:
        rounds = work.whole // multiprocessors
        if work.tiles > rounds * multiprocessors:
            rounds += PART_OF_ROUND[work.parts]
    cycles = cost_of(problem, form, counts, plan.heads, pass_, rates)
    if form.cluster > 1:
        exchanged = form.warpgroups * ROWS * problem.value_dim // 8  # times 16 bytes
        cycles += work.tiles * exchanged * rates.cycles_of(problem, form, pass_).row
    cycles *= rounds * multiprocessors / work.tiles
    start = rates.cycles_of(problem, form, pass_).start * begun(problem)
    return cycles + start * multiprocessors
