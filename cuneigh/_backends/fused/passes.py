"""What an operation is launched as: its passes, and the parts of its values."""

from __future__ import annotations

from dataclasses import replace

from cuneigh._gpu.passes import (
    DK,
    DKV,
    DQ,
    DV,
    FORWARD,
    HVP_DK,
    HVP_DKV,
    HVP_DQ,
    HVP_DV,
    JVP,
    Pass,
)
from cuneigh._problem import Problem

MOST_SUMMED = {"float16": 128, "bfloat16": 128, "float32": 64}
"""Elements of vectors of which two sums, one of tangents perhaps, fit into registers together."""


def passes(problem: Problem) -> tuple[Pass, ...]:
    """The passes of an operation, in their order; an hvp has a jvp before them."""
    if problem.operation == "forward":
        return (FORWARD,)
    if problem.operation == "jvp":
        return (JVP,)
    # The sums of longer vectors fill the registers of a kernel.
    longest = max(problem.head_dim, problem.value_dim)
    if problem.operation == "hvp":
        one = longest <= MOST_SUMMED[problem.dtype]
        return (HVP_DQ, HVP_DKV) if one else (HVP_DQ, HVP_DK, HVP_DV)
    return (DQ, DK, DV) if longest > 128 else (DQ, DKV)


def parts(problem: Problem) -> list[tuple[int, Problem]]:
    """The problems that an operation is launched as, and where the values of each begin."""
    if problem.operation != "jvp":
        return [(0, problem)]
    most, dim = MOST_SUMMED[problem.dtype], problem.value_dim
    return [
        (begin, replace(problem, value_dim=min(dim - begin, most))) for begin in range(0, dim, most)
    ]
