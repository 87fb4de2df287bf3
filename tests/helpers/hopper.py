"""Problems and plans for the Hopper backend, and how near two backends are to each other."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from helpers.strategies import Inputs, biased, numpy_dtype, problems
from hypothesis import assume
from hypothesis import strategies as st

from cuneigh._backends import hopper
from cuneigh._backends.hopper.choice import arrangements, column_boxes, row_boxes
from cuneigh._backends.hopper.forms import forms_of
from cuneigh._backends.hopper.plan import HopperPlan
from cuneigh._device import Device
from cuneigh._gpu.arrays import Array, Pointer
from cuneigh._gpu.passes import FORWARD, Pass
from cuneigh._gpu.records import has_parts
from cuneigh._problem import Operands, Problem

H200 = Device("cuda", 0, "NVIDIA H200", (9, 0), 132, 227 * 1024, 139 << 30)
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
    those are drawn with which a product of a forward takes no more than `multiplications`, or a
    quarter of that before a backward: ten million are up to a second of the oracle.
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
    most = multiplications // (1 if problem.operation == "forward" else 4)
    cheap = [pair for pair in dims if max(pair) * pairs <= most]
    head_dim, value_dim = draw(st.sampled_from(cheap or [min(dims, key=max)]))
    if problem.rank == 3 and (head_dim % 16 or value_dim % 16):
        problem = replace(problem, batch=1)  # their heads are not neighbors of 16 elements
    axes, whole = problem.axes, not has_parts(problem)
    if whole:
        axes = tuple(
            replace(axis, dilation=min(axis.dilation, hopper.MOST_DILATION)) for axis in axes
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
    refused = hopper.unsupported(problem, H200)
    assume(refused is None or whole)
    assert refused is None
    return problem


def plans(problem: Problem, pass_: Pass = FORWARD) -> list[HopperPlan]:
    """Every plan that the kernel of a pass can run on an H200."""
    return [
        HopperPlan(form, row_box, warpgroups, heads, column_box)
        for form in forms_of(problem, H200, pass_)
        for row_box in row_boxes(problem)
        for column_box in column_boxes(problem, form, pass_)
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
    if inputs.tangents is not None:
        given |= {f"tangent_{name}": each for name, each in inputs.tangents._asdict().items()}
    arrays = {name: described(array) for name, array in given.items() if array is not None}
    return hopper.unsupported(problem, H200, arrays)


def assert_agree(
    problem: Problem, inputs: Inputs, got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]
) -> None:
    """Raise AssertionError where two backends differ by more than their roundings explain.

    Numbers of masked tokens, which are NaN, count for nothing. The lse of a query that sees no key
    is -inf in both.

    Those of a logit, which lse inherits and which change weights, are in proportion to the norms of
    its vectors. Those of a result are in proportion to the largest sum of terms that it can be:
    that is near for an output, and coarse for gradients, whose terms are far smaller as a rule.
    """
    given = inputs.operands._asdict() | {"grad_output": inputs.grad_output}
    names = ("query",), ("key", "additional_keys"), ("value", "additional_values"), ("grad_output",)
    query, key, value, grad_output = (max(norms(given[name]) for name in of) for of in names)
    logit_error = 2.0**-18 * (1 + abs(problem.scale) * query * key)
    summed = 2.0**-24 * problem.slots  # of weights that are added one after the other
    error = 2 * float(ml_dtypes.finfo(numpy_dtype(problem.dtype)).eps) + 2 * logit_error
    largest_value = max(largest(given[name]) for name in names[2])
    grad_lse = 0.0 if inputs.grad_lse is None else float(np.abs(inputs.grad_lse).max(initial=0))
    grad_logit = abs(problem.scale) * (2 * grad_output * value + grad_lse)
    queries = math.prod(problem.tokens) * problem.group_size
    moved = (inputs.tangents or Operands(None, None, None))._asdict()
    d_query, d_key = (max(norms(moved[name]) for name in of) for of in names[:2])
    d_logit = 2 * abs(problem.scale) * (d_query * key + query * d_key)
    d_value = max(largest(moved[name]) for name in names[2])
    allowed = {
        "output": error * largest_value,
        "lse": logit_error + summed,
        "tangent_output": error * (2 * d_logit * largest_value + d_value),
        "tangent_lse": 2 * logit_error * d_logit,
        "grad query": error * grad_logit * key,
        **dict.fromkeys(("grad key", "grad additional_keys"), error * grad_logit * query * queries),
        **dict.fromkeys(("grad value", "grad additional_values"), error * grad_output * queries),
    }
    assert got.keys() == wanted.keys()
    for name, array in got.items():
        one, other = array.astype(np.float64), wanted[name].astype(np.float64)
        sees = np.isfinite(other) if name == "lse" else np.full(other.shape, True)
        assert (one[~sees] == other[~sees]).all(), f"{name} of no keys is not -inf; {problem}"
        assert np.isfinite(one[sees]).all(), f"{name} is not finite; {problem}"
        found = np.abs(one[sees] - other[sees]).max(initial=0)
        assert found <= allowed[name], f"{name}: {found:.3g} > {allowed[name]:.3g}; {problem}"


def largest(array: np.ndarray | None) -> float:
    """The size of its largest number; 0 without one."""
    return 0.0 if array is None else float(np.abs(_numbers(array)).max(initial=0))


def norms(array: np.ndarray | None) -> float:
    """That of the longest head vector; 0 without one."""
    return 0.0 if array is None else float(np.sqrt((_numbers(array) ** 2).sum(-1)).max(initial=0))


def _numbers(array: np.ndarray) -> np.ndarray:
    """In float64, with 0 for NaN. (Of an array of bfloat16 `nan_to_num` leaves NaN as it is.)"""
    return np.nan_to_num(array.astype(np.float64))
