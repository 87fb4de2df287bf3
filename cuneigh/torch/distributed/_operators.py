"""The operators by which sharded attention stands in programs that PyTorch compiles.

Each is opaque: what it sends and computes is its own affair. `Task` as text is its parameter.
"""

from __future__ import annotations

from typing import Any

import torch

from cuneigh._problem import DIFFERENTIATED, OPTIONAL, Operands
from cuneigh.torch.distributed._attention import backward, forward, lse_dtype
from cuneigh.torch.distributed._exchange import shape_with
from cuneigh.torch.distributed._task import task_of

_COUNT = len(Operands._fields)
_OPERANDS = ", ".join(f"Tensor{'?' * (name in OPTIONAL)} {name}" for name in Operands._fields)


def _sharded(*args: Any) -> tuple[torch.Tensor, ...]:
    *arrays, text = args
    task, operands = task_of(text), Operands(*arrays)
    output, lse, seen = forward(task, operands)
    if not task.plan.receives:  # an operator returns none of its arguments
        return output, lse, *(operands.key.new_empty(0) for _ in range(3))
    mask = seen.key_mask
    return output, lse, seen.key, seen.value, seen.key.new_empty(0) if mask is None else mask


def _fake_sharded(*args: Any) -> tuple[torch.Tensor, ...]:
    *arrays, text = args
    plan, operands = task_of(text).plan, Operands(*arrays)
    query = operands.query
    output = query.new_empty((*query.shape[:-1], operands.value.shape[-1]))
    lse = query.new_empty(query.shape[:-1], dtype=lse_dtype(query))
    seen = [
        operands.key.new_empty(0)
        if one is None or not plan.receives
        else one.new_empty(shape_with(plan.seen, one))
        for one in (operands.key, operands.value, operands.key_mask)
    ]
    return output, lse, *seen


def _gradients(*args: Any) -> list[torch.Tensor]:
    *arrays, text = args
    seen, (grad_output, grad_lse, output, lse) = Operands(*arrays[:_COUNT]), arrays[_COUNT:]
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    of = backward(task_of(text), seen, grad_output, grad_lse, output, lse)
    return [array for array in of if array is not None]


def _fake_gradients(*args: Any) -> list[torch.Tensor]:
    own, seen = task_of(args[-1]).plan.own, Operands(*args[:_COUNT])
    made = seen._replace(
        key=seen.key.new_empty(shape_with(own, seen.key)),
        value=seen.value.new_empty(shape_with(own, seen.value)),
        key_mask=None,
    )
    return [
        torch.empty_like(one, memory_format=torch.contiguous_format)
        for one in made
        if one is not None
    ]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *arrays, ctx.text = inputs
    output, lse, *seen = output
    kept = Operands(*arrays)
    if task_of(ctx.text).plan.receives:
        key, value, mask = seen
        kept = kept._replace(key=key, value=value)
        if kept.key_mask is not None:
            kept = kept._replace(key_mask=mask)
    ctx.save_for_backward(*kept, output, lse)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*seen)


def _backward(ctx: Any, grad_output: Any, grad_lse: Any, *_: Any) -> Any:
    saved = ctx.saved_tensors  # once only, for they may be computed again when they are read
    arrays, kept = saved[:_COUNT], saved[_COUNT:]
    if grad_output is None and grad_lse is None:
        return (None,) * (_COUNT + 1)
    made = iter(_GRADIENTS(*arrays, grad_output, grad_lse, *kept, ctx.text))
    of = [None if array is None else next(made) for array in arrays[: len(DIFFERENTIATED)]]
    return (*of, *[None] * (_COUNT + 1 - len(of)))


def _define(name: str, run: Any, fake: Any, schema: str) -> Any:
    operator = torch.library.custom_op(f"cuneigh::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


SHARDED = _define(
    "sharded",
    _sharded,
    _fake_sharded,
    f"({_OPERANDS}, str task) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
"""Output and lse of local arrays, and then keys, values and the mask of `plan.seen`, which the
gradient takes. What is not there, and all three where own keys are all, is of size 0."""

_GRADIENTS = _define(
    "sharded_backward",
    _gradients,
    _fake_gradients,
    f"({_OPERANDS}, Tensor? grad_output, Tensor? grad_lse, Tensor output, Tensor lse, "
    "str task) -> Tensor[]",
)

SHARDED.register_autograd(_backward, setup_context=_setup)


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        f"{ctx.call}: calls on shards have derivatives of first order only; those of a call on the "
        f"whole layout have them of every order"
    )


def _name(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.call = f"{task_of(inputs[-1]).call}_backward"


_GRADIENTS.register_autograd(_refuse, setup_context=_name)
