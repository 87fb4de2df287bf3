"""Which of the two kinds of kernels a pass takes: the one whose plan is expected to be faster."""

from __future__ import annotations

import itertools
from functools import lru_cache

from cuneigh._backends.fused import plan as fused_plan
from cuneigh._backends.fused.plan import FusedPlan
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._backends.fused.small.plan import SmallPlan
from cuneigh._device import Device
from cuneigh._gpu.passes import FORWARD, Pass
from cuneigh._gpu.rates import H200
from cuneigh._problem import Problem


@lru_cache(maxsize=1024)
def choose_plan(
    problem: Problem, device: Device, pass_: Pass = FORWARD, small_windows: bool = True
) -> FusedPlan | SmallPlan:
    """The plan for `device`; `small_windows`: whether those kernels can read the arrays."""
    small = small_plan.make_plan(problem, device, pass_) if small_windows else None
    if small is None:
        return fused_plan.make_plan(problem, device, pass_)
    plan = fused_plan.make_plan(problem, device, pass_)
    cycles = fused_plan.cost(problem, plan, pass_) * problem.batch * pass_.heads(problem)
    # The other cost model has this, too; nothing hides it where all blocks begin at once
    cycles += small_plan.constants(pass_).start * max(device.sm_count, 1)
    return plan if cycles < small_plan.cost(problem, small, device, pass_) else small


TRIED = 8
"""Plans of each kind that tuning measures for one pass."""


@lru_cache(maxsize=1024)
def plans_to_try(
    problem: Problem, device: Device, pass_: Pass
) -> tuple[FusedPlan | SmallPlan, ...]:
    """The plans worth measuring, of both kinds, those expected to be the fastest first."""
    plans: list[FusedPlan | SmallPlan] = [choose_plan(problem, device, pass_)]
    plans += fused_plan.plans_to_try(problem, device, pass_, TRIED)
    plans += small_plan.plans_to_try(problem, device, pass_, TRIED)
    return tuple(dict.fromkeys(plans))


def plans(problem: Problem, device: Device) -> dict[str, tuple[FusedPlan | SmallPlan, ...]]:
    """`plans_to_try` of every pass of an operation, by its name."""
    return {
        pass_.name: plans_to_try(problem, device, pass_) for pass_ in fused_plan.passes(problem)
    }


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call with the plans for `device` is expected to take on an H200."""
    milliseconds = 0.0
    parts = [part for _, part in fused_plan.parts(problem)]
    for part, pass_ in itertools.product(parts, fused_plan.passes(problem)):
        plan = choose_plan(part, device, pass_)
        if isinstance(plan, SmallPlan):
            cycles = small_plan.cost(part, plan, device, pass_)
        else:
            cycles = fused_plan.cost(part, plan, pass_) * part.batch * pass_.heads(part)
        milliseconds += H200.launch_ms + cycles / H200.cycles
    return milliseconds
