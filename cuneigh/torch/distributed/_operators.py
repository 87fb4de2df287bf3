"""The operators by which sharded attention stands in programs that PyTorch compiles.

Each is opaque: what it sends and computes is its own affair. `Task` as text is its parameter.
"""

from __future__ import annotations

from typing import Any

import torch

from cuneigh._problem import DIFFERENTIATED, OPTIONAL, Operands
from cuneigh.torch.distributed._attention import backward, forward, lse_dtype
from cuneigh.torch.distributed._exchange import format_of, tokens_in
from cuneigh.torch.distributed._task import task_of

_COUNT = len(Operands._fields)
_OPERANDS = ", ".join(f"Tensor{'?' * (name in OPTIONAL)} {name}" for name in Operands._fields)


def _sharded(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *arrays, text = args
    made: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    made = forward(task_of(text), Operands(*arrays))
    return made


def _fake_sharded(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *arrays, text = args
    task, operands = task_of(text), Operands(*arrays)
    query, mask = operands.query, operands.key_mask
    output = query.new_empty((*query.shape[:-1], operands.value.shape[-1]))
    lse = query.new_empty(query.shape[:-1], dtype=lse_dtype(query))
    moved = [operands.key, operands.value, *([] if mask is None else [mask])]
    count = format_of(moved, task.rank).each * tokens_in(task.received)
    return output, lse, operands.key.new_empty(count)


def _gradients(*args: Any) -> list[torch.Tensor]:
    *arrays, text = args
    operands, rest = Operands(*arrays[:_COUNT]), arrays[_COUNT:]
    grad_output, grad_lse, output, lse, received = rest
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    of = backward(task_of(text), operands, grad_output, grad_lse, output, lse, received)
    return [array for array in of if array is not None]


def _fake_gradients(*args: Any) -> list[torch.Tensor]:
    given = [array for array in args[: len(DIFFERENTIATED)] if array is not None]
    return [torch.empty_like(one, memory_format=torch.contiguous_format) for one in given]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *arrays, ctx.text = inputs
    ctx.save_for_backward(*arrays, *output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_output: Any, grad_lse: Any, _: Any) -> Any:
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
    "sharded", _sharded, _fake_sharded, f"({_OPERANDS}, str task) -> (Tensor, Tensor, Tensor)"
)
"""Output, lse and what came from other ranks, of local arrays."""

_GRADIENTS = _define(
    "sharded_backward",
    _gradients,
    _fake_gradients,
    f"({_OPERANDS}, Tensor? grad_output, Tensor? grad_lse, Tensor output, Tensor lse, "
    "Tensor received, str task) -> Tensor[]",
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
