"""Which passes and which plans the Hopper kernels take: those expected to be the fastest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuneigh._backends.hopper import costs
from cuneigh._backends.hopper.costs import cost, cost_of
from cuneigh._backends.hopper.forms import forms_of
from cuneigh._backends.hopper.plan import (
    LONGEST_SPAN,
    ROWS,
    Form,
    HopperPlan,
    most_coordinates,
    most_warpgroups,
    span,
    sum_bytes,
    ways,
)
from cuneigh._device import Device
from cuneigh._gpu import rates as gpu_rates
from cuneigh._gpu import tuned
from cuneigh._gpu.boxes import GRANULE, Box, count_walks, powers_of_two
from cuneigh._gpu.linear import Speed
from cuneigh._gpu.passes import BACKWARD, FORWARD, Pass
from cuneigh._gpu.rates import CYCLES, LAUNCH_MS, MEMORY_BYTES
from cuneigh._problem import Problem, size_of

NAME = "hopper"


class Rates(NamedTuple):
    """What predictions are made of: by default what was fitted to an H200."""

    walks: costs.Rates = costs.H200
    launch_ms: float = LAUNCH_MS
    memory_bytes: Speed = MEMORY_BYTES
    """Of what computes delta and reads sums, in a millisecond."""


RATES = Rates()


def rates_of(device: Device) -> Rates:
    return gpu_rates.of(NAME, device, RATES)


SHARE_OF_SUMS = 1 / 32
"""Of the device's memory, the most that the sums of dQ may take."""


def passes(problem: Problem, device: Device) -> tuple[Pass, ...]:
    """The passes for `device`: of the ways for whose sums it has room, the one of least time."""
    return _passes(problem, device, rates_of(device))


