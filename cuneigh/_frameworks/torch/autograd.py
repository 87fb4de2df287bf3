"""The derivative of eager calls.

`torch.ops.cuneigh` has it too, but an operator that is written in Python takes the host several
times as long as a function of `torch.autograd`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch

from cuneigh._call import Call
from cuneigh._frameworks.torch.operators import SECOND
from cuneigh._frameworks.torch.tensors import TENSORS
from cuneigh._problem import ARRAYS
from cuneigh._validate import require


def differentiable(call: Call, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """What `call` computes of the arrays, through which gradients flow back to them."""
    return _results(call, _apply(call, *arrays))


def recorded(call: Call, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """`differentiable` while torch.jit.trace records, as ``prim::PythonOp.Recorded``."""
    return _results(call, Recorded.apply(call, *arrays))


def _results(call: Call, made: Any) -> list[torch.Tensor | None]:
    made = iter((made,) if isinstance(made, torch.Tensor) else made)
    return [None if spec is None else next(made) for spec in call.results]


class _Differentiable(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, call: Call, *arrays: torch.Tensor) -> Any:
        made: Sequence[Any]
        if call.problem.operation == "forward":
            made = call.with_lse.run(arrays)  # which the gradient needs in any case
            ctx.save_for_backward(*arrays, *made)
        else:
            made = call.run(arrays)
            ctx.save_for_backward(*arrays)
        ctx.set_materialize_grads(False)
        ctx.call = call
        wanted = tuple(compress(made, call.results))
        return wanted[0] if len(wanted) == 1 else wanted

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
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
        compute = differentiable if torch.is_grad_enabled() else Call.run
        made = compute(gradient, arrays)  # in the order of the arguments
        return (None, *[array for array in made if array is not None])


# Function.apply itself, without its care for transformations of functorch, of which there are none.
_apply = super(torch.autograd.Function, _Differentiable).apply


class Recorded(_Differentiable):
    """What a graph of torch.jit holds of a call, and runs with whatever it is given."""

    @staticmethod
    def forward(ctx: Any, call: Call, *arrays: torch.Tensor) -> Any:
        for name, array in zip(call.arguments, arrays, strict=True):
            require(call.name, name, TENSORS.spec(array), call.problem.spec(name))
            if array.device != call.own_device:
                raise ValueError(
                    f"{call.name}: {name} is on device {array.device}, but the call was recorded "
                    f"on device {call.own_device}"
                )
        with warnings.catch_warnings():
            # Of what NumPy computes; the record holds the call and does not look inside.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return _Differentiable.forward(ctx, call, *arrays)
