"""NATTEN 0.14: 1-D and 2-D, int sizes, modules that pad and have a bias by default."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

from cuneigh.compat.natten import _heads_first
from cuneigh.compat.natten._arguments import integer
from cuneigh.compat.natten._settings import Module, Settings


def functions(rank: int) -> dict[str, list[Callable[..., Any]]]:
    """What ``natten.functional`` has for this rank, the oldest signature of each name first."""
    qkrpb_name, qk_name, av_name = (f"natten{rank}d{half}" for half in ("qkrpb", "qk", "av"))

    def early_qkrpb(query: Any, key: Any, rpb: Any, dilation: int) -> Any:
        """Up to 0.14.4: the bias tells the size of the window."""
        if rpb is None:
            raise TypeError(
                f"natten.{qkrpb_name}: kernel_size is missing, and there is no rpb to tell it"
            )
        return qkrpb(query, key, rpb, (rpb.shape[-1] + 1) // 2, dilation)

    def qkrpb(query: Any, key: Any, rpb: Any, kernel_size: int, dilation: int) -> Any:
        window = kernel_size, dilation
        return _heads_first.qk(qkrpb_name, rank, query, key, *window, rpb=rpb, cast=False)

    def qk(query: Any, key: Any, kernel_size: int, dilation: int) -> Any:
        return _heads_first.qk(qk_name, rank, query, key, kernel_size, dilation)

    def early_av(attn: Any, value: Any, dilation: int) -> Any:
        """Up to 0.14.5: the number of weights tells the size of the window."""
        slots = attn.shape[-1]
        return av(attn, value, slots if rank == 1 else isqrt(slots), dilation)

    def av(attn: Any, value: Any, kernel_size: int, dilation: int) -> Any:
        return _heads_first.av(av_name, rank, attn, value, kernel_size, dilation, cast=False)

    return {qkrpb_name: [early_qkrpb, qkrpb], qk_name: [qk], av_name: [early_av, av]}


def module(rank: int) -> Module:
    """The arguments of ``NeighborhoodAttention1D`` and ``2D``."""
    call = f"NeighborhoodAttention{rank}D"

    def settings(
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> Settings:
        kernel_size = integer(call, "kernel_size", kernel_size)
        dilation = integer(call, "dilation", 1 if dilation is None else dilation)
        arguments = {
            "embed_dim": dim,
            "num_heads": num_heads,
            "kernel_size": kernel_size,
            "dilation": dilation,
            "rel_pos_bias": bias,
            "qkv_bias": qkv_bias,
            "qk_scale": qk_scale,
            "attn_drop": attn_drop,
            "proj_drop": proj_drop,
        }
        attributes = {
            "kernel_size": kernel_size,
            "dilation": dilation,
            "window_size": kernel_size * dilation,
        }
        return Settings(arguments, attributes, absent=("stride", "is_causal"))

    return settings


def early_module(
    dim: int,
    kernel_size: int,
    num_heads: int,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    dilation: int | None = None,
) -> Settings:
    """The arguments of ``NeighborhoodAttention``, which 0.14.4 was the last to have."""
    return module(2)(
        dim,
        num_heads,
        kernel_size,
        dilation,
        qkv_bias=qkv_bias,
        qk_scale=qk_scale,
        attn_drop=attn_drop,
        proj_drop=proj_drop,
    )
