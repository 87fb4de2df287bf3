"""Which passes and which plans the Hopper kernels take: those expected to be the fastest."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cuneigh._backends.hopper.plan import (
    LONGEST_SPAN,
    ROWS,
    Form,
    HopperPlan,
    cost,
    cost_of,
    form_of,
    most_coordinates,
    span,
    sum_bytes,
    ways,
)
from cuneigh._device import Device
from cuneigh._gpu import tuned
from cuneigh._gpu.boxes import Box, count_walks, powers_of_two
from cuneigh._gpu.passes import BACKWARD, FORWARD, Pass
from cuneigh._gpu.rates import H200
from cuneigh._problem import Problem, size_of

NAME = "hopper"


SHARE_OF_SUMS = 1 / 32
"""Of the device's memory, the most that the sums of dQ may take."""


@lru_cache(maxsize=1024)
def passes(problem: Problem, device: Device) -> tuple[Pass, ...]:
    """The passes for `device`: of the ways for whose sums it has room, the one of least time."""
    room = device.memory * SHARE_OF_SUMS
    fitting = [way for way in ways(problem) if BACKWARD not in way or sum_bytes(problem) <= room]
    return min(fitting, key=lambda way: _milliseconds(problem, device, way))


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call with the plans for `device` is expected to take on an H200."""
    milliseconds = _milliseconds(problem, device, passes(problem, device))
    if problem.operation == "backward":  # delta reads output and its gradient
        milliseconds += H200.launch_ms + 2 * size_of(problem.output) / H200.memory_bytes
    return milliseconds


def _milliseconds(problem: Problem, device: Device, passes: tuple[Pass, ...]) -> float:
    """What the kernels of these passes are expected to take."""
    milliseconds = 0.0
    for pass_ in passes:
        cycles = cost(problem, cheapest(problem, device, pass_)[0], device, pass_)
        milliseconds += 2 * H200.launch_ms + cycles / H200.cycles
        if pass_ == BACKWARD:  # sums are cleared, in part, and read; dQ is written
            moved = sum_bytes(problem) + size_of(problem.specs.query)
            milliseconds += H200.launch_ms + moved / H200.memory_bytes
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


@lru_cache(maxsize=1024)
def cheapest(
    problem: Problem, device: Device, pass_: Pass, most: int = 1
) -> tuple[HopperPlan, ...]:
    """The `most` cheapest plans by prediction, the cheapest first."""
    form = form_of(problem, device, pass_)
    found: list[tuple[float, HopperPlan]] = []
    columns = column_boxes(problem, form)
    for warpgroups, heads in arrangements(problem, form, pass_):
        rows = [(box, warpgroups) for box in row_boxes(problem)]
        counts = count_walks(problem.axes, rows, columns, pass_)
        costs = cost_of(problem, form, counts, heads, pass_)
        for place in np.argsort(costs, axis=None, kind="stable")[:most]:
            row, column = np.unravel_index(place, costs.shape)
            plan = HopperPlan(form, rows[row][0], warpgroups, heads, columns[column])
            found.append((cost(problem, plan, device, pass_), plan))
    found.sort(key=lambda pair: pair[0])
    return tuple(plan for _, plan in found[:most])


def arrangements(problem: Problem, form: Form, pass_: Pass) -> list[tuple[Box, int]]:
    """Boxes of rows of a tile along each axis, and its row heads."""
    rank, warpgroups = problem.rank, form.warpgroups
    found = [
        (tuple(warpgroups if r == axis else 1 for r in range(rank)), 1) for axis in range(rank)
    ]
    if not pass_.rows_are_keys and problem.group_size % warpgroups == 0:
        found.append(((1,) * rank, warpgroups))
    return found


def row_boxes(problem: Problem) -> list[Box]:
    """Boxes of a warpgroup's rows that can be loaded, and whose masks can be made."""
    most = most_coordinates(problem.rank)
    boxes = powers_of_two(problem.rank, ROWS)
    return [box for box in boxes if sum(box) <= most and loadable(problem, box)]


def column_boxes(problem: Problem, form: Form) -> list[Box]:
    """Boxes of columns that can be loaded."""
    boxes = powers_of_two(problem.rank, form.columns)
    return [box for box in boxes if loadable(problem, box)]


def loadable(problem: Problem, box: Box) -> bool:
    """Whether TMA loads the box, in pieces along its first axis."""
    spans = zip(box[1:], problem.axes[1:], strict=True)
    return all(span(extent, axis.dilation) <= LONGEST_SPAN for extent, axis in spans)
