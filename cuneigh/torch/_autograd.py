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
from cuneigh.torch._operators import SECOND, add_gradients


def differentiable(
    arguments: Arguments, problem: Problem, backend: str | None, results: Sequence[Spec | None]
) -> Sequence[torch.Tensor]:
    """The results of a problem, through which gradients flow back to the arguments."""
    if problem.operation == "forward":
        results = problem.output, problem.lse  # which the gradient needs in any case
    call = arguments, problem, backend, results
    made = _Differentiable.apply(call, *arguments.arrays.values())
    return (made,) if isinstance(made, torch.Tensor) else made


Call = tuple[Arguments, Problem, str | None, Sequence[Spec]]
"""What `run` takes."""


class _Differentiable(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: torch.Tensor) -> Any:
        (face, place, arrays, _), problem, backend, _ = call
        made = run(*call)
        names = tuple(arrays)
        if problem.operation == "forward":
            names += RESULTS["forward"]
            tensors += tuple(made)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.call = names, face, place, problem, backend
        return made[0] if len(made) == 1 else tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        count = len(ctx.needs_input_grad)
        if all(gradient is None for gradient in gradients):
            return (None,) * count
        names, face, place, problem, backend = ctx.call
        operation = problem.operation
        if operation not in GRADIENT:
            raise RuntimeError(f"cuneigh: {operation} {SECOND}")
        arrays = dict(zip(names, ctx.saved_tensors, strict=True))
        add_gradients(operation, arrays, gradients)
        gradient = problem.gradient
        wanted = gradient.specs if operation != "av" else (problem.logits, *gradient.specs)
        # Somebody who wants to differentiate the gradient must meet the error above.
        compute: Any = differentiable if torch.is_grad_enabled() else run
        made = compute(Arguments(face, place, arrays, {}), gradient, backend, wanted)
        of = dict(zip(RESULTS[gradient.operation], made, strict=True))
        return (None, *map(of.get, names[: count - 1]))
