"""Attention of one rank's queries, and its gradient, beside the exchange that they need.

Queries that see none but the rank's own keys are computed while messages are under way; the others
follow. In the backward pass the others come first, so that the gradients of other ranks' keys are
sent back while the rest is computed.
"""

from __future__ import annotations

from typing import Any

import torch

from cuneigh._ops.neighborhood import (
    na1d,
    na1d_backward,
    na2d,
    na2d_backward,
    na3d,
    na3d_backward,
)
from cuneigh._problem import Operands
from cuneigh._shards.plan import Work
from cuneigh.torch.distributed._agreement import agreement_of
from cuneigh.torch.distributed._exchange import of_tokens
from cuneigh.torch.distributed._keys import KeyGradients, Keys
from cuneigh.torch.distributed._task import Task

FORWARD = {1: na1d, 2: na2d, 3: na3d}
BACKWARD = {1: na1d_backward, 2: na2d_backward, 3: na3d_backward}

SHARED = "additional_keys", "additional_values", "rpb"
"""The operands that all ranks have."""


@torch.no_grad()  # type: ignore[untyped-decorator]
def forward(task: Task, operands: Operands) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, lse, and the numbers that came from other ranks, which the gradient needs again."""
    plan, query = task.plan, operands.query
    if task.group:
        terms = task.terms(operands)
        agreement_of(task.process_group).require(task.call, terms, query.device)
    keys = Keys(task, operands)
    exchange = keys.send() if plan.exchanges else None
    works = task.works(operands)
    if len(works) != 1:
        output = query.new_empty((*query.shape[:-1], operands.value.shape[-1]))
        lse = query.new_empty(query.shape[:-1], dtype=lse_dtype(query))
    for work in works:
        if exchange is not None and not work.keys.within(plan.own):
            exchange.wait()
            exchange = None
        where = of_tokens(work.queries, plan.own)
        arrays = _arrays_of(work, task, operands, keys)
        made = FORWARD[task.rank](**arrays, **task.parameters(work), return_lse=True)
        if len(works) == 1:
            output, lse = made
        else:
            output[where], lse[where] = made
    if exchange is not None:
        exchange.wait()
    return output, lse, keys.received.numbers


def lse_dtype(query: torch.Tensor) -> torch.dtype:
    return torch.float64 if query.dtype is torch.float64 else torch.float32


@torch.no_grad()  # type: ignore[untyped-decorator]
def backward(
    task: Task,
    operands: Operands,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    received: torch.Tensor,
) -> Operands:
    """The gradients of `forward`: of the rank's own keys from all ranks, of the rest from its own.

    Gradients of what all ranks share are those of the rank's queries; their sum is the whole.
    """
    plan = task.plan
    keys, key_gradients = Keys(task, operands, received), KeyGradients(task, operands)
    works = task.works(operands)
    if len(works) != 1:
        grad_query = torch.empty_like(operands.query, memory_format=torch.contiguous_format)
    shared: dict[str, list[torch.Tensor]] = {name: [] for name in SHARED}

    def differentiate(work: Work) -> None:
        nonlocal grad_query
        where = of_tokens(work.queries, plan.own)
        made = BACKWARD[task.rank](
            grad_output[where],
            **_arrays_of(work, task, operands, keys),
            output=output[where],
            lse=lse[where],
            grad_lse=None if grad_lse is None else grad_lse[where],
            **task.parameters(work),
        )
        if len(works) == 1:
            grad_query = made.query
        else:
            grad_query[where] = made.query
        key_gradients.add(work.keys, (made.key, made.value))
        for name in SHARED:
            if getattr(made, name) is not None:
                shared[name].append(getattr(made, name))

    alone = [work for work in works if work.keys.within(plan.own)]
    for work in works:
        if work not in alone:
            differentiate(work)
    exchange = key_gradients.send() if plan.exchanges else None
    for work in alone:
        differentiate(work)
    grad_key, grad_value = key_gradients.total(None if exchange is None else exchange.wait())
    of_shared = {
        name: _sum(shared[name], getattr(operands, name))
        for name in SHARED
        if getattr(operands, name) is not None
    }
    return Operands(query=grad_query, key=grad_key, value=grad_value, **of_shared)


def _arrays_of(work: Work, task: Task, operands: Operands, keys: Keys) -> dict[str, Any]:
    """The arrays of a call for `work`."""
    key, value, key_mask = keys.of(work.keys)
    query = operands.query[of_tokens(work.queries, task.plan.own)]
    return operands._replace(query=query, key=key, value=value, key_mask=key_mask)._asdict()


def _sum(gradients: list[torch.Tensor], of: torch.Tensor) -> torch.Tensor:
    """The sum of the gradients of an array from several calls, taken in float32 at least."""
    if len(gradients) == 1:
        return gradients[0]
    wide = torch.promote_types(of.dtype, torch.float32)
    total = torch.zeros(of.shape, dtype=wide, device=of.device)
    for gradient in gradients:
        total += gradient
    return total.to(of.dtype)
