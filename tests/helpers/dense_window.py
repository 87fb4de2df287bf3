"""Neighborhood attention as dense attention with a mask, in PyTorch and differentiable."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from helpers.brute_force import sees

from cuneigh._window import Axis


def attention(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Any,
    *,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    scale: float | None = None,
    rpb: Any = None,
) -> Any:
    """Of [batch, tokens.., heads, dim], for any number of token axes."""
    tokens, dim = query.shape[1:-2], query.shape[-1]
    rank, count = len(tokens), math.prod(tokens)
    window = [
        each if isinstance(each, (tuple, list)) else [each] * rank
        for each in (kernel_size, stride, dilation, is_causal)
    ]
    axes = [Axis(n, n, *of_axis) for n, *of_axis in zip(tokens, *window, strict=True)]

    def of_pairs(table: Any, axis: int) -> Any:
        """A table [n, n] of one axis, over the pairs of tokens: [x1, .., y1, ..]."""
        shape = [1] * (2 * rank)
        shape[axis] = shape[rank + axis] = tokens[axis]
        return torch.tensor(table).reshape(shape)

    seen, away = [], []
    for a, axis in enumerate(axes):
        n, k, d = axis.length, axis.kernel_size, axis.dilation
        seen.append(of_pairs([[sees(axis, x, y) for y in range(n)] for x in range(n)], a))
        offsets = [[(y // d - x // d + k - 1) % (2 * k - 1) for y in range(n)] for x in range(n)]
        away.append(of_pairs(offsets, a))
    mask = functools.reduce(torch.logical_and, seen).reshape(count, count)

    flat = [tensor.flatten(1, rank) for tensor in (query, key, value)]
    logits = torch.einsum("bxhd,byhd->bhxy", *flat[:2]) * (dim**-0.5 if scale is None else scale)
    if rpb is not None:
        logits = logits + rpb[(slice(None), *away)].reshape(-1, count, count)
    weights = logits.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("bhxy,byhd->bxhd", weights, flat[2]).reshape(*query.shape[:-1], -1)
