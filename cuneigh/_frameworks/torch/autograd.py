"""The derivative of eager calls.

`torch.ops.cuneigh` has it too, but an operator that is written in Python takes the host several
times as long as a function of `torch.autograd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch

from cuneigh._call import Call
from cuneigh._frameworks.torch.operators import SECOND
from cuneigh._problem import ARRAYS


def run(call: Call, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """What `call` computes, by the name of its operator while PyTorch's profiler is on."""
    if not torch.autograd._profiler_enabled():
        return call.run(arrays)
    with torch.profiler.record_function(f"cuneigh::{call.problem.operation}"):
        return call.run(arrays)


def differentiable(call: Call, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """What `call` computes of the arrays, through which gradients flow back to them."""
    made = _apply(call, *arrays)
    made = iter((made,) if isinstance(made, torch.Tensor) else made)
    return [None if spec is None else next(made) for spec in call.results]


class Cuneigh(torch.autograd.Function):  # type: ignore[misc]
    """Its name is what PyTorch's profiler and ``grad_fn`` show."""

    @staticmethod
    def forward(ctx: Any, call: Call, *arrays: torch.Tensor) -> Any:
        made: Sequence[Any]
        if call.problem.operation == "forward":
            made = run(call.with_lse, arrays)  # which the gradient needs in any case
            ctx.save_for_backward(*arrays, *made)
        else:
            made = run(call, arrays)
            ctx.save_for_backward(*arrays)
        ctx.set_materialize_grads(False)
        ctx.call = call
        wanted = tuple(compress(made, call.results))
        return wanted[0] if len(wanted) == 1 else wanted

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        compiled = torch.compiler.is_dynamo_compiling()  # by compiled autograd
        return (_uncompiled if compiled else _backward)(ctx, *gradients)


def _backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
    call: Call = ctx.call
    operation = call.problem.operation
    given = tuple([gradient is not None for gradient in gradients])
    if True not in given:
        return (None, *[None] * len(call.arguments))
    if ARRAYS[operation].gradient is None:
        raise RuntimeError(f"cuneigh: {operation} {SECOND}")
    arrays = ctx.saved_tensors
    if operation == "forward" and not given[0]:  # of lse alone
        gradients, given = (torch.zeros_like(arrays[-2]), *gradients[1:]), (True, True)
    gradient = call.gradient(given)
    arrays += tuple(compress(gradients, given))
    # Somebody who wants to differentiate the gradient must get the error above.
    compute = differentiable if torch.is_grad_enabled() else run
    made = dict(
        zip(ARRAYS[gradient.problem.operation].results, compute(gradient, arrays), strict=True)
    )
    return (None, *map(made.get, call.arguments))


_uncompiled = _backward
"""The same where torch.compile would otherwise look into it, and into the backend below."""


def hide_backward() -> None:
    """Have torch.compile, which is there by now, not look into `_uncompiled`."""
    global _uncompiled
    _uncompiled = torch.compiler.disable(_backward)


# Function.apply itself, without its care for transformations of functorch, of which there are none.
_apply = super(torch.autograd.Function, Cuneigh).apply
