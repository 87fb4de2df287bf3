"""Attention of one rank's queries, and its gradient, beside the exchange that they need.

Queries that see none but the rank's own keys are computed while messages are under way; the others
follow. In the backward pass the others come first, so that the gradients of other ranks' keys are
sent back while the rest is computed, the gradient of their queries among it where the backend
computes that last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cuneigh._call import WITH_KEY_GRADIENTS
from cuneigh._ops.neighborhood import (
    Gradients,
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
def forward(task: Task, operands: Operands) -> tuple[torch.Tensor, torch.Tensor, Operands]:
    """Output, lse, and for `backward` the operands with all keys that the queries see."""
    plan, query = task.plan, operands.query
    if task.group:
        terms = task.terms(operands)
        agreement_of(task.process_group).require(task.call, terms, query.device)
    keys = Keys(task, operands)
    seen = keys.among(operands)
    works = task.works(operands)
    if len(works) != 1:
        output = query.new_empty((*query.shape[:-1], operands.value.shape[-1]))
        lse = query.new_empty(query.shape[:-1], dtype=lse_dtype(query))
    for work in works:
        if not work.keys.within(plan.own):
            keys.complete()
        made = FORWARD[task.rank](
            **_arrays_of(work, task, seen), **task.parameters(work), return_lse=True
        )
        if len(works) == 1:
            output, lse = made
        else:
            where = of_tokens(work.queries, plan.own)
            output[where], lse[where] = made
    keys.complete()
    return output, lse, seen


def lse_dtype(query: torch.Tensor) -> torch.dtype:
    return torch.float64 if query.dtype is torch.float64 else torch.float32


@torch.no_grad()  # type: ignore[untyped-decorator]
def backward(
    task: Task,
    seen: Operands,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> Operands:
    """The gradients of `forward`: of the rank's own keys from all ranks, of the rest from its own.

    Gradients of what all ranks share are those of the rank's queries; their sum is the whole.
    """
    plan = task.plan
    key_gradients = KeyGradients(task, seen)
    works = task.works(seen)
    if len(works) != 1:
        grad_query = torch.empty_like(seen.query, memory_format=torch.contiguous_format)
    shared: dict[str, list[torch.Tensor]] = {name: [] for name in SHARED}

    def differentiate(work: Work, is_last_to_send: bool) -> None:
        nonlocal grad_query
        where = of_tokens(work.queries, plan.own)
        are_known = False

        def add(gradients: Sequence[Any]) -> None:
            """Those of the keys, which may come before that of the query."""
            nonlocal are_known
            are_known = True
            of = Gradients(*gradients)
            key_gradients.add(work.keys, of.key, of.value)
            if is_last_to_send:
                key_gradients.send()

        before = WITH_KEY_GRADIENTS.set(add)
        try:
            made = BACKWARD[task.rank](
                grad_output[where],
                **_arrays_of(work, task, seen),
                output=output[where],
                lse=lse[where],
                grad_lse=None if grad_lse is None else grad_lse[where],
                **task.parameters(work),
            )
        finally:
            WITH_KEY_GRADIENTS.reset(before)
        if not are_known:
            add(made)
        if len(works) == 1:
            grad_query = made.query
        else:
            grad_query[where] = made.query
        for name in SHARED:
            if getattr(made, name) is not None:
                shared[name].append(getattr(made, name))

    alone = [work for work in works if work.keys.within(plan.own)]
    others = [work for work in works if work not in alone]
    for work in others:
        differentiate(work, plan.exchanges and work is others[-1])
    if plan.exchanges and not others:
        key_gradients.send()
    for work in alone:
        differentiate(work, False)
    grad_key, grad_value = key_gradients.total()
    of_shared = {
        name: _sum(shared[name], getattr(seen, name))
        for name in SHARED
        if getattr(seen, name) is not None
    }
    return Operands(query=grad_query, key=grad_key, value=grad_value, **of_shared)


def _arrays_of(work: Work, task: Task, seen: Operands) -> dict[str, Any]:
    """The arrays of a call for `work`."""
    queries = of_tokens(work.queries, task.plan.own)
    keys = of_tokens(work.keys, task.plan.seen)
    mask = seen.key_mask
    return seen._replace(
        query=seen.query[queries],
        key=seen.key[keys],
        value=seen.value[keys],
        key_mask=None if mask is None else mask[keys],
    )._asdict()


def _sum(gradients: list[torch.Tensor], of: torch.Tensor) -> torch.Tensor:
    """The sum of the gradients of an array from several calls, taken in float32 at least."""
    if len(gradients) == 1:
        return gradients[0]
    wide = torch.promote_types(of.dtype, torch.float32)
    total = torch.zeros(of.shape, dtype=wide, device=of.device)
    for gradient in gradients:
        total += gradient
    return total.to(of.dtype)
