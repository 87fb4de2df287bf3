"""Problems and plans for the Hopper backend, and how near two backends are to each other."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from helpers.strategies import Inputs, biased, numpy_dtype, problems
from hypothesis import strategies as st

from cuneigh._backends import hopper
from cuneigh._backends.hopper.plan import (
    HopperPlan,
    arrangements,
    column_boxes,
    form_of,
    row_boxes,
)
from cuneigh._device import Device
from cuneigh._gpu.arrays import Array, Pointer
from cuneigh._gpu.passes import FORWARD, Pass
from cuneigh._problem import Problem

H200 = Device("cuda", 0, "NVIDIA H200", (9, 0), 132, 227 * 1024)
ALL_DIMS = tuple(itertools.product((8, 16, 24, 32, 40, 64, 72, 96, 104, 128, 200, 256), repeat=2))
COMPILED_DIMS = ((64, 64), (128, 128), (32, 32), (72, 104), (128, 64), (256, 200))
"""Head and value dimensions where every new pair is a kernel to compile."""


@st.composite
def supported(
    draw,
    operations: tuple[str, ...] = ("forward",),
    most_tokens: int = 400,
    dims: tuple[tuple[int, int], ...] = COMPILED_DIMS,
    multiplications: int = 10_000_000,
    **arguments: Any,
) -> Problem:
    """Problems that the backend takes when their arrays are contiguous.

    With `most_tokens` of some hundred there are several tiles, and boxes of keys. Of the dimensions
    those are drawn with which a product of a forward takes no more than `multiplications`: ten
    million are up to half a second of the oracle.
    """
    problem = draw(
        problems(
            operations=operations,
            dtypes=hopper.DTYPES,
            most_tokens=most_tokens,
            budget=most_tokens**2,
            **arguments,
        )
    )
    if problem.additional:  # several boxes of them, too
        problem = replace(problem, additional=draw(st.just(problem.additional) | biased(1, 300)))
    pairs = problem.batch * problem.heads * math.prod(problem.tokens) * problem.slots
    longest = hopper.LONGEST[problem.operation]
    dims = tuple(pair for pair in dims if max(pair) <= longest)
    cheap = [pair for pair in dims if max(pair) * pairs <= multiplications]
    head_dim, value_dim = draw(st.sampled_from(cheap or [min(dims, key=max)]))
    if problem.rank == 3 and (head_dim % 16 or value_dim % 16):
        problem = replace(problem, batch=1)  # their heads are not neighbors of 16 elements
    axes = tuple(
        replace(axis, dilation=min(axis.dilation, hopper.MOST_DILATION)) for axis in problem.axes
    )
    is_tiny = abs(problem.scale) <= hopper.SMALLEST_SCALE
    problem = replace(
        problem,
        head_dim=head_dim,
        value_dim=value_dim,
        axes=axes,
        rpb_dtype=None,
        scale=0.0 if is_tiny else problem.scale,
    )
    assert hopper.unsupported(problem, H200) is None
    return problem


def plans(problem: Problem, pass_: Pass = FORWARD) -> list[HopperPlan]:
    """Every plan that the kernel of a pass can run on an H200."""
    form = form_of(problem, H200, pass_)
    boxes = itertools.product(row_boxes(problem), column_boxes(problem, form))
    return [
        HopperPlan(form, row_box, warpgroups, heads, column_box)
        for row_box, column_box in boxes
        for warpgroups, heads in arrangements(problem, form, pass_)
    ]


def described(array: np.ndarray) -> Array:
    """What a program knows of an array once `to_cupy` has brought it to a GPU."""
    low, _ = np.lib.array_utils.byte_bounds(array)
    start = array.__array_interface__["data"][0]
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Array(Pointer(0), array.shape, array.dtype.name, strides, (start - low) % 16)


def refusal(problem: Problem, inputs: Inputs) -> str | None:
    """Why the backend does not take these arrays; None if it does."""
    given = {**inputs.operands._asdict(), "grad_output": inputs.grad_output}
    arrays = {name: described(array) for name, array in given.items() if array is not None}
    return hopper.unsupported(problem, H200, arrays)


def assert_agree(
    problem: Problem, inputs: Inputs, got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]
) -> None:
    """Raise AssertionError where two backends differ by more than their roundings explain.

    Those of weights and of the result are in proportion to the largest value; that of a logit,
    which lse inherits and which changes weights, is in proportion to the norms of its vectors.
    """
    query, key, value, *additional = (
        None if array is None else array.astype(np.float64) for array in inputs.operands[:5]
    )
    keys, values = ([array for array in pair if array is not None] for pair in (
        (key, additional[0]), (value, additional[1])))  # fmt: skip
    largest_key = max(norms(array) for array in keys)
    logit_error = 2.0**-18 * (1 + abs(problem.scale) * norms(query) * largest_key)
    weight_error = 2 * float(ml_dtypes.finfo(numpy_dtype(problem.dtype)).eps) + 2 * logit_error
    largest_value = max(np.abs(array).max(initial=0) for array in values)
    allowed = {"output": weight_error * largest_value, "lse": logit_error}
    assert got.keys() == wanted.keys()
    for name, array in got.items():
        one, other = array.astype(np.float64), wanted[name].astype(np.float64)
        assert np.isfinite(one).all(), f"{name} is not finite; {problem}"
        error = np.abs(one - other).max(initial=0)
        assert error <= allowed[name], f"{name}: {error:.3g} > {allowed[name]:.3g}; {problem}"


def norms(array: np.ndarray) -> float:
    """That of the longest head vector."""
    return float(np.sqrt((array**2).sum(-1)).max(initial=0))
