"""The functions of ``natten.functional``, of all generations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cuneigh
from cuneigh._ops.types import Flags, Sizes

__all__ = [
    *("attention", "merge_attentions", "neighborhood_attention_generic"),
    *("na1d", "na1d_av", "na1d_qk", "na2d", "na2d_av", "na2d_qk", "na3d", "na3d_av", "na3d_qk"),
    *("natten1dav", "natten1dqk", "natten1dqkrpb", "natten2dav", "natten2dqk", "natten2dqkrpb"),
    *("natten3dav", "natten3dqk", "natten3dqkrpb"),
]

TUNING = frozenset(
    [
        *("backend", "attention_kwargs", "torch_compile", "kernel_schedule"),
        *("run_persistent_kernel", "backward_use_pt_reduction", "backward_kv_splits"),
        *("q_tile_shape", "kv_tile_shape", "backward_q_tile_shape", "backward_kv_tile_shape"),
        *("q_tile_size", "kv_tile_size", "backward_q_tile_size", "backward_kv_tile_size"),
    ]
)
"""Arguments that choose and tune NATTEN's own kernels, and say nothing to cuneigh's."""


def _ignore_tuning(call: str, arguments: dict[str, Any]) -> None:
    """Raise for an argument that is none of `TUNING` and asks for something."""
    for name, value in arguments.items():
        if name not in TUNING and value is not None:
            raise NotImplementedError(f"natten.{call}: {name} has no counterpart in cuneigh")


# 0.20 and later


def neighborhood_attention_generic(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    *,
    rpb: Any = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Any:
    """Neighborhood attention with as many token axes as `query` has."""
    rank = query.ndim - 3
    if rank not in _WHOLE:
        raise ValueError(
            f"natten: query has {query.ndim} axes, but 4, 5 or 6 are needed: "
            f"[batch, tokens.., heads, dim]"
        )
    return _WHOLE[rank](
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        additional_keys,
        additional_values,
        rpb=rpb,
        return_lse=return_lse,
        **tuning,
    )


def na1d(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    *,
    rpb: Any = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Any:
    """`cuneigh.na1d` with the arguments of NATTEN 0.20."""
    _ignore_tuning("na1d", tuning)
    return cuneigh.na1d(
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal or False,
        scale or None,  # 0 stands for the default
        additional_keys,
        additional_values,
        rpb,
        return_lse,
    )


def na2d(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    *,
    rpb: Any = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Any:
    """`cuneigh.na2d` with the arguments of NATTEN 0.20."""
    _ignore_tuning("na2d", tuning)
    return cuneigh.na2d(
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal or False,
        scale or None,  # 0 stands for the default
        additional_keys,
        additional_values,
        rpb,
        return_lse,
    )


def na3d(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    *,
    rpb: Any = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Any:
    """`cuneigh.na3d` with the arguments of NATTEN 0.20."""
    _ignore_tuning("na3d", tuning)
    return cuneigh.na3d(
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal or False,
        scale or None,  # 0 stands for the default
        additional_keys,
        additional_values,
        rpb,
        return_lse,
    )


_WHOLE = {1: na1d, 2: na2d, 3: na3d}


def attention(
    query: Any,
    key: Any,
    value: Any,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    **tuning: Any,
) -> Any:
    """`cuneigh.attention` with the arguments of NATTEN 0.20."""
    _ignore_tuning("attention", tuning)
    return cuneigh.attention(query, key, value, is_causal, scale or None, return_lse)


def merge_attentions(
    outputs: Sequence[Any],
    lse_tensors: Sequence[Any],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
    return_lse: bool = False,
) -> Any:
    """`cuneigh.merge_attentions`, whose lse NATTEN only returns when asked for it."""
    output, lse = cuneigh.merge_attentions(outputs, lse_tensors)
    return (output, lse) if return_lse else output


# 0.15 to 0.17: heads-first


def _heads_last(array: Any) -> Any:
    return None if array is None else array.movedim(1, -2)


def _heads_first(array: Any) -> Any:
    return array.movedim(-2, 1)


def na1d_qk(
    query: Any,
    key: Any,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_keys: Any = None,
    is_causal: Flags | None = False,
    rpb: Any = None,
) -> Any:
    """`cuneigh.na1d_qk` with heads first, as in NATTEN 0.17."""
    logits = cuneigh.na1d_qk(
        _heads_last(query),
        _heads_last(key),
        kernel_size,
        dilation=dilation,
        is_causal=is_causal or False,
        rpb=rpb,
        additional_keys=_heads_last(additional_keys),
    )
    return _heads_first(logits)


def na2d_qk(
    query: Any,
    key: Any,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_keys: Any = None,
    is_causal: Flags | None = False,
    rpb: Any = None,
) -> Any:
    """`cuneigh.na2d_qk` with heads first, as in NATTEN 0.17."""
    logits = cuneigh.na2d_qk(
        _heads_last(query),
        _heads_last(key),
        kernel_size,
        dilation=dilation,
        is_causal=is_causal or False,
        rpb=rpb,
        additional_keys=_heads_last(additional_keys),
    )
    return _heads_first(logits)


def na3d_qk(
    query: Any,
    key: Any,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_keys: Any = None,
    is_causal: Flags | None = False,
    rpb: Any = None,
) -> Any:
    """`cuneigh.na3d_qk` with heads first, as in NATTEN 0.17."""
    logits = cuneigh.na3d_qk(
        _heads_last(query),
        _heads_last(key),
        kernel_size,
        dilation=dilation,
        is_causal=is_causal or False,
        rpb=rpb,
        additional_keys=_heads_last(additional_keys),
    )
    return _heads_first(logits)


def na1d_av(
    attn: Any,
    value: Any,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_values: Any = None,
    is_causal: Flags | None = False,
) -> Any:
    """`cuneigh.na1d_av` with heads first, as in NATTEN 0.17."""
    output = cuneigh.na1d_av(
        _heads_last(attn),
        _heads_last(value),
        kernel_size,
        dilation=dilation,
        is_causal=is_causal or False,
        additional_values=_heads_last(additional_values),
    )
    return _heads_first(output)


def na2d_av(
    attn: Any,
    value: Any,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_values: Any = None,
    is_causal: Flags | None = False,
) -> Any:
    """`cuneigh.na2d_av` with heads first, as in NATTEN 0.17."""
    output = cuneigh.na2d_av(
        _heads_last(attn),
        _heads_last(value),
        kernel_size,
        dilation=dilation,
        is_causal=is_causal or False,
        additional_values=_heads_last(additional_values),
    )
    return _heads_first(output)


def na3d_av(
    attn: Any,
    value: Any,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_values: Any = None,
    is_causal: Flags | None = False,
) -> Any:
    """`cuneigh.na3d_av` with heads first, as in NATTEN 0.17."""
    output = cuneigh.na3d_av(
        _heads_last(attn),
        _heads_last(value),
        kernel_size,
        dilation=dilation,
        is_causal=is_causal or False,
        additional_values=_heads_last(additional_values),
    )
    return _heads_first(output)


# 0.14. In 3-D the first axis has a window of its own.


def _sorted(array: Any, heads: int) -> Any:
    """`array` ``[batch, heads, height, width, dim]``, the axes of which may have to be sorted.

    The DiNAT of transformers, from 4.54 on, hands over ``[batch, width, height, heads, dim]`` and
    takes results heads-first, with which it fails in NATTEN. Where it has as many heads as columns,
    the memory says which is which: there is no other reason for it to hold one row after the other,
    and the width outside of the heads.
    """
    if array.ndim != 5:
        return array
    _, first, rows, last, _ = array.stride()
    is_width_first = array.shape[3] == heads and (array.shape[1] != heads or rows > first > last)
    return array.transpose(1, 3) if is_width_first else array


def natten1dqkrpb(query: Any, key: Any, rpb: Any, kernel_size: int, dilation: int) -> Any:
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten1dqk(query: Any, key: Any, kernel_size: int, dilation: int) -> Any:
    return na1d_qk(query, key, kernel_size, dilation)


def natten1dav(attn: Any, value: Any, kernel_size: int, dilation: int) -> Any:
    return na1d_av(attn, value, kernel_size, dilation)


def natten2dqkrpb(query: Any, key: Any, rpb: Any, kernel_size: int, dilation: int) -> Any:
    heads = rpb.shape[0]
    return na2d_qk(_sorted(query, heads), _sorted(key, heads), kernel_size, dilation, rpb=rpb)


def natten2dqk(query: Any, key: Any, kernel_size: int, dilation: int) -> Any:
    return na2d_qk(query, key, kernel_size, dilation)


def natten2dav(attn: Any, value: Any, kernel_size: int, dilation: int) -> Any:
    return na2d_av(attn, _sorted(value, attn.shape[1]), kernel_size, dilation)


def natten3dqkrpb(
    query: Any,
    key: Any,
    rpb: Any,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> Any:
    sizes, dilations = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_qk(query, key, sizes, dilations, rpb=rpb)


def natten3dqk(
    query: Any, key: Any, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Any:
    return natten3dqkrpb(query, key, None, kernel_size_d, kernel_size, dilation_d, dilation)


def natten3dav(
    attn: Any, value: Any, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Any:
    sizes, dilations = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return na3d_av(attn, value, sizes, dilations)
