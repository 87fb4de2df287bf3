"""``natten.experimental`` of 0.17: what there had operators of PyTorch; here everything has."""

from __future__ import annotations

from cuneigh.compat.natten._calls import of_any_generation
from cuneigh.compat.natten._generations import EXPERIMENTAL
from cuneigh.compat.natten._whole_types import Neighborhood

__all__ = ["na1d", "na2d", "na3d"]

na1d: Neighborhood = of_any_generation(__name__, "na1d", EXPERIMENTAL["na1d"])
na2d: Neighborhood = of_any_generation(__name__, "na2d", EXPERIMENTAL["na2d"])
na3d: Neighborhood = of_any_generation(__name__, "na3d", EXPERIMENTAL["na3d"])
