"""The CPU backend: dense products of tiles of queries with their halos, on NumPy's BLAS.

Each token axis is cut into tiles of queries of one dilation group. The keys that a tile sees lie in
a box, its halo; one batch of matrix products takes many tiles and heads at once, the logits of
hidden pairs become -inf, and a second product sums the values. Nothing of size queries times keys
is ever in memory: every thread works on about half a million logits at a time.

`strips` cuts an axis into tiles and `tiles` a problem into boxes, `tokens` says where theirs are,
`rows` reads and writes them whatever their strides, `halves` widens half precision, `boxes` holds
what the operations do with a box, `attention`, `tangents`, `hvp` and `products` are the
operations, `gradients` adds up what boxes share, and `threads` runs them in parallel. Where Numba
is installed, `compiled` computes most problems without boxes.

Half-precision arrays are computed in float32, float64 in float64. Results do not depend on the
number of threads, and those of an entry of a batch do not depend on the others; gradients of rpb,
which all entries share, are sums over them. What is not finite reaches only the queries that see
it.
"""

from __future__ import annotations

from typing import Any

from cuneigh._backends.cpu import attention, compiled
from cuneigh._backends.cpu.hvp import hvp
from cuneigh._backends.cpu.products import av, av_backward, qk, qk_backward
from cuneigh._backends.cpu.tangents import jvp
from cuneigh._device import Device
from cuneigh._jit import Kernel
from cuneigh._problem import Operands, Problem
from cuneigh._window import Promise

__all__ = [
    "NAME",
    "RELIES_ON",
    "SETTINGS",
    "about",
    "av",
    "av_backward",
    "backward",
    "forward",
    "hvp",
    "jvp",
    "kernels",
    "method",
    "predicted_ms",
    "qk",
    "qk_backward",
    "unsupported",
]

NAME = "cpu"
SETTINGS = ()
RELIES_ON = Promise.ONE_RANGE | Promise.INCREASING
FLOPS_PER_MS = 1e8
"""Useful operations of two cores, roughly: no other backend computes on the CPU."""


def unsupported(problem: Problem, device: Device, arrays: object = None) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    if device.kind != "cpu":
        return "its arrays are on a CUDA device"
    return None


def about() -> str:
    """What computes most problems."""
    return compiled.about()


def method(problem: Problem) -> str:
    """How `problem` is computed: in compiled loops, or why not."""
    return compiled.method(problem)


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call is expected to take, in milliseconds."""
    return problem.flops() / FLOPS_PER_MS


def kernels(problem: Problem, device: Device) -> list[Kernel]:
    """None: what this backend compiles is not for a GPU."""
    return []


def forward(problem: Problem, operands: Operands, output: Any, lse: Any, allocate: Any) -> None:
    if compiled.is_faster(problem) and compiled.forward(problem, operands, output, lse):
        return
    attention.forward(problem, operands, output, lse, allocate)


def backward(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    output: Any,
    lse: Any,
    grad_lse: Any,
    gradients: Operands,
    allocate: Any,
) -> None:
    arguments = problem, operands, grad_output, output, lse, grad_lse, gradients, allocate
    if compiled.is_faster(problem) and compiled.backward(*arguments):
        return
    attention.backward(*arguments)
