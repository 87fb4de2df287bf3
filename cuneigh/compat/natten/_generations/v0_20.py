"""NATTEN 0.20: everything heads-last, strides, and no bias. 0.21.0 and 0.21.1 are alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cuneigh.compat.natten import _heads_last
from cuneigh.compat.natten._arguments import flags, listed, only_tuning, steps
from cuneigh.compat.natten._settings import Module, Settings


def functions(rank: int) -> dict[str, list[Callable[..., Any]]]:
    """What ``natten.functional`` has for this rank."""
    return {f"na{rank}d": [_neighborhood(rank)]}


def any_rank() -> dict[str, list[Callable[..., Any]]]:
    """What ``natten.functional`` has for all ranks."""
    generic = {"neighborhood_attention_generic": [_neighborhood(None)]}
    return {**generic, "attention": [_attention], "merge_attentions": [_merge_attentions]}


def _neighborhood(rank: int | None) -> Callable[..., Any]:
    """``na1d``, ``na2d`` or ``na3d``, or what takes any rank."""

    def na(
        query: Any,
        key: Any,
        value: Any,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        scale: float | None = None,
        additional_keys: Any = None,
        additional_values: Any = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        try_fuse_additional_kv: bool = False,
    ) -> Any:
        own = _heads_last.rank_of(query) if rank is None else rank
        only_tuning(f"na{own}d", "attention_kwargs", attention_kwargs)
        window = kernel_size, stride, dilation, is_causal
        extra = additional_keys, additional_values
        return _heads_last.neighborhood(own, query, key, value, *window, scale, *extra)

    return na


def _attention(
    query: Any,
    key: Any,
    value: Any,
    scale: float | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    return _heads_last.dense(query, key, value, False, scale, return_lse)


def _merge_attentions(
    outputs: Sequence[Any], lse_tensors: Sequence[Any], torch_compile: bool = True
) -> Any:
    """Without the lse, which is returned since 0.21.5."""
    return _heads_last.merge(outputs, lse_tensors)[0]


def module(rank: int) -> Module:
    """The arguments of ``NeighborhoodAttention1D``, ``2D`` and ``3D``."""

    def settings(
        embed_dim: int,
        num_heads: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> Settings:
        arguments = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "kernel_size": listed(kernel_size),
            "stride": steps(stride),
            "dilation": steps(dilation),
            "is_causal": flags(is_causal),
            "qkv_bias": qkv_bias,
            "qk_scale": qk_scale,
            "proj_drop": proj_drop,
        }
        attributes = {"rank": rank, "na_dim": rank, "expected_input_tensor_rank": rank + 2}
        return Settings(arguments, attributes)

    return settings


def early_module(rank: int) -> Module:
    """The arguments of 0.20.0, whose first is called ``dim``."""

    def settings(
        dim: int,
        num_heads: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> Settings:
        window = kernel_size, stride, dilation, is_causal
        return module(rank)(dim, num_heads, *window, qkv_bias, qk_scale, proj_drop)

    return settings


def generic_module(
    na_dim: int,
    embed_dim: int,
    num_heads: int,
    kernel_size: Any,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    proj_drop: float = 0.0,
) -> Settings:
    """The arguments of ``NeighborhoodAttentionGeneric``."""
    if na_dim not in (1, 2, 3):
        raise ValueError(f"natten.NeighborhoodAttentionGeneric: na_dim={na_dim!r} is not 1, 2 or 3")
    window = kernel_size, stride, dilation, is_causal
    return module(na_dim)(embed_dim, num_heads, *window, qkv_bias, qk_scale, proj_drop)
