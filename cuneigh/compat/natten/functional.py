"""The functions of ``natten.functional``, of all generations.

A call is of the newest generation that accepts it, or of the one that was asked for. An argument
given by position to which releases give different meanings is an error that names them.

- 0.20 and later, heads-last: `na1d`, `na2d`, `na3d`, `attention` and `merge_attentions`. The first
  three are in 0.17 as well, with ``dilation`` where 0.20 has ``stride``.
- 0.15 to 0.17, heads-first: `na1d_qk` .. `na3d_av`, and with a bias in 0.15 `na1d_qk_with_bias`.
- 0.14 to 0.17.4, heads-first: `natten1dqkrpb`, `natten1dqk`, `natten1dav`, and likewise in 2-D and,
  from 0.15 on, 3-D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuneigh.compat.natten import _half_types, _whole_types
from cuneigh.compat.natten._calls import of_any_generation
from cuneigh.compat.natten._generations import FUNCTIONS

__all__ = [
    *("attention", "merge_attentions", "neighborhood_attention_generic"),
    *("na1d", "na1d_av", "na1d_qk", "na1d_qk_with_bias"),
    *("na2d", "na2d_av", "na2d_qk", "na2d_qk_with_bias"),
    *("na3d", "na3d_av", "na3d_qk", "na3d_qk_with_bias"),
    *("natten1dav", "natten1dqk", "natten1dqkrpb", "natten2dav", "natten2dqk", "natten2dqkrpb"),
    *("natten3dav", "natten3dqk", "natten3dqkrpb"),
]


def _named(name: str) -> Callable[..., Any]:
    return of_any_generation(__name__, name, FUNCTIONS[name])


na1d: _whole_types.Neighborhood = _named("na1d")
na2d: _whole_types.Neighborhood = _named("na2d")
na3d: _whole_types.Neighborhood = _named("na3d")
neighborhood_attention_generic: _whole_types.NeighborhoodGeneric = _named(
    "neighborhood_attention_generic"
)
attention: _whole_types.Attention = _named("attention")
merge_attentions: _whole_types.MergeAttentions = _named("merge_attentions")

na1d_qk: _half_types.Logits = _named("na1d_qk")
na2d_qk: _half_types.Logits = _named("na2d_qk")
na3d_qk: _half_types.Logits3D = _named("na3d_qk")
na1d_av: _half_types.Output = _named("na1d_av")
na2d_av: _half_types.Output = _named("na2d_av")
na3d_av: _half_types.Output3D = _named("na3d_av")

na1d_qk_with_bias: _half_types.BiasedLogits = _named("na1d_qk_with_bias")
na2d_qk_with_bias: _half_types.BiasedLogits = _named("na2d_qk_with_bias")
na3d_qk_with_bias: _half_types.BiasedLogits3D = _named("na3d_qk_with_bias")

natten1dqkrpb: _half_types.EarlyBiasedLogits = _named("natten1dqkrpb")
natten2dqkrpb: _half_types.EarlyBiasedLogits = _named("natten2dqkrpb")
natten3dqkrpb: _half_types.EarlyBiasedLogits3D = _named("natten3dqkrpb")
natten1dqk: _half_types.EarlyLogits = _named("natten1dqk")
natten2dqk: _half_types.EarlyLogits = _named("natten2dqk")
natten3dqk: _half_types.EarlyLogits3D = _named("natten3dqk")
natten1dav: _half_types.EarlyOutput = _named("natten1dav")
natten2dav: _half_types.EarlyOutput = _named("natten2dav")
natten3dav: _half_types.EarlyOutput3D = _named("natten3dav")


# The functions of autograd of 0.14, as far as they are called


class NATTEN1DQKRPBFunction:
    apply = staticmethod(natten1dqkrpb)


class NATTEN1DAVFunction:
    apply = staticmethod(natten1dav)


class NATTEN2DQKRPBFunction:
    apply = staticmethod(natten2dqkrpb)


class NATTEN2DAVFunction:
    apply = staticmethod(natten2dav)
