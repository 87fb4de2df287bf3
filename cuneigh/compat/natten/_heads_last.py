"""Whole attention on ``[batch, tokens.., heads, dim]``, as from 0.17 on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import cuneigh
from cuneigh.compat.natten._arguments import flags, listed, refuse_nested, steps

_WHOLE = {1: cuneigh.na1d, 2: cuneigh.na2d, 3: cuneigh.na3d}


def neighborhood(
    rank: int,
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    scale: float | None,
    additional_keys: Any,
    additional_values: Any,
    rpb: Any = None,
    return_lse: bool = False,
    calls: Mapping[int, Callable[..., Any]] | None = None,
) -> Any:
    """`cuneigh.na2d` or its kin, with None for a stride, dilation or is_causal not given.

    `calls` are others in their place. A bias is cast to the dtype of `query`.
    """
    refuse_nested(f"na{rank}d", {"query": query, "key": key, "value": value})
    if isinstance(rpb, torch.Tensor) and isinstance(query, torch.Tensor):
        rpb = rpb.to(query.dtype)
    return (calls or _WHOLE)[rank](
        query,
        key,
        value,
        listed(kernel_size),
        steps(stride),
        steps(dilation),
        flags(is_causal),
        scale or None,  # 0 stands for the default
        additional_keys,
        additional_values,
        rpb,
        return_lse,
    )


def rank_of(query: Any) -> int:
    """The number of token axes."""
    rank: int = query.ndim - 3
    if rank not in _WHOLE:
        raise ValueError(
            f"natten.neighborhood_attention_generic: query has {query.ndim} axes, but 4, 5 or 6 "
            "are needed: [batch, tokens.., heads, dim]"
        )
    return rank


def dense(
    query: Any, key: Any, value: Any, is_causal: bool, scale: float | None, return_lse: bool
) -> Any:
    """`cuneigh.attention`."""
    refuse_nested("attention", {"query": query, "key": key, "value": value})
    return cuneigh.attention(query, key, value, is_causal, scale or None, return_lse)


def merge(outputs: Sequence[Any], lse_tensors: Sequence[Any]) -> tuple[Any, Any]:
    """`cuneigh.merge_attentions`, for tensors with an lse of any floating point dtype."""
    if isinstance(outputs, (list, tuple)) and isinstance(lse_tensors, (list, tuple)):
        double = any(getattr(output, "dtype", None) == torch.float64 for output in outputs)
        dtype = torch.float64 if double else torch.float32
        lse_tensors = [
            lse.to(dtype) if isinstance(lse, torch.Tensor) and lse.is_floating_point() else lse
            for lse in lse_tensors
        ]
    return cuneigh.merge_attentions(outputs, lse_tensors)
