"""Problems for the Hopper backend, and all plans that its kernel can run."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from cuneigh._backends import hopper
from cuneigh._backends.hopper.plan import (
    Form,
    HopperPlan,
    arrangements,
    form_of,
    key_boxes,
    query_boxes,
)
from cuneigh._device import Device
from cuneigh._problem import Problem
from helpers.strategies import problems

H200 = Device("cuda", 0, "NVIDIA H200", (9, 0), 132, 227 * 1024)
DIMS = (8, 16, 24, 32, 40, 64, 72, 96, 104, 128, 136, 192, 200, 256)
MULTIPLICATIONS = 10_000_000
"""Of one product of a forward: up to half a second of the oracle."""


@st.composite
def supported(draw, most_tokens: int = 400, **arguments: Any) -> Problem:
    """Problems that the backend takes; with the default, tiles and boxes of keys by the handful."""
    problem = draw(
        problems(
            operations=("forward",),
            dtypes=hopper.DTYPES,
            most_tokens=most_tokens,
            budget=most_tokens**2,
            **arguments,
        )
    )
    pairs = problem.batch * problem.heads * math.prod(problem.tokens) * problem.slots
    dims = [dim for dim in DIMS if dim * pairs <= MULTIPLICATIONS]
    head_dim = draw(st.sampled_from(dims))
    value_dim = draw(st.just(head_dim) | st.sampled_from(dims))
    axes = tuple(
        replace(axis, dilation=min(axis.dilation, hopper.MOST_DILATION)) for axis in problem.axes
    )
    small = 0 < abs(problem.scale) <= hopper.SMALLEST_SCALE
    return replace(
        problem,
        head_dim=head_dim,
        value_dim=value_dim,
        axes=axes,
        rpb_dtype=None,
        scale=0.0 if small else problem.scale,
    )


def plans(problem: Problem, form: Form | None = None) -> list[HopperPlan]:
    """Every plan, in the form that the kernel takes on an H200 unless `form` is another."""
    if form is None:
        form = form_of(problem, H200)
    boxes = itertools.product(query_boxes(problem), key_boxes(problem, form))
    return [
        HopperPlan(form, query_box, warpgroups, heads, key_box)
        for query_box, key_box in boxes
        for warpgroups, heads in arrangements(problem, form)
    ]
