"""``natten.experimental`` of 0.17: what there had operators of PyTorch; here everything has."""

from __future__ import annotations

from cuneigh.compat.natten._calls import of_any_generation
from cuneigh.compat.natten._generations import EXPERIMENTAL

__all__ = ["na1d", "na2d", "na3d"]

na1d, na2d, na3d = (of_any_generation(__name__, name, EXPERIMENTAL[name]) for name in __all__)
