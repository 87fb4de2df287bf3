"""The modules of ``natten``, with the names that their arguments had over time."""

from __future__ import annotations

from typing import Any

from cuneigh import torch as own


def _arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a module in cuneigh's terms.

    ``dim`` is what ``embed_dim`` was called before 0.20, and ``bias`` what ``rel_pos_bias`` was
    called in 0.14. A scale of 0 stands for the default.
    """
    for old, new in (("dim", "embed_dim"), ("bias", "rel_pos_bias")):
        if old in given:
            if new in given:
                raise TypeError(f"natten.{name}: {old} and {new} are one argument; give either")
            given[new] = given.pop(old)
    if "qk_scale" in given:
        given["qk_scale"] = given["qk_scale"] or None
    return given


class NeighborhoodAttention1D(own.NeighborhoodAttention1D):
    """`cuneigh.torch.NeighborhoodAttention1D`, also with the arguments of NATTEN before 0.20."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_arguments(type(self).__name__, kwargs))


class NeighborhoodAttention2D(own.NeighborhoodAttention2D):
    """`cuneigh.torch.NeighborhoodAttention2D`, also with the arguments of NATTEN before 0.20."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_arguments(type(self).__name__, kwargs))


class NeighborhoodAttention3D(own.NeighborhoodAttention3D):
    """`cuneigh.torch.NeighborhoodAttention3D`, also with the arguments of NATTEN before 0.20."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_arguments(type(self).__name__, kwargs))
