"""The parameters of a call, checked: its window, the part of a layout that it is given, its scale.

The error is a ValueError, or a TypeError for a wrong type, and names the call, the argument, the
axis and the value.
"""

from __future__ import annotations

import math
import operator
from abc import ABC
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

from cuneigh._messages import shown
from cuneigh._window import BORDERS, Axis, Border


class Window(NamedTuple):
    """The window arguments of a call, one entry per token axis."""

    kernel_size: tuple[int, ...]
    """Empty for `attention`, which has one token axis and sees every key."""
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]


class Part(NamedTuple):
    """How the tokens of a call lie in their layout, one entry per token axis.

    A call without one is given the whole layout, and all its borders are "shift".
    """

    border: tuple[Border, ...]
    layout: tuple[int, ...] | None
    """None for that of the arrays, which must then be whole."""
    query_start: tuple[int, ...]
    key_start: tuple[int, ...]


def window_arguments(
    call: str,
    rank: int,
    kernel_size: object,
    stride: object,
    dilation: object,
    is_causal: object,
) -> Window:
    """The window arguments repeated over the token axes, their types checked."""
    return Window(
        _per_axis(call, "kernel_size", kernel_size, rank, integer),
        _per_axis(call, "stride", stride, rank, integer),
        _per_axis(call, "dilation", dilation, rank, integer),
        _per_axis(call, "is_causal", is_causal, rank, boolean),
    )


def part_arguments(
    call: str, rank: int, border: object, layout: object, query_start: object, key_start: object
) -> Part:
    """The arguments about the layout repeated over the token axes, their types checked."""
    return Part(
        _per_axis(call, "border", border, rank, _border),
        None if layout is None else _per_axis(call, "layout", layout, rank, integer),
        _per_axis(call, "query_start", query_start, rank, integer),
        _per_axis(call, "key_start", key_start, rank, integer),
    )


def _per_axis(call: str, name: str, value: Any, rank: int, convert: Any) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        if getattr(value, "ndim", 0) > 0:
            raise TypeError(
                f"{call}: {name}={shown(value)} is {_type_name(value)}; a tuple with an entry for "
                f"each of the {rank} token axes is needed, or one value for all of them"
            )
        return (convert(call, name, value),) * rank
    if len(value) != rank:
        raise ValueError(
            f"{call}: {name}={shown(value)} has {len(value)} entries, but there are {rank} token "
            "axes"
        )
    return tuple(convert(call, f"{name}[{axis}]", entry) for axis, entry in enumerate(value))


class Symbol(ABC):  # noqa: B024 - types are registered with it
    """An integer that a framework which traces a program knows by its name only."""


def integer(call: str, name: str, value: Any) -> int:
    """`value` as an int; TypeError unless it is one, of Python or of an array library."""
    if type(value) is int or isinstance(value, Symbol):
        return value  # type: ignore[return-value]
    if not _boolean_like(value):
        try:
            return operator.index(value)
        except TypeError:
            pass
    hint = "; sizes are neither traced nor differentiated" if hasattr(value, "dtype") else ""
    raise TypeError(f"{call}: {name}={shown(value)} is {_type_name(value)}, not an int{hint}")


def _border(call: str, name: str, value: Any) -> Border:
    if not isinstance(value, str):
        raise TypeError(f"{call}: {name}={shown(value)} is {_type_name(value)}, not a str")
    if value not in BORDERS:
        names = ", ".join(map(repr, BORDERS))
        raise ValueError(f"{call}: {name}={shown(value)} is not one of {names}")
    return value


def boolean(call: str, name: str, value: Any) -> bool:
    """`value` as a bool; TypeError unless it is one, of Python or of an array library."""
    if _boolean_like(value):
        return bool(value)
    raise TypeError(f"{call}: {name}={shown(value)} is {_type_name(value)}, not a bool")


def _boolean_like(value: object) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")


def _type_name(value: object) -> str:
    return type(value).__name__


def scale_or_default(call: str, scale: object) -> float | None:
    """`scale`, checked; None, which stands for ``head_dim ** -0.5``, stays None."""
    return None if scale is None else finite_scale(call, scale)


