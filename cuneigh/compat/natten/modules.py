"""The modules of ``natten``, with the arguments, attributes and parameters of every generation.

A module is of the newest generation that accepts its arguments, or of the one that was asked for.
Those of 0.14 and 0.15 have a relative positional bias unless ``bias=False``, and pad maps that are
smaller than the window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cuneigh.compat.natten._calls import Form, constructor, settle
from cuneigh.compat.natten._generations import EARLY_MODULE, GENERIC_MODULE, MODULES
from cuneigh.torch._modules import NeighborhoodAttention as Own

__all__ = [
    *("NeighborhoodAttention", "NeighborhoodAttention1D", "NeighborhoodAttention2D"),
    *("NeighborhoodAttention3D", "NeighborhoodAttentionGeneric"),
]


class NeighborhoodAttentionGeneric(Own):
    """Neighborhood attention of ``na_dim`` token axes, with the arguments of NATTEN 0.20."""

    @constructor(GENERIC_MODULE)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._set_up("NeighborhoodAttentionGeneric", GENERIC_MODULE, args, kwargs)

    def _set_up(
        self, call: str, forms: Sequence[Form], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        settings_of, given = settle(call, forms, args, kwargs)
        arguments, attributes, absent = settings_of(*args, **given)
        self.__dict__.update(attributes)  # the rank, on which the rest depends
        arguments["qk_scale"] = arguments["qk_scale"] or None  # 0 stands for the default
        super().__init__(**arguments)
        self.__dict__.update(attributes)
        for name in absent:
            delattr(self, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What NATTEN's own modules, if one was pickled, lack is added."""
        super().__setstate__(state)
        if "embed_dim" not in state:
            self.embed_dim = self.qkv.in_features
        if "na_dim" in state:
            self.rank = state["na_dim"]
        if "rpb" not in self._parameters:
            self.register_parameter("rpb", None)
        if "attn_drop" not in self._modules:
            self.attn_drop = nn.Dropout(0.0)

    @property
    def window(self) -> dict[str, Any]:
        sizes = {name: self._per_axis(name) for name in ("kernel_size", "dilation")}
        defaults = {"stride": 1, "is_causal": False}
        return {**sizes, **{name: getattr(self, name, defaults[name]) for name in defaults}}

    def _per_axis(self, name: str) -> Any:
        """A size, of which the first of three axes has its own in 0.15."""
        size, first = getattr(self, name), getattr(self, f"{name}_d", None)
        return size if first is None else (first, size, size)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        """0.14 and 0.15 put zeros behind a map that is too small, and cut them off again."""
        window_size = getattr(self, "window_size", None)
        if window_size is None:
            return super()._attend(x)
        lengths = x.shape[1:-1]
        missing = [max(0, window_size - length) for length in lengths]
        if self.rank == 3:
            missing[0] = 0  # as in 0.15, where a short first axis is an error
        if not any(missing):
            return super()._attend(x)
        padding = [0, 0, *(size for each in reversed(missing) for size in (0, each))]
        attended = super()._attend(functional.pad(x, padding))
        return attended[(slice(None), *map(slice, lengths))]


class NeighborhoodAttention1D(NeighborhoodAttentionGeneric):
    """1-D neighborhood attention of ``[batch, X1, embed_dim]``, as `cuneigh.torch` has it."""

    rank = 1

    @constructor(MODULES[1])
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._set_up("NeighborhoodAttention1D", MODULES[1], args, kwargs)


class NeighborhoodAttention2D(NeighborhoodAttentionGeneric):
    """2-D neighborhood attention of ``[batch, X1, X2, embed_dim]``, as `cuneigh.torch` has it."""

    rank = 2

    @constructor(MODULES[2])
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._set_up("NeighborhoodAttention2D", MODULES[2], args, kwargs)


class NeighborhoodAttention3D(NeighborhoodAttentionGeneric):
    """3-D neighborhood attention of ``[batch, X1, X2, X3, embed_dim]``, as `cuneigh.torch` has."""

    rank = 3

    @constructor(MODULES[3])
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._set_up("NeighborhoodAttention3D", MODULES[3], args, kwargs)


class NeighborhoodAttention(NeighborhoodAttention2D):
    """`NeighborhoodAttention2D` up to 0.14.4, where the size of the window comes second."""

    @constructor(EARLY_MODULE)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._set_up("NeighborhoodAttention", EARLY_MODULE, args, kwargs)
