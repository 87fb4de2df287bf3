"""Which kind of kernels a pass takes: the one whose plan is expected to be the fastest."""

from __future__ import annotations

import itertools
from functools import lru_cache

from cuneigh._backends.fused import plan as fused_plan
from cuneigh._backends.fused.passes import parts, passes
from cuneigh._backends.fused.plan import FusedPlan
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._backends.fused.small.plan import SmallPlan
from cuneigh._backends.fused.split import plan as split_plan
from cuneigh._backends.fused.split.plan import SplitPlan
from cuneigh._device import Device
from cuneigh._gpu.passes import FORWARD, Pass
from cuneigh._gpu.rates import H200
from cuneigh._problem import Problem

Plan = FusedPlan | SmallPlan | SplitPlan


@lru_cache(maxsize=1024)
def choose_plan(
    problem: Problem,
    device: Device,
    pass_: Pass = FORWARD,
    small_windows: bool = True,
    few_queries: bool = True,
) -> Plan:
    """The plan for `device`.

    `small_windows` and `few_queries`: whether the kernels for these can read the arrays.
    """
    small = small_plan.make_plan(problem, device, pass_) if small_windows else None
    split = split_plan.make_plan(problem, device, pass_) if few_queries else None
    plan = fused_plan.make_plan(problem, device, pass_)
    cycles = fused_plan.cost(problem, plan, pass_) * problem.batch * pass_.heads(problem)
    multiprocessors = max(device.sm_count, 1)
    others: list[tuple[float, Plan]] = []
    if small is not None:
        # The other cost model has this, too; nothing hides it where all blocks begin at once
        start = small_plan.constants(pass_).start * multiprocessors
        others.append((small_plan.cost(problem, small, device, pass_) - start, small))
    if split is not None:
        # Few blocks leave most multiprocessors idle
        blocks = fused_plan.count(problem, plan, pass_).blocks * problem.batch * problem.heads
        cycles *= max(multiprocessors / blocks, 1.0)
        others.append((split_plan.cost(problem, split, device), split))
    return min([*others, (cycles, plan)], key=lambda pair: pair[0])[1]


TRIED = 8
"""Plans of each kind that tuning measures for one pass."""


@lru_cache(maxsize=1024)
def plans_to_try(problem: Problem, device: Device, pass_: Pass) -> tuple[Plan, ...]:
    """The plans worth measuring, of all kinds, those expected to be the fastest first."""
    plans: list[Plan] = [choose_plan(problem, device, pass_)]
    plans += split_plan.plans_to_try(problem, device, pass_, TRIED)
    plans += fused_plan.plans_to_try(problem, device, pass_, TRIED)
    plans += small_plan.plans_to_try(problem, device, pass_, TRIED)
    return tuple(dict.fromkeys(plans))


def plans(problem: Problem, device: Device) -> dict[str, tuple[Plan, ...]]:
    """`plans_to_try` of every pass of an operation, by its name."""
    return {pass_.name: plans_to_try(problem, device, pass_) for pass_ in passes(problem)}


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call with the plans for `device` is expected to take on an H200."""
    milliseconds = 0.0
    if problem.operation == "hvp":
        milliseconds += predicted_ms(problem.but("jvp"), device)
    of = [part for _, part in parts(problem)]
    for part, pass_ in itertools.product(of, passes(problem)):
        plan = choose_plan(part, device, pass_)
        if isinstance(plan, SplitPlan):
            milliseconds += split_plan.predicted_ms(part, plan, device)
            continue
        if isinstance(plan, SmallPlan):
            cycles = small_plan.cost(part, plan, device, pass_)
        else:
            cycles = fused_plan.cost(part, plan, pass_) * part.batch * pass_.heads(part)
        milliseconds += H200.launch_ms + cycles / H200.cycles
    return milliseconds