@lru_cache(maxsize=1024)
def _passes(problem: Problem, device: Device, rates: Rates) -> tuple[Pass, ...]:
    room = device.memory * SHARE_OF_SUMS
    fitting = [way for way in ways(problem) if BACKWARD not in way or sum_bytes(problem) <= room]
    return min(
        fitting, key=lambda way: sum(_cheapest_ms(problem, device, each, rates) for each in way)
    )


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call with the plans for `device` is expected to take, in milliseconds."""
    rates = rates_of(device)
    found: dict[str, HopperPlan] = {
        pass_.name: _cheapest(problem, device, pass_, 1, rates.walks)[0]
        for pass_ in _passes(problem, device, rates)
    }
    milliseconds: float = model(problem, device, found, rates)
    return milliseconds


def model(problem: Problem, device: Device, plans: Mapping[str, Any], rates: Rates) -> Any:
    """`predicted_ms` with these plans, by pass, and these rates."""
    launched = (pass_ for way in ways(problem) for pass_ in way if pass_.name in plans)
    milliseconds = sum(
        _pass_ms(problem, device, pass_, plans[pass_.name], rates) for pass_ in launched
    )
    if problem.operation == "backward":  # delta reads output and its gradient
        milliseconds += rates.launch_ms + 2 * size_of(problem.output) / rates.memory_bytes
    return milliseconds


def _cheapest_ms(problem: Problem, device: Device, pass_: Pass, rates: Rates) -> float:
    """What a pass is expected to take with its cheapest plan."""
    plan = _cheapest(problem, device, pass_, 1, rates.walks)[0]
    milliseconds: float = _pass_ms(problem, device, pass_, plan, rates)
    return milliseconds


def _pass_ms(problem: Problem, device: Device, pass_: Pass, plan: HopperPlan, rates: Rates) -> Any:
    """What the kernels of a pass take with a plan."""
    # One of the launches sets a counter to 0; where blocks take one tile there is none
    launches = 1 if plan.form.cluster else 2
    milliseconds = launches * rates.launch_ms
    milliseconds += cost(problem, plan, device, pass_, rates.walks) / CYCLES
    if pass_.adds:  # keys and values are looked at, sums are cleared and rounded
        moved = 2 * sum_bytes(problem) + sum(map(size_of, problem.specs[:3]))
        milliseconds += rates.launch_ms + moved / rates.memory_bytes
    return milliseconds


def make_plan(problem: Problem, device: Device, pass_: Pass = FORWARD) -> HopperPlan:
    """The plan for `device`: the one that tuning has found, or the cheapest."""
    return tuned.plan(
        NAME,
        pass_.name,
        problem,
        device,
        lambda: cheapest(problem, device, pass_, TRIED),
        lambda: cheapest(problem, device, pass_)[0],
    )


TRIED = 8
"""Plans that tuning measures for one pass."""


def plans(problem: Problem, device: Device) -> dict[str, tuple[HopperPlan, ...]]:
    """For every pass of an operation the plans worth measuring, the cheapest first."""
    return {
        pass_.name: cheapest(problem, device, pass_, TRIED) for pass_ in passes(problem, device)
    }


def cheapest(
    problem: Problem, device: Device, pass_: Pass, most: int = 1
) -> tuple[HopperPlan, ...]:
    """The `most` cheapest plans by prediction, the cheapest first."""
    return _cheapest(problem, device, pass_, most, rates_of(device).walks)


@lru_cache(maxsize=1024)
def _cheapest(
    problem: Problem, device: Device, pass_: Pass, most: int, rates: costs.Rates
) -> tuple[HopperPlan, ...]:
    found: list[tuple[float, HopperPlan]] = []
    tiles = [
        (form, *each)
        for form in forms_of(problem, device, pass_)
        for each in arrangements(problem, form, pass_)
    ]
    for form, warpgroups, heads in tiles:
        columns = column_boxes(problem, form, pass_)
        rows = [(box, warpgroups) for box in row_boxes(problem)]
        counts = count_walks(problem.axes, rows, columns, pass_)
        cycles = cost_of(problem, form, counts, heads, pass_, rates)
        for place in np.argsort(cycles, axis=None, kind="stable")[:most]:
            row, column = np.unravel_index(place, cycles.shape)
            plan = HopperPlan(form, rows[row][0], warpgroups, heads, columns[column])
            found.append((cost(problem, plan, device, pass_, rates), plan))
    found.sort(key=lambda pair: pair[0])
    return tuple(plan for _, plan in found[:most])


def arrangements(problem: Problem, form: Form, pass_: Pass) -> list[tuple[Box, int]]:
    """Boxes of rows of a tile along each axis, and its row heads."""
    rank, warpgroups = problem.rank, form.warpgroups
    in_heads = [((1,) * rank, warpgroups)]
    if form.cluster or warpgroups < most_warpgroups(problem, pass_):  # `forms_of` says what for
        return in_heads if problem.tokens[0] <= ROWS else []
    found = [
        (tuple(warpgroups if r == axis else 1 for r in range(rank)), 1) for axis in range(rank)
    ]
    if not pass_.rows_are_keys and problem.group_size % warpgroups == 0:
        found += in_heads
    return list(dict.fromkeys(found))


def row_boxes(problem: Problem) -> list[Box]:
    """Boxes of a warpgroup's rows that can be loaded, and whose masks can be made."""
    most = most_coordinates(problem.rank)
    boxes = powers_of_two(problem.rank, ROWS)
    return [box for box in boxes if sum(box) <= most and loadable(problem, box)]


def column_boxes(problem: Problem, form: Form, pass_: Pass) -> list[Box]:
    """Boxes of columns that can be loaded, of whole granules if their sums are added to."""
    boxes = powers_of_two(problem.rank, form.columns)
    granule = GRANULE if pass_.adds else 1
    return [box for box in boxes if loadable(problem, box) and box[-1] % granule == 0]


def loadable(problem: Problem, box: Box) -> bool:
    """Whether TMA loads the box, in pieces along its first axis."""
    spans = zip(box[1:], problem.axes[1:], strict=True)
    return all(span(extent, axis.dilation) <= LONGEST_SPAN for extent, axis in spans)
