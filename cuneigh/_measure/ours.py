"""The calls of cuneigh to measure: a forward, and a forward with its backward."""

from __future__ import annotations

from typing import Any

import cuneigh
from cuneigh._measure.checks import Tolerance, check_forward, check_gradients
from cuneigh._problem import Operands, Problem


def keywords(problem: Problem, operands: Operands) -> dict[str, Any]:
    """What a call is given beside query, key and value."""
    names = ("kernel_size", "stride", "dilation", "is_causal")
    window = {name: tuple(getattr(axis, name) for axis in problem.axes) for name in names}
    extra = {
        name: getattr(operands, name)
        for name in ("additional_keys", "additional_values", "rpb")
        if getattr(operands, name) is not None
    }
    return {**window, "scale": problem.scale, **extra}


def forward(problem: Problem, operands: Operands, backend: str | None, **more: Any) -> Any:
    """The output of a call, and what else is asked for."""
    function = getattr(cuneigh, f"na{problem.rank}d")
    return function(*operands[:3], **keywords(problem, operands), backend=backend, **more)


def step(problem: Problem, operands: Operands, grad_output: Any, backend: str | None) -> Any:
    """A forward with lse and its backward: output, lse and the gradients."""
    output, lse = forward(problem, operands, backend, return_lse=True)
    function = getattr(cuneigh, f"na{problem.rank}d_backward")
    about = keywords(problem, operands)
    gradients = function(grad_output, *operands[:3], output, lse, **about, backend=backend)
    return output, lse, gradients


def check(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    backend: str | None,
    tolerance: Tolerance | None = None,
) -> None:
    """Raise WrongResultError unless a call is right, and its gradients if one is given."""
    if grad_output is None:
        output = forward(problem, operands, backend)
        check_forward(problem, operands, output, tolerance=tolerance)
        return
    output, lse, gradients = step(problem, operands, grad_output, backend)
    check_forward(problem, operands, output, lse, tolerance)
    found = Operands(*gradients)
    check_gradients(problem, operands, grad_output, output, lse, found, tolerance)
