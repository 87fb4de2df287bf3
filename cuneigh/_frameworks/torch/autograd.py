"""The derivative of eager calls.

`torch.ops.cuneigh` has it too, but an operator that is written in Python takes the host several
times as long as a function of `torch.autograd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch

from cuneigh._call import Call
from cuneigh._frameworks.torch.derivatives import (
    calculus_of,
    gradients,
    is_forward_mode,
    is_mapped,
    mapped,
    tangents,
)
from cuneigh._problem import ARRAYS


def run(call: Call, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """What `call` computes, by the name of its operator while PyTorch's profiler is on."""
    if not torch.autograd._profiler_enabled():
        return call.run(arrays)
    with torch.profiler.record_function(f"cuneigh::{call.problem.operation}"):
        return call.run(arrays)


def differentiable(call: Call, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """What `call` computes of the arrays, through which derivatives flow in either direction."""
    made = _apply(call, *arrays)
    made = iter((made,) if isinstance(made, torch.Tensor) else made)
    every = [None if spec is None else next(made) for spec in _computed(call).results]
    return [
        None if spec is None else array for spec, array in zip(call.results, every, strict=True)
    ]


def _computed(call: Call) -> Call:
    """`call` with all that its gradient needs among the results, so that PyTorch sees that."""
    return call.with_lse if call.problem.operation in KEEPING else call


KEEPING = ("forward", "jvp")
"""The operations whose gradients need their results."""


class Cuneigh(torch.autograd.Function):  # type: ignore[misc]
    """Its name is what PyTorch's profiler and ``grad_fn`` show."""

    @staticmethod
    def forward(ctx: Any, call: Call, *arrays: torch.Tensor) -> Any:
        results = [array for array in run(_computed(call), arrays) if array is not None]
        kept = results if call.problem.operation in KEEPING else ()
        ctx.save_for_backward(*arrays, *kept)
        if is_forward_mode():
            ctx.save_for_forward(*arrays, *results)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return results[0] if len(results) == 1 else tuple(results)

    @staticmethod
    def jvp(ctx: Any, _: None, *moved: torch.Tensor | None) -> Any:
        call: Call = ctx.call
        tensors, count = ctx.saved_tensors, len(call.arguments)
        names = list(compress(ARRAYS[call.problem.operation].results, _computed(call).results))
        made = tangents(
            call.problem,
            dict(zip(call.arguments, tensors, strict=False)),
            dict(zip(names, tensors[count:], strict=True)),
            dict(zip(call.arguments, moved, strict=True)),
            calculus_of(call.name, call.backend, tensors[0].device, calls=call.derived),
            call.follows,
        )
        turned = tuple(map(made.get, names))
        return turned[0] if len(turned) == 1 else turned

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if any(map(is_mapped, gradients)):
            return tuple(mapped(partial(_backward, ctx), gradients))
        compiled = torch.compiler.is_dynamo_compiling()  # by compiled autograd
        return (_uncompiled if compiled else _backward)(ctx, *gradients)


def _backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
    call: Call = ctx.call
    arrays = ctx.saved_tensors
    given = tuple([gradient is not None for gradient in gradients])
    if True not in given:
        return (None, *[None] * len(call.arguments))
    operation = call.problem.operation
    if ARRAYS[operation].gradient is None:
        return (None, *_second(call, arrays, gradients, ctx.needs_input_grad[1:]))
    if operation == "forward" and not given[0]:  # of lse alone
        gradients, given = (torch.zeros_like(arrays[-2]), *gradients[1:]), (True, True)
    # Through `compute`, for somebody may differentiate the gradient, or map over it.
    gradient = call.gradient(given)
    made = gradient.compute((*arrays, *compress(gradients, given)))
    of = dict(zip(ARRAYS[gradient.problem.operation].results, made, strict=True))
    return (None, *map(of.get, call.arguments))


def _second(
    call: Call,
    arrays: Sequence[torch.Tensor],
    incoming: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """The gradients of the arguments of a call that is a derivative itself."""
    results = list(compress(ARRAYS[call.problem.operation].results, _computed(call).results))
    count = len(call.arguments)
    made = gradients(
        call.problem,
        dict(zip(call.arguments, arrays, strict=False)),
        dict(zip(results, arrays[count:], strict=False)),
        dict(zip(results, incoming, strict=True)),
        list(compress(call.arguments, needs)),
        calculus_of(call.name, call.backend, arrays[0].device, calls=call.derived),
        call.follows,
    )
    return [made.get(name) for name in call.arguments]


_uncompiled = _backward
"""The same where torch.compile would otherwise look into it, and into the backend below."""


def hide_backward() -> None:
    """Have torch.compile, which is there by now, not look into `_uncompiled`."""
    global _uncompiled
    _uncompiled = torch.compiler.disable(_backward)


# Function.apply itself, without its care for transformations of functorch, of which there are none.
_apply = super(torch.autograd.Function, Cuneigh).apply
