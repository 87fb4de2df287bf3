"""What the functions and modules of each generation of NATTEN take, as its own signatures say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuneigh.compat.natten._calls import Form, form
from cuneigh.compat.natten._generations import v0_14, v0_15, v0_17, v0_20, v0_21


def _functions() -> dict[str, list[Form]]:
    """The forms of everything in ``natten.functional``, the oldest first."""
    forms: dict[str, list[Form]] = {}

    def add(generation: str, functions: dict[str, list[Callable[..., Any]]]) -> None:
        for name, of_name in functions.items():
            forms.setdefault(name, []).extend(form(generation, each) for each in of_name)

    for rank in (1, 2, 3):
        if rank < 3:
            add("0.14", v0_14.functions(rank))
        add("0.15", v0_15.functions(rank))
        add("0.17", v0_17.functions(rank))
        add("0.20", v0_20.functions(rank))
        add("0.21", v0_21.functions(rank))
    add("0.20", v0_20.any_rank())
    add("0.21", v0_21.any_rank())
    return forms


FUNCTIONS = _functions()

MODULES = {
    rank: [
        *([form("0.14", v0_14.module(rank))] if rank < 3 else []),
        form("0.15", v0_15.module(rank)),
        form("0.17", v0_17.module(rank)),
        form("0.20", v0_20.early_module(rank)),
        form("0.20", v0_20.module(rank)),
        form("0.21", v0_20.module(rank)),
    ]
    for rank in (1, 2, 3)
}
"""The forms of ``NeighborhoodAttention1D``, ``2D`` and ``3D``."""

EARLY_MODULE = [form("0.14", v0_14.early_module)]
"""The form of ``NeighborhoodAttention``."""

GENERIC_MODULE = [form(generation, v0_20.generic_module) for generation in ("0.20", "0.21")]
"""The forms of ``NeighborhoodAttentionGeneric``."""

EXPERIMENTAL = {f"na{rank}d": [form("0.17", v0_17.whole(rank))] for rank in (1, 2, 3)}
"""The forms of everything in ``natten.experimental``."""
