"""The two halves of neighborhood attention on ``[batch, heads, tokens.., dim]``, as up to 0.17."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import cuneigh
from cuneigh.compat.natten._arguments import flags, listed, refuse_nested, steps

_QK = {1: cuneigh.na1d_qk, 2: cuneigh.na2d_qk, 3: cuneigh.na3d_qk}
_AV = {1: cuneigh.na1d_av, 2: cuneigh.na2d_av, 3: cuneigh.na3d_av}


def qk(
    call: str,
    rank: int,
    query: Any,
    key: Any,
    kernel_size: Any,
    dilation: Any,
    *,
    is_causal: Any = False,
    rpb: Any = None,
    additional_keys: Any = None,
    cast: bool = True,
) -> Any:
    """The logits of ``natten.{call}``: the products with the keys of the window, then the others.

    Parameters
    ----------
    query, key : tensor [B, heads, X1, .., dim]
    rpb : tensor [heads, 2 * kernel_size - 1, ..], optional
    additional_keys : tensor [B, heads, n, dim], optional
    cast : bool
        Whether `rpb` is cast to the dtype of `key`.

    Returns
    -------
    tensor [B, heads, X1, .., window slots + n]
        A view of heads-last memory.
    """
    tokens = {"query": query, "key": key}
    _check(call, rank, tokens, {"additional_keys": additional_keys})
    return _heads_first(
        call,
        _QK[rank],
        _heads_last(query),
        _heads_last(key),
        listed(kernel_size),
        dilation=steps(dilation),
        is_causal=flags(is_causal),
        rpb=rpb.to(key.dtype) if cast and isinstance(rpb, torch.Tensor) else rpb,
        additional_keys=_heads_last(additional_keys),
    )


def av(
    call: str,
    rank: int,
    attn: Any,
    value: Any,
    kernel_size: Any,
    dilation: Any,
    *,
    is_causal: Any = False,
    additional_values: Any = None,
    cast: bool = True,
) -> Any:
    """The weighted means of ``natten.{call}``, for weights laid out as `qk` lays out logits.

    Parameters
    ----------
    attn : tensor [B, heads, X1, .., window slots + n]
    value : tensor [B, heads, X1, .., dim]
    additional_values : tensor [B, heads, n, dim], optional
    cast : bool
        Whether `attn` is cast to the dtype of `value`.

    Returns
    -------
    tensor [B, heads, X1, .., dim]
        A view of heads-last memory.
    """
    tokens = {"attn": attn, "value": value}
    _check(call, rank, tokens, {"additional_values": additional_values})
    return _heads_first(
        call,
        _AV[rank],
        _heads_last(attn.to(value.dtype) if cast else attn),
        _heads_last(value),
        listed(kernel_size),
        dilation=steps(dilation),
        is_causal=flags(is_causal),
        additional_values=_heads_last(additional_values),
    )


def _check(call: str, rank: int, tokens: dict[str, Any], additional: dict[str, Any]) -> None:
    """Raise unless these are tensors with as many axes as they need."""
    refuse_nested(call, tokens | additional)
    places = ", ".join(f"X{axis + 1}" for axis in range(rank))
    layouts = [(tokens, f"[batch, heads, {places}, dim]", rank + 3)]
    layouts.append((additional, "[batch, heads, n, dim]", 4))
    for arrays, layout, ndim in layouts:
        for name, array in arrays.items():
            if array is None and arrays is additional:
                continue
            if not isinstance(array, torch.Tensor):
                raise TypeError(
                    f"natten.{call}: {name} is of type {type(array).__name__}; "
                    "a torch.Tensor is needed"
                )
            if array.ndim != ndim:
                raise ValueError(
                    f"natten.{call}: {name} has {array.ndim} axes, but {ndim} are needed: "
                    f"{name}.shape is {tuple(array.shape)} and should be {layout}"
                )


def _heads_last(array: Any) -> Any:
    return None if array is None else array.movedim(1, -2)


def _heads_first(call: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of `function`, whose errors are made to say what was called."""
    try:
        result = function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"natten.{call}: with heads moved behind the tokens, {error}") from error
    return result.movedim(-2, 1)
