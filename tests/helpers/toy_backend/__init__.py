"""A backend of one folder, as a newcomer would begin it: float32 forward, by the oracle."""

from __future__ import annotations

from typing import Any

from cuneigh import _jit, reference
from cuneigh._device import Device
from cuneigh._problem import Operands, Problem
from cuneigh._window import Promise

NAME = "toy"
SETTINGS = ("TOY_SETTING",)
RELIES_ON = Promise.ONE_RANGE


def unsupported(problem: Problem, device: Device) -> str | None:
    if problem.dtype != "float32":
        return f"computes in float32, not in {problem.dtype}"
    if problem.operation not in ("forward", "backward"):
        return f"computes attention, not {problem.operation} alone"
    return None


def predicted_ms(problem: Problem, device: Device) -> float:
    return 1e6


def kernels(problem: Problem, device: Device) -> list[_jit.Kernel]:
    return [_jit.Kernel("toy/fill", _jit.plan_source({"kSize": problem.head_dim}))]


def forward(problem: Problem, operands: Operands, output: Any, lse: Any, space: Any) -> None:
    values, statistics = reference.forward(problem, operands)
    output[...] = values
    if lse is not None:
        lse[...] = statistics


def backward(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    output: Any,
    lse: Any,
    grad_lse: Any,
    gradients: Operands,
    space: Any,
) -> None:
    computed = reference.backward(problem, operands, grad_output)
    for gradient, values in zip(gradients, computed, strict=True):
        if gradient is not None:
            gradient[...] = values
