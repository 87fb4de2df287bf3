"""NATTEN 0.17: sizes for each axis, causal axes, whole attention heads-last, the halves as before.

The names of 0.14 were there up to 0.17.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cuneigh.compat.natten import _heads_first, _heads_last
from cuneigh.compat.natten._arguments import flags, listed, only_tuning, steps
from cuneigh.compat.natten._generations import v0_15
from cuneigh.compat.natten._settings import Module, Settings


def functions(rank: int) -> dict[str, list[Callable[..., Any]]]:
    """What ``natten.functional`` has for this rank."""
    name = f"na{rank}d"

    def qk(
        query: Any,
        key: Any,
        kernel_size: Any,
        dilation: Any = 1,
        additional_keys: Any = None,
        is_causal: Any = False,
        rpb: Any = None,
    ) -> Any:
        return _heads_first.qk(
            f"{name}_qk",
            rank,
            query,
            key,
            kernel_size,
            dilation,
            is_causal=is_causal,
            rpb=rpb,
            additional_keys=additional_keys,
        )

    def av(
        attn: Any,
        value: Any,
        kernel_size: Any,
        dilation: Any = 1,
        additional_values: Any = None,
        is_causal: Any = False,
    ) -> Any:
        return _heads_first.av(
            f"{name}_av",
            rank,
            attn,
            value,
            kernel_size,
            dilation,
            is_causal=is_causal,
            additional_values=additional_values,
        )

    oldest = {key: made for key, made in v0_15.functions(rank).items() if key.startswith("natten")}
    return {name: [whole(rank)], f"{name}_qk": [qk], f"{name}_av": [av], **oldest}


def whole(rank: int) -> Callable[..., Any]:
    """``na1d``, ``na2d`` or ``na3d``, of ``natten.functional`` and of ``natten.experimental``."""

    def na(
        query: Any,
        key: Any,
        value: Any,
        kernel_size: Any,
        dilation: Any = 1,
        is_causal: Any = False,
        rpb: Any = None,
        scale: float | None = None,
        additional_keys: Any = None,
        additional_values: Any = None,
        xformers_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        only_tuning(f"na{rank}d", "xformers_kwargs", xformers_kwargs)
        return _heads_last.neighborhood(
            rank,
            query,
            key,
            value,
            kernel_size,
            1,
            dilation,
            is_causal,
            scale,
            additional_keys,
            additional_values,
            rpb,
        )

    return na


def module(rank: int) -> Module:
    """The arguments of ``NeighborhoodAttention1D``, ``2D`` and ``3D``."""

    def settings(
        dim: int,
        num_heads: int,
        kernel_size: Any,
        dilation: Any = 1,
        is_causal: Any = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ) -> Settings:
        arguments = {
            "embed_dim": dim,
            "num_heads": num_heads,
            "kernel_size": listed(kernel_size),
            "dilation": steps(dilation),
            "is_causal": flags(is_causal),
            "rel_pos_bias": rel_pos_bias,
            "qkv_bias": qkv_bias,
            "qk_scale": qk_scale,
            "attn_drop": attn_drop,
            "proj_drop": proj_drop,
        }
        attributes = {"attn_drop_rate": attn_drop, "use_experimental_ops": use_experimental_ops}
        return Settings(arguments, attributes, absent=("stride",))

    return settings
