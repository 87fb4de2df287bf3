"""PyTorch's `scaled_dot_product_attention`: full attention, or any window by a dense mask."""

from __future__ import annotations

import math
from typing import Any

from cuneigh._measure.peers.contract import (
    Calls,
    Given,
    UnfitError,
    differentiated,
    heads_first,
    heads_last,
    refuse_extras,
)
from cuneigh._measure.peers.masks import dense_mask

LARGEST_MASK = 1 << 30
"""Elements of a dense mask, of a byte each."""


def sdpa(given: Given) -> Calls:
    import torch

    refuse_extras(given)
    problem = given.problem
    tokens = math.prod(problem.tokens)
    options: dict[str, Any] = {"scale": problem.scale}
    if problem.group_size > 1:
        options["enable_gqa"] = True
    if given.sees_all:
        options["is_causal"] = problem.axes[0].is_causal
    elif tokens**2 > LARGEST_MASK:
        raise UnfitError(
            f"its mask of {tokens} by {tokens} tokens takes {tokens**2 / 2**30:.0f} GiB"
        )
    else:
        options["attn_mask"] = dense_mask(problem, given.query.device)

    def forward(query: Any, key: Any, value: Any) -> Any:
        output = torch.nn.functional.scaled_dot_product_attention(
            heads_first(query), heads_first(key), heads_first(value), **options
        )
        return heads_last(output, problem.tokens)

    def without_gradient() -> Any:
        with torch.no_grad():
            return forward(given.query, given.key, given.value)

    note = "" if given.sees_all else "dense mask"
    return Calls(without_gradient, differentiated(given, forward), note)
