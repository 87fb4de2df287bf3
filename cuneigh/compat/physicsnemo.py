"""Neighborhood attention of physicsnemo's ``ShardTensor``, for physicsnemo 2.2.

    import cuneigh.compat.physicsnemo
    cuneigh.compat.physicsnemo.install()

After that ``na1d``, ``na2d`` and ``na3d`` of ``physicsnemo.nn.functional.natten`` compute on
``ShardTensor`` by `cuneigh.torch.distributed`, with the arguments of NATTEN 0.21: windows may be
even, and differ between axes, dilated, strided and causal, shards may be of any sizes, also empty,
and ``return_lse`` gives the lse as well. Queries are not exchanged. Tensors of other types go where
they went before; `cuneigh.compat.natten.install` is for those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cuneigh.compat.natten._generations import v0_21
from cuneigh.torch import distributed

_SHARDED = {1: distributed.na1d, 2: distributed.na2d, 3: distributed.na3d}


def install() -> None:
    """Have physicsnemo compute neighborhood attention of ``ShardTensor`` by cuneigh.

    It registers physicsnemo's own operations first, for the last handler wins: their
    ``register_custom_ops``, which physicsnemo calls by itself only where there is a GPU.

    Raises
    ------
    ImportError
        If physicsnemo cannot be imported, or has no ``ShardTensor``.
    """
    try:
        from physicsnemo.domain_parallel import ShardTensor, register_custom_ops
        from physicsnemo.nn.functional import natten
    except ImportError as error:
        raise ImportError(
            "cuneigh.compat.physicsnemo.install(): physicsnemo 2.2 is needed, the package "
            f"nvidia-physicsnemo: {error}"
        ) from error
    register_custom_ops()
    for rank in _SHARDED:
        function = getattr(natten, f"na{rank}d")
        ShardTensor.register_function_handler(function, _handler(rank))


def _handler(rank: int) -> Callable[..., Any]:
    attend = v0_21.neighborhood(rank, _SHARDED)

    def handle(
        function: Any, types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
    ) -> Any:
        return attend(*args, **(kwargs or {}))

    return handle
