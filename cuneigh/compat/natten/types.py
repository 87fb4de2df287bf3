"""The types of ``natten.types`` that annotate what clients write."""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

import torch

NoneType = type(None)

Dimension1DType: TypeAlias = tuple[int]
Dimension2DType: TypeAlias = tuple[int, int]
Dimension3DType: TypeAlias = tuple[int, int, int]
DimensionType: TypeAlias = Dimension1DType | Dimension2DType | Dimension3DType
Dimension1DTypeOrDed: TypeAlias = int | Dimension1DType
Dimension2DTypeOrDed: TypeAlias = int | Dimension2DType
Dimension3DTypeOrDed: TypeAlias = int | Dimension3DType
DimensionTypeOrDed: TypeAlias = int | DimensionType

CausalArg1DType: TypeAlias = tuple[bool]
CausalArg2DType: TypeAlias = tuple[bool, bool]
CausalArg3DType: TypeAlias = tuple[bool, bool, bool]
CausalArgType: TypeAlias = CausalArg1DType | CausalArg2DType | CausalArg3DType
CausalArg1DTypeOrDed: TypeAlias = bool | CausalArg1DType
CausalArg2DTypeOrDed: TypeAlias = bool | CausalArg2DType
CausalArg3DTypeOrDed: TypeAlias = bool | CausalArg3DType
CausalArgTypeOrDed: TypeAlias = bool | CausalArgType

ListOrNestedTensor: TypeAlias = list | torch.Tensor  # type: ignore[type-arg]


class KernelSchedule(Enum):
    """Schedules of NATTEN's kernels for Hopper, which say nothing to cuneigh's."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


def create_dim_from_int(na_dim: int, value: int) -> tuple[int, ...]:
    """`value` for each of `na_dim` axes."""
    return (value,) * na_dim


def create_causal_arg_from_bool(na_dim: int, value: bool) -> tuple[bool, ...]:
    """`value` for each of `na_dim` axes."""
    return (value,) * na_dim
