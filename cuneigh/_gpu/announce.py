"""The plans that backends make, told to whoever wants to know.

`CUNEIGH_PRINT_PLANS=1` prints every one as one line on standard error; `overheard` collects them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

from cuneigh import _settings
from cuneigh._problem import Problem


class Planned(NamedTuple):
    """What a backend does for one pass of an operation."""

    backend: str
    pass_: str
    plan: object


_listener: ContextVar[list[Planned] | None] = ContextVar("listener", default=None)


@contextmanager
def overheard() -> Iterator[list[Planned]]:
    """The plans that are made in the meantime, in their order."""
    plans: list[Planned] = []
    token = _listener.set(plans)
    try:
        yield plans
    finally:
        _listener.reset(token)


def announce(backend: str, pass_: str, problem: Problem, plan: object) -> None:
    """Tell the plan of `backend` for one pass; it is printed once for each problem and plan."""
    listener = _listener.get()
    if listener is not None:
        listener.append(Planned(backend, pass_, plan))
    if _settings.PRINT_PLANS.read():
        _print_once(f"cuneigh: {backend} {pass_} of {describe(problem)}: {plan}")


def describe(problem: Problem) -> str:
    """A problem in one line; what is as usual is left out."""
    axes = problem.axes
    words = [
        f"{joined(problem.tokens)} tokens",
        *([f"{joined(problem.key_tokens)} keys"] if problem.key_tokens != problem.tokens else []),
        f"kernel_size {joined(axis.kernel_size for axis in axes)}",
    ]
    for name in ("stride", "dilation"):
        values = [getattr(axis, name) for axis in axes]
        if any(value != 1 for value in values):
            words.append(f"{name} {joined(values)}")
    if any(axis.is_causal for axis in axes):
        words.append(f"causal {joined(int(axis.is_causal) for axis in axes)}")
    for word, values in (
        ("border", [axis.border for axis in axes]),
        ("of a layout of", [axis.layout if axis.is_part else "-" for axis in axes]),
    ):
        if set(values) - {"shift", "-"}:
            words.append(f"{word} {joined(values)}")
    if problem.has_key_mask:
        words.append("key_mask")
    heads = f"{problem.heads} heads"
    if problem.kv_heads != problem.heads:
        heads += f" on {problem.kv_heads}"
    words += [f"batch {problem.batch}", heads, f"head_dim {problem.head_dim}"]
    if problem.value_dim != problem.head_dim:
        words.append(f"value_dim {problem.value_dim}")
    if problem.additional:
        words.append(f"{problem.additional} additional keys")
    if problem.rpb_dtype:
        words.append("rpb")
    return f"{problem.dtype}, " + ", ".join(words)


def joined(sizes: Iterable[object]) -> str:
    """Sizes along the axes, such as 4x8."""
    return "x".join(map(str, sizes))


@cache
def _print_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
