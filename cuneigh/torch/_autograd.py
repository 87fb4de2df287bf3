"""The derivative of eager calls.

`torch.ops.cuneigh` has it too, but an operator that is written in Python takes the host several
times as long as a function of `torch.autograd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cuneigh._arrays import Arguments
from cuneigh._ops.call import run
from cuneigh._problem import GRADIENT, RESULTS, Problem, Spec
from cuneigh.torch._operators import SECOND, gradient_arguments


def differentiable(
    arguments: Arguments, problem: Problem, backend: str | None, results: Sequence[Spec | None]
) -> Sequence[torch.Tensor]:
    """The results of a problem, through which gradients flow back to the arguments."""
    if problem.operation == "forward":
        results = problem.output, problem.lse  # which the gradient needs in any case
    made = _Differentiable.apply(arguments, problem, backend, results, *arguments.arrays.values())
    return (made,) if isinstance(made, torch.Tensor) else made


class _Differentiable(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        arguments: Arguments,
        problem: Problem,
        backend: str | None,
        results: Sequence[Spec],
        *tensors: torch.Tensor,
    ) -> Any:
        made = run(arguments, problem, backend, results)
        ctx.set_materialize_grads(False)
        ctx.names = tuple(arguments.arrays)
        ctx.lender = arguments.face, arguments.place
        ctx.problem, ctx.backend = problem, backend
        if problem.operation == "forward":
            ctx.names += RESULTS["forward"]
            tensors += tuple(made)
        ctx.save_for_backward(*tensors)
        return made[0] if len(made) == 1 else tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        nothing = (None,) * len(ctx.needs_input_grad)
        if all(gradient is None for gradient in gradients):
            return nothing
        problem = ctx.problem
        if problem.operation not in GRADIENT:
            raise RuntimeError(f"cuneigh: {problem.operation} {SECOND}")
        arrays = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        given = gradient_arguments(problem.operation, arrays, gradients)
        wanted = problem.gradient.specs
        if problem.operation == "av":
            wanted = (problem.logits, *wanted)
        # Somebody who wants to differentiate the gradient must meet the error above.
        compute: Any = differentiable if torch.is_grad_enabled() else run
        face, place = ctx.lender
        made = compute(Arguments(face, place, given, {}), problem.gradient, ctx.backend, wanted)
        of = dict(zip(RESULTS[problem.gradient.operation], made, strict=True))
        return (*nothing[:4], *map(of.get, ctx.names[: len(nothing) - 4]))
