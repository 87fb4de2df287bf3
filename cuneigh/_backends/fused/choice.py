"""Which kind of kernels a pass takes: the one whose plan is expected to be the fastest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from cuneigh._backends.fused import plan as fused_plan
from cuneigh._backends.fused.passes import parts, passes
from cuneigh._backends.fused.plan import FusedPlan
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._backends.fused.small import whole
from cuneigh._backends.fused.small.plan import SmallPlan
from cuneigh._backends.fused.small.whole import WholePlan
from cuneigh._backends.fused.split import plan as split_plan
from cuneigh._backends.fused.split.plan import SplitPlan
from cuneigh._device import Device
from cuneigh._gpu import rates as gpu_rates
from cuneigh._gpu.costs import begun
from cuneigh._gpu.passes import DKV, DQ, FORWARD, HVP_DQ, JVP, Pass
from cuneigh._gpu.rates import CYCLES, LAUNCH_MS
from cuneigh._problem import Problem

NAME = "fused"
Plan = FusedPlan | SmallPlan | SplitPlan | WholePlan
"""A `WholePlan` of dQ is one of all gradients: the passes after it are not launched."""


class Rates(NamedTuple):
    """What predictions are made of: by default what was fitted to an H200."""

    walks: fused_plan.Rates = fused_plan.H200
    """Of the kernels for windows of any size."""
    small: small_plan.Rates = small_plan.H200
    split: split_plan.Rates = split_plan.H200
    launch_ms: float = LAUNCH_MS


RATES = Rates()


def rates_of(device: Device) -> Rates:
    return gpu_rates.of(NAME, device, RATES)


def choose_plan(
    problem: Problem,
    device: Device,
    pass_: Pass = FORWARD,
    small_windows: bool = True,
    few_queries: bool = True,
    whole_groups: bool = True,
) -> Plan:
    """The plan for `device`.

    `small_windows`, `few_queries` and `whole_groups`: whether the kernels for these can read the
    arrays.
    """
    readable = small_windows, few_queries, whole_groups
    return _choose_plan(problem, device, pass_, *readable, rates_of(device))


@lru_cache(maxsize=1024)
def _choose_plan(
    problem: Problem,
    device: Device,
    pass_: Pass,
    small_windows: bool,
    few_queries: bool,
    whole_groups: bool,
    rates: Rates,
) -> Plan:
    small = split = None
    if small_windows:
        small = small_plan.make_plan(problem, device, pass_, rates.small)
    if few_queries:
        split = split_plan.make_plan(problem, device, pass_, rates.split)
    plan = fused_plan.make_plan(problem, device, pass_, rates.walks)
    cycles: float = _walk_cycles(problem, device, plan, pass_, rates.walks)
    cycles += CYCLES * _ms_before(problem, device, pass_, plan, rates)
    multiprocessors = max(device.sm_count, 1)
    others: list[tuple[float, Plan]] = []
    if small is not None:
        of_small: float = small_plan.cost(problem, small, device, pass_, rates.small)
        if not fused_plan.cycles_of(problem, pass_, rates.walks).start:
            # The other cost model has this, too; nothing hides it where all blocks begin at once
            start = rates.small.cycles_of(pass_).start * begun(problem)
            of_small -= start * multiprocessors
        others.append((of_small, small))
    if split is not None:
        others.append((split_plan.cost(problem, split, device, rates.split), split))
    if pass_ == DQ and whole_groups and (all_ := whole.make_plan(problem, device, rates.small)):
        after = _choose_plan(problem, device, DKV, small_windows, few_queries, False, rates)
        saved = _pass_ms(problem, device, DKV, after, rates) * CYCLES
        others.append((whole.cost(problem, all_, device, rates.small) - saved, all_))
    return min([*others, (cycles, plan)], key=lambda pair: pair[0])[1]


TRIED = 8
"""Plans of each kind that tuning measures for one pass."""


def plans_to_try(problem: Problem, device: Device, pass_: Pass) -> tuple[Plan, ...]:
    """The plans worth measuring, of all kinds, those expected to be the fastest first."""
    return _plans_to_try(problem, device, pass_, rates_of(device))


@lru_cache(maxsize=1024)
def _plans_to_try(problem: Problem, device: Device, pass_: Pass, rates: Rates) -> tuple[Plan, ...]:
    plans: list[Plan] = [_choose_plan(problem, device, pass_, True, True, True, rates)]
    plans += split_plan.plans_to_try(problem, device, pass_, TRIED, rates.split)
    plans += fused_plan.plans_to_try(problem, device, pass_, TRIED, rates.walks)
    plans += small_plan.plans_to_try(problem, device, pass_, TRIED, rates.small)
    if pass_ == DQ:
        plans += whole.plans_to_try(problem, device, TRIED, rates.small)
    return tuple(dict.fromkeys(plans))


def plans(problem: Problem, device: Device) -> dict[str, tuple[Plan, ...]]:
    """`plans_to_try` of every pass of an operation that is launched, by its name."""
    found = {}
    for pass_ in passes(problem):
        found[pass_.name] = plans_to_try(problem, device, pass_)
        if isinstance(found[pass_.name][0], WholePlan):
            break
    return found


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call with the plans for `device` is expected to take, in milliseconds."""
    rates, milliseconds = rates_of(device), 0.0
    for _, part in parts(problem):
        of = {
            pass_.name: _choose_plan(part, device, pass_, True, True, True, rates)
            for pass_ in passes(problem)
        }
        milliseconds += model(part, device, of, rates)
        if HVP_DQ.name in of:
            milliseconds += _ms_before(part, device, HVP_DQ, of[HVP_DQ.name], rates)
    return milliseconds


