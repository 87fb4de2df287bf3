"""Neighborhood attention of one layout over many GPUs, or CPU processes.

`na1d`, `na2d` and `na3d` of this module take each rank's shard of query, key and value, and return
its shard of the output. Queries stay where they are. Of the keys and values of other ranks, those
that a rank's queries see come by one all-to-all, with one message for each pair of ranks, beside
the attention of the queries that need none of them; where windows don't cross a border of shards
nothing is sent. Gradients go the way back.

    sharding = Sharding(mesh, ("rows", None))
    output = na2d(query, key, value, 7, sharding=sharding)

Tensors of type ``DTensor`` say themselves how they are sharded, over the batch and heads as well,
and need no `Sharding`.
"""

from __future__ import annotations

from typing import Any

import torch

import cuneigh
from cuneigh._backends import BackendName
from cuneigh._ops.types import Borders, Flags, Sizes
from cuneigh.torch.distributed._call import attend
from cuneigh.torch.distributed._dtensor import has_dtensor, unwrapped, wrapped
from cuneigh.torch.distributed._sharding import Sharding

__all__ = ["Sharding", "na1d", "na2d", "na3d"]


def na1d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    rpb: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    key_mask: torch.Tensor | None = None,
    sharding: Sharding | None = None,
) -> Any:
    """`cuneigh.na1d` of a layout in shards: see `na2d`."""
    window = kernel_size, stride, dilation, is_causal
    arrays = query, key, value, additional_keys, additional_values, rpb, key_mask
    return _call((1, *window, scale, return_lse, backend, border), arrays, sharding)


def na2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    rpb: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    key_mask: torch.Tensor | None = None,
    sharding: Sharding | None = None,
) -> Any:
    """`cuneigh.na2d` of a layout in shards: each rank gives its own, and gets its own.

    All ranks of the mesh make the call together, and its backward pass, if there is one.

    Parameters
    ----------
    query, key, value, key_mask
        As in `cuneigh.na2d`: the shards of this rank, all of the same tokens. Either plain tensors,
        with a `sharding`, or all of type ``DTensor``.
    additional_keys, additional_values, rpb
        As in `cuneigh.na2d`, the same on all ranks. The gradients of plain tensors are those of
        the rank's own queries; their sum over the ranks is the gradient, as for all parameters that
        the tokens of a layout share.
    kernel_size, stride, dilation, is_causal, return_lse, backend, border
        As in `cuneigh.na2d`; windows are those of the whole layout.
    scale : float, optional
        Factor of the logits; ``D ** -0.5`` if not given.
    sharding : Sharding
        How the layout is cut, for plain tensors.

    Returns
    -------
    output, lse
        As from `cuneigh.na2d`, for the rank's own queries; ``DTensor`` with the placements of the
        query if that is one.

    Raises
    ------
    TypeError, ValueError
        As `cuneigh.na2d` does; for tensors that don't fit the sharding; and, on all ranks alike, if
        they differ in what they call, which they compare the first time.
    RuntimeError
        On all ranks, if one of them failed or did not come within the timeout of the process group;
        the message names it.

    Notes
    -----
    Derivatives are of first order and in reverse mode.

    With DTensor, a dimension of the query may be sharded if it is the batch, tokens or heads. Keys
    and values are sharded alike or replicated; additional keys, rpb and the mask may be replicated.
    Replicated arguments get gradients with ``Partial`` placements. Nothing is gathered: other
    placements are a ValueError that says which would do.
    """
    window = kernel_size, stride, dilation, is_causal
    arrays = query, key, value, additional_keys, additional_values, rpb, key_mask
    return _call((2, *window, scale, return_lse, backend, border), arrays, sharding)


def na3d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    rpb: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    key_mask: torch.Tensor | None = None,
    sharding: Sharding | None = None,
) -> Any:
    """`cuneigh.na3d` of a layout in shards: see `na2d`."""
    window = kernel_size, stride, dilation, is_causal
    arrays = query, key, value, additional_keys, additional_values, rpb, key_mask
    return _call((3, *window, scale, return_lse, backend, border), arrays, sharding)


_WHOLE: Any = {1: cuneigh.na1d, 2: cuneigh.na2d, 3: cuneigh.na3d}


def _call(parameters: tuple[Any, ...], arrays: tuple[Any, ...], sharding: Sharding | None) -> Any:
    rank = parameters[0]
    call = f"na{rank}d"
    if not has_dtensor(arrays):
        if not isinstance(sharding, Sharding):
            raise TypeError(
                f"{call}: sharding={sharding!r} is {type(sharding).__name__}; for tensors that are "
                f"not DTensor a cuneigh.torch.distributed.Sharding is needed"
            )
        return _results(*attend(parameters, sharding.text, *arrays))
    if sharding is not None:
        raise ValueError(f"{call}: sharding was given, but DTensor arguments say it themselves")
    recipe, local = unwrapped(call, rank, arrays)
    query, value = arrays[0], arrays[2]
    if recipe.sharding:
        output, lse = attend(parameters, recipe.sharding, *local)
    else:
        _, *window, scale, return_lse, backend, border = parameters
        made = _WHOLE[rank](
            *local[:3],
            *window,
            scale,
            *local[3:6],
            return_lse,
            backend,
            border=border,
            layout=tuple(query.shape[1 : 1 + rank]),
            query_start=recipe.query_start,
            key_mask=local[6],
        )
        output, lse = made if return_lse else (made, None)
    shape = tuple(query.shape[:-1])
    return _results(
        wrapped(output, query, (*shape, value.shape[-1])),
        None if lse is None else wrapped(lse, query, shape),
    )


def _results(output: torch.Tensor, lse: torch.Tensor | None) -> Any:
    return output if lse is None else (output, lse)