def finite_scale(call: str, scale: object) -> float:
    """`scale` as a float; TypeError unless it is a real number, ValueError unless finite."""
    if not isinstance(scale, Real) or _boolean_like(scale):
        raise TypeError(f"{call}: scale={shown(scale)} is {_type_name(scale)}, not a real number")
    try:
        result = float(scale)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"{call}: scale={shown(scale)} is not finite")
    return result


def neighborhood_axes(
    call: str,
    tokens: Sequence[int],
    window: Window,
    heads: int = 0,
    keys: Sequence[int] | None = None,
    part: Part | None = None,
) -> tuple[Axis, ...]:
    """One `Axis` per token axis, every rule of the window and of parts of a layout checked.

    `tokens` are the lengths of the queries and `keys` those of the keys, the same if not given;
    `heads` is the length of the axis after those of the tokens.
    """
    keys = tokens if keys is None else keys
    is_whole = part is None or part.layout is None
    layout = keys if part is None or part.layout is None else part.layout
    axes = []
    for axis, (k, s, d, causal) in enumerate(zip(*window, strict=True)):
        where, length = f"on axis {axis}", layout[axis]
        border: Border = "shift" if part is None else part.border[axis]
        for name, size in (("kernel_size", k), ("dilation", d), ("stride", s)):
            if size < 1:
                raise ValueError(f"{call}: {name}={shown(size)} {where} must be at least 1")
        if s > k:
            raise ValueError(
                f"{call}: stride={shown(s)} {where} must not exceed kernel_size={shown(k)}"
            )
        if border == "wrap":
            _check_ring(call, where, length, d, causal)
        fits = not length or k * d <= length
        if not fits and border != "cut":
            raise ValueError(
                f"{call}: kernel_size={shown(k)} times dilation={shown(d)} {where} is "
                f"{shown(k * d)}, which exceeds "
                + (f"that axis's length {length}" if is_whole else f"layout={length}")
                + (_heads_first_hint(tokens, window, heads) if is_whole else "")
            )
        if causal and fits:  # which cuts windows short in any case
            border = "shift"
        found = Axis(tokens[axis], keys[axis], k, s, d, causal, border, length)
        if part is not None:
            starts = part.query_start[axis], part.key_start[axis]
            check_part(call, where, found, is_whole, *starts)
            found = found.at(*starts)
        axes.append(found)
    return tuple(axes)


def _check_ring(call: str, where: str, length: int, dilation: int, is_causal: bool) -> None:
    if is_causal:
        raise ValueError(
            f"{call}: border='wrap' cannot be combined with is_causal=True {where}: on a ring no "
            f"key comes after a query"
        )
    if length % dilation:
        raise ValueError(
            f"{call}: border='wrap' {where} needs a length of which dilation={shown(dilation)} is "
            f"a divisor, but the length is {length}"
        )


def check_part(
    call: str, where: str, axis: Axis, is_unknown: bool, query_start: int, key_start: int
) -> None:
    """Raise unless the part of an axis lies in its layout, which is unknown if not given."""
    for side, start, count in (
        ("query", query_start, axis.length),
        ("key", key_start, axis.key_length),
    ):
        name = f"{side}_start"
        if is_unknown and start:
            raise ValueError(
                f"{call}: {name}={shown(start)} {where} needs layout, the lengths of the whole"
            )
        if axis.border == "wrap":
            if count > axis.layout:
                raise ValueError(
                    f"{call}: {side} has {count} tokens {where}, more than layout={axis.layout}"
                )
        elif start < 0:
            raise ValueError(f"{call}: {name}={shown(start)} {where} must not be negative")
        elif start + count > axis.layout:
            raise ValueError(
                f"{call}: {name}={shown(start)} plus the {count} tokens of {side} {where} is "
                f"{shown(start + count)}, which exceeds layout={axis.layout}"
            )


def _heads_first_hint(tokens: Sequence[int], window: Window, heads: int) -> str:
    """What to say of a window that would fit if the axes were ``[batch, heads, tokens.., dim]``."""
    lengths = (*tokens[1:], heads)
    needed = zip(window.kernel_size, window.dilation, lengths, strict=True)
    if not all(size * dilation <= length for size, dilation, length in needed):
        return ""
    names = ", ".join(f"X{axis + 1}" for axis in range(len(tokens)))
    return (
        f" (arrays are heads-last, [batch, {names}, heads, dim]: if heads come first here, move "
        f"that axis)"
    )