def _ms_before(problem: Problem, device: Device, pass_: Pass, plan: Plan, rates: Rates) -> float:
    """Milliseconds of what the kernels of a pass need: an hvp of any windows begins with a jvp."""
    if pass_ != HVP_DQ or not isinstance(plan, FusedPlan):
        return 0.0
    of, milliseconds = problem.but("jvp"), 0.0
    for _, part in parts(of):
        jvp = _choose_plan(part, device, JVP, True, True, True, rates)
        milliseconds += _pass_ms(part, device, JVP, jvp, rates)
    return milliseconds


def model(problem: Problem, device: Device, plans: Mapping[str, Any], rates: Rates) -> Any:
    """`predicted_ms` of attention or its gradients with these plans, by pass, and these rates."""
    milliseconds: Any = 0
    for pass_ in passes(problem):
        plan = plans[pass_.name]
        milliseconds = milliseconds + _pass_ms(problem, device, pass_, plan, rates)
        if isinstance(plan, WholePlan):
            break
    return milliseconds


def _pass_ms(problem: Problem, device: Device, pass_: Pass, plan: Plan, rates: Rates) -> Any:
    """Milliseconds of one pass."""
    if isinstance(plan, SplitPlan):
        return split_plan.predicted_ms(problem, plan, device, rates.split)
    if isinstance(plan, WholePlan):
        cycles = whole.cost(problem, plan, device, rates.small)
    elif isinstance(plan, SmallPlan):
        cycles = small_plan.cost(problem, plan, device, pass_, rates.small)
    else:
        cycles = _walk_cycles(problem, device, plan, pass_, rates.walks)
    return rates.launch_ms + cycles / CYCLES


def _walk_cycles(
    problem: Problem, device: Device, plan: FusedPlan, pass_: Pass, rates: fused_plan.Rates
) -> Any:
    """Cycles of all multiprocessors together."""
    counts = fused_plan.count(problem, plan, pass_)
    heads, multiprocessors = problem.batch * pass_.heads(problem), max(device.sm_count, 1)
    cycles = fused_plan.cost_of(problem, plan.area, counts, pass_, rates) * heads
    # A block that has a multiprocessor for itself takes twice its share; without one, it is idle
    blocks = counts.blocks * math.ceil(heads / plan.batch_heads)
    cycles *= max(2 * multiprocessors / max(blocks, 1), 1.0)
    start = fused_plan.cycles_of(problem, pass_, rates).start * begun(problem)
    return cycles + start * multiprocessors
