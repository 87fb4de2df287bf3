"""NATTEN 0.15: as 0.14, in 3-D with a size of its own for the first axis, with additional keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuneigh.compat.natten import _heads_first
from cuneigh.compat.natten._arguments import integer
from cuneigh.compat.natten._generations import v0_14
from cuneigh.compat.natten._settings import Module, Settings

Function = Callable[..., Any]


def functions(rank: int) -> dict[str, list[Function]]:
    """What ``natten.functional`` has for this rank."""
    with_bias, qkrpb = f"na{rank}d_qk_with_bias", f"natten{rank}dqkrpb"
    qks = [f"na{rank}d_qk", f"natten{rank}dqk"]
    avs = [f"na{rank}d_av", f"natten{rank}dav"]
    if rank == 3:
        made = {name: _qk_3d(name) for name in qks} | {name: _av_3d(name) for name in avs}
        made |= {with_bias: _qk_with_bias_3d(with_bias), qkrpb: _qkrpb_3d(qkrpb)}
    else:
        made = {name: _qk(name, rank) for name in qks} | {name: _av(name, rank) for name in avs}
        made |= {with_bias: _qk_with_bias(with_bias, rank), qkrpb: _qkrpb(qkrpb, rank)}
    return {name: [function] for name, function in made.items()}


def _qk(name: str, rank: int) -> Function:
    def qk(
        query: Any, key: Any, kernel_size: int, dilation: int, additional_keys: Any = None
    ) -> Any:
        window, given = (kernel_size, dilation), {"additional_keys": additional_keys}
        return _heads_first.qk(name, rank, query, key, *window, **given)

    return qk


def _qk_with_bias(name: str, rank: int) -> Function:
    def qk_with_bias(
        query: Any,
        key: Any,
        bias: Any,
        kernel_size: int,
        dilation: int,
        additional_keys: Any = None,
    ) -> Any:
        window, given = (kernel_size, dilation), {"additional_keys": additional_keys, "rpb": bias}
        return _heads_first.qk(name, rank, query, key, *window, **given)

    return qk_with_bias


def _qkrpb(name: str, rank: int) -> Function:
    def qkrpb(query: Any, key: Any, rpb: Any, kernel_size: int, dilation: int) -> Any:
        return _heads_first.qk(name, rank, query, key, kernel_size, dilation, rpb=rpb)

    return qkrpb


def _av(name: str, rank: int) -> Function:
    def av(
        attn: Any, value: Any, kernel_size: int, dilation: int, additional_values: Any = None
    ) -> Any:
        window, given = (kernel_size, dilation), {"additional_values": additional_values}
        return _heads_first.av(name, rank, attn, value, *window, **given)

    return av


def _qk_3d(name: str) -> Function:
    def qk(
        query: Any,
        key: Any,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
        additional_keys: Any = None,
    ) -> Any:
        window = _window_3d(kernel_size_d, kernel_size, dilation_d, dilation)
        return _heads_first.qk(name, 3, query, key, *window, additional_keys=additional_keys)

    return qk


def _qk_with_bias_3d(name: str) -> Function:
    def qk_with_bias(
        query: Any,
        key: Any,
        bias: Any,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
        additional_keys: Any = None,
    ) -> Any:
        window = _window_3d(kernel_size_d, kernel_size, dilation_d, dilation)
        given = {"additional_keys": additional_keys, "rpb": bias}
        return _heads_first.qk(name, 3, query, key, *window, **given)

    return qk_with_bias


def _qkrpb_3d(name: str) -> Function:
    def qkrpb(
        query: Any,
        key: Any,
        rpb: Any,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
    ) -> Any:
        window = _window_3d(kernel_size_d, kernel_size, dilation_d, dilation)
        return _heads_first.qk(name, 3, query, key, *window, rpb=rpb)

    return qkrpb


def _av_3d(name: str) -> Function:
    def av(
        attn: Any,
        value: Any,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
        additional_values: Any = None,
    ) -> Any:
        window = _window_3d(kernel_size_d, kernel_size, dilation_d, dilation)
        return _heads_first.av(name, 3, attn, value, *window, additional_values=additional_values)

    return av


def _window_3d(
    kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)


def module(rank: int) -> Module:
    """The arguments of ``NeighborhoodAttention1D``, ``2D`` and ``3D``."""
    return v0_14.module(rank) if rank < 3 else _module_3d


def _module_3d(
    dim: int,
    num_heads: int,
    kernel_size: int,
    kernel_size_d: int | None = None,
    dilation: int = 1,
    dilation_d: int | None = None,
    bias: bool = True,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> Settings:
    call = "NeighborhoodAttention3D"
    kernel_size = integer(call, "kernel_size", kernel_size)
    kernel_size_d = integer(call, "kernel_size_d", kernel_size_d or kernel_size)
    dilation = integer(call, "dilation", 1 if dilation is None else dilation)
    dilation_d = integer(call, "dilation_d", dilation_d or dilation)
    windows = _window_3d(kernel_size_d, kernel_size, dilation_d, dilation)
    arguments = {
        "embed_dim": dim,
        "num_heads": num_heads,
        "kernel_size": windows[0],
        "dilation": windows[1],
        "rel_pos_bias": bias,
        "qkv_bias": qkv_bias,
        "qk_scale": qk_scale,
        "attn_drop": attn_drop,
        "proj_drop": proj_drop,
    }
    attributes = {
        "kernel_size": kernel_size,
        "kernel_size_d": kernel_size_d,
        "dilation": dilation,
        "dilation_d": dilation_d,
        "window_size": kernel_size * dilation,
        "window_size_d": kernel_size_d * dilation_d,
    }
    return Settings(arguments, attributes, absent=("stride", "is_causal"))
