"""NATTEN 0.20 and later, with the kernels that it chooses itself."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cuneigh._measure.peers.contract import Calls, Given, UnfitError, differentiated, refuse_extras


def natten(given: Given) -> Calls:
    import torch

    refuse_extras(given)
    problem = given.problem
    try:
        library = import_module("natten")
    except ImportError:
        raise UnfitError("NATTEN is not installed") from None
    function = getattr(library, f"na{problem.rank}d", None)
    if function is None or "cuneigh" in getattr(function, "__module__", ""):
        raise UnfitError(f"{library.__name__} is not NATTEN 0.20 or later")
    names = ("kernel_size", "stride", "dilation", "is_causal")
    options = {name: tuple(getattr(axis, name) for axis in problem.axes) for name in names}

    def forward(query: Any, key: Any, value: Any) -> Any:
        return function(query, key, value, scale=problem.scale, **options)

    def without_gradient() -> Any:
        with torch.no_grad():
            return forward(given.query, given.key, given.value)

    return Calls(without_gradient, differentiated(given, forward))
