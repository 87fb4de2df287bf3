"""The checks of ``natten.utils.checks``: window arguments made into tuples, one entry per axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cuneigh._parameters import boolean
from cuneigh.compat.natten._arguments import flags, integer, listed, steps
from cuneigh.compat.natten._calls import form, of_any_generation

__all__ = [
    *("check_all_args", "check_causal_arg", "check_dilation_arg", "check_input_size_arg"),
    *("check_kernel_size_arg", "check_stride_arg", "get_num_na_weights"),
]


def _per_axis(
    call: str, na_dim: int, name: str, given: Any, convert: Callable[[str, str, Any], Any]
) -> tuple[Any, ...]:
    """`given` for each axis, each entry converted or refused by `convert`."""
    if na_dim not in (1, 2, 3):
        raise ValueError(f"natten.{call}: na_dim={na_dim!r} is not 1, 2 or 3")
    entries = listed(given)
    if not isinstance(entries, tuple):
        return (convert(call, name, entries),) * na_dim
    if len(entries) != na_dim:
        raise ValueError(
            f"natten.{call}: {name}={given!r} has {len(entries)} entries, but there are {na_dim} "
            "token axes"
        )
    return tuple(convert(call, f"{name}[{axis}]", entry) for axis, entry in enumerate(entries))


def _size(call: str, name: str, given: Any) -> int:
    size = integer(call, name, given)
    if size < 1:
        raise ValueError(f"natten.{call}: {name}={size} must be at least 1")
    return size


def _flag(call: str, name: str, given: Any) -> bool:
    return boolean(f"natten.{call}", name, given)


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    return _per_axis("check_kernel_size_arg", na_dim, "kernel_size", kernel_size, _size)


def check_input_size_arg(na_dim: int, input_size: Any) -> tuple[int, ...]:
    return _per_axis("check_input_size_arg", na_dim, "input_size", input_size, _size)


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    return _per_axis("check_stride_arg", na_dim, "stride", steps(stride), _size)


def check_dilation_arg(na_dim: int, dilation: Any) -> tuple[int, ...]:
    return _per_axis("check_dilation_arg", na_dim, "dilation", steps(dilation), _size)


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    return _per_axis("check_causal_arg", na_dim, "is_causal", flags(is_causal), _flag)


def _check_all_args_0_17(
    na_dim: int, kernel_size: Any, dilation: Any, is_causal: Any
) -> tuple[Any, ...]:
    return (
        check_kernel_size_arg(na_dim, kernel_size),
        check_dilation_arg(na_dim, dilation),
        check_causal_arg(na_dim, is_causal),
    )


def _check_all_args(
    na_dim: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any
) -> tuple[Any, ...]:
    kernel_size_, dilation_, is_causal_ = _check_all_args_0_17(
        na_dim, kernel_size, dilation, is_causal
    )
    return kernel_size_, check_stride_arg(na_dim, stride), dilation_, is_causal_


check_all_args = of_any_generation(
    __name__,
    "check_all_args",
    [
        form("0.17", _check_all_args_0_17),
        form("0.20", _check_all_args),
        form("0.21", _check_all_args),
    ],
)


def get_num_na_weights(kernel_size: tuple[int, ...]) -> int:
    """The number of keys in a window."""
    return math.prod(kernel_size)
