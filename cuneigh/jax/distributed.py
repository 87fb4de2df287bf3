"""Neighborhood attention of one layout whose token axes are cut over the devices of a mesh.

`na1d`, `na2d` and `na3d` of this module are called within ``jax.shard_map``, with the shards of one
device, as functions of `cuneigh` are, and `axis_names` says along which axes of the mesh the token
axes are cut:

    call = functools.partial(na2d, kernel_size=7, axis_names=("rows", None))
    spec = jax.P(None, "rows")
    output = jax.shard_map(call, in_specs=(spec,) * 3, out_specs=spec)(query, key, value)

Queries stay where they are. Every device gets the keys and values that its queries see from its
neighbors, by ``jax.lax.ppermute``, and from the next ones where these have too few; where windows
don't cross a border of shards, nothing is sent. Batch and heads may be cut as well, by the specs
alone. ``jax.jit``, ``jax.grad`` and ``jax.vmap`` pass through.

All devices run one program with one call, whose starts of parts of the layout are numbers that
each device computes of its place in the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cuneigh._backends import BackendName
from cuneigh._ops import neighborhood
from cuneigh._ops.types import Borders, Flags, Scale, Sizes
from cuneigh._parameters import neighborhood_axes, part_arguments, window_arguments
from cuneigh._shards.axis import Shards

__all__ = ["na1d", "na2d", "na3d"]


def na1d(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale | None = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    rpb: Any = None,
    return_lse: bool = False,
    backend: BackendName | None = None,
    *,
    axis_names: Sequence[str | None],
    border: Borders = "shift",
    key_mask: Any = None,
) -> Any:
    """`cuneigh.na1d` of a layout that is cut over devices: see `na2d`."""
    window = kernel_size, stride, dilation, is_causal
    given = scale, additional_keys, additional_values, rpb, return_lse, backend
    return _call(1, query, key, value, window, given, axis_names, border, key_mask)


def na2d(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale | None = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    rpb: Any = None,
    return_lse: bool = False,
    backend: BackendName | None = None,
    *,
    axis_names: Sequence[str | None],
    border: Borders = "shift",
    key_mask: Any = None,
) -> Any:
    """`cuneigh.na2d` of a layout that is cut over devices, called within ``jax.shard_map``.

    Parameters
    ----------
    query, key, value, key_mask
        As in `cuneigh.na2d`: the shards of one device, which have equal sizes on all.
    additional_keys, additional_values, rpb
        As in `cuneigh.na2d`; the same for all shards of a layout.
    kernel_size, stride, dilation, is_causal, scale, return_lse, backend, border
        As in `cuneigh.na2d`; windows are those of the whole layout.
    axis_names : sequence of str or None
        For each token axis the axis of the mesh along which it is cut; None where it is whole.

    Returns
    -------
    output, lse
        As from `cuneigh.na2d`, for the shard of queries.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `cuneigh.na2d` does; ValueError for `axis_names` with another number of entries than
        there are token axes, NameError for one that is not an axis of the mesh.
    """
    window = kernel_size, stride, dilation, is_causal
    given = scale, additional_keys, additional_values, rpb, return_lse, backend
    return _call(2, query, key, value, window, given, axis_names, border, key_mask)


def na3d(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale | None = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    rpb: Any = None,
    return_lse: bool = False,
    backend: BackendName | None = None,
    *,
    axis_names: Sequence[str | None],
    border: Borders = "shift",
    key_mask: Any = None,
) -> Any:
    """`cuneigh.na3d` of a layout that is cut over devices: see `na2d`."""
    window = kernel_size, stride, dilation, is_causal
    given = scale, additional_keys, additional_values, rpb, return_lse, backend
    return _call(3, query, key, value, window, given, axis_names, border, key_mask)


_WHOLE: Any = {1: neighborhood.na1d, 2: neighborhood.na2d, 3: neighborhood.na3d}


def _call(
    rank: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: tuple[Any, ...],
    given: tuple[Any, ...],
    axis_names: Sequence[str | None],
    border: Borders,
    key_mask: Any,
) -> Any:
    name = f"na{rank}d"
    if isinstance(axis_names, str) or len(axis_names) != rank:
        raise ValueError(
            f"{name}: axis_names={axis_names!r} has no entry for each of the {rank} token axes"
        )
    for argument, array in (("key", key), ("value", value), ("key_mask", key_mask)):
        _check_tokens(name, rank, query, argument, array)
    counts = [1 if axis is None else lax.axis_size(axis) for axis in axis_names]
    layout = [count * n for count, n in zip(counts, query.shape[1 : 1 + rank], strict=False)]
    part = part_arguments(name, rank, border, layout, 0, 0)
    axes = neighborhood_axes(name, layout, window_arguments(name, rank, *window), part=part)
    halos = [
        Halo(Shards(axis, (axis.layout // count,) * count), axis_name)
        for axis, count, axis_name in zip(axes, counts, axis_names, strict=True)
    ]
    for number, halo in enumerate(halos):
        key, value, key_mask = (
            None if array is None else halo.around(array, 1 + number)
            for array in (key, value, key_mask)
        )
    return _WHOLE[rank](
        query,
        key,
        value,
        *window,
        *given,
        border=border,
        layout=layout,
        query_start=tuple(halo.query_start for halo in halos),
        key_start=tuple(halo.key_start for halo in halos),
        key_mask=key_mask,
    )


def _check_tokens(call: str, rank: int, query: jax.Array, name: str, array: Any) -> None:
    """Raise unless an array has the tokens of the query, as on every device."""
    shape, needed = getattr(array, "shape", query.shape), query.shape
    for axis in range(1, 1 + rank):
        if len(shape) > axis < len(needed) and shape[axis] != needed[axis]:
            raise ValueError(
                f"{call}: {name} has size {shape[axis]} on axis {axis}, but query has "
                f"{needed[axis]}: both are shards of one device"
            )


@dataclass(frozen=True)
class Halo:
    """The keys along one token axis that devices get from others: as many on all of them."""

    shards: Shards
    axis_name: str | None

    @property
    def size(self) -> int:
        """Tokens of a shard."""
        return self.shards.sizes[0]

    @property
    def _numbers(self) -> range:
        return range(len(self.shards.sizes))

    @cached_property
    def _reach(self) -> tuple[int, int]:
        """The most keys before and after a shard that its queries see."""
        pairs = [(self.shards.own(shard), self.shards.seen(shard)) for shard in self._numbers]
        before = max(own.start - seen.start for own, seen in pairs)
        return before, max(seen.stop - own.stop for own, seen in pairs)

    @cached_property
    def length(self) -> int:
        """Keys that every device gets, its own among them."""
        if self.shards.is_ring:
            return min(sum(self._reach) + self.size, self.shards.layout)
        return max(self.shards.seen(shard).length for shard in self._numbers)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first key that each device gets."""
        owns = [self.shards.own(shard) for shard in self._numbers]
        if self.shards.is_ring:
            before = 0 if self.length == self.shards.layout else self._reach[0]
            return tuple(own.start - before for own in owns)
        last = self.shards.layout - self.length
        return tuple(min(self.shards.seen(shard).start, last) for shard in self._numbers)

    def around(self, array: jax.Array, axis: int) -> jax.Array:
        """`array` with the keys of other devices along a token axis."""
        if self.length == self.size or self.axis_name is None:
            return array
        owns = [self.shards.own(shard).start for shard in self._numbers]
        offsets = [start - own for start, own in zip(self.starts, owns, strict=True)]
        before, after = -min(offsets), max(offsets) + self.length - self.size
        parts = [*self._from(array, axis, before, -1)[::-1], array]
        parts += self._from(array, axis, after, 1)
        wide = jnp.concatenate(parts, axis)
        if len(set(offsets)) == 1:
            return wide
        start = self._of_device([offset + before for offset in offsets])
        return lax.dynamic_slice_in_dim(wide, start, self.length, axis)

    def _from(self, array: jax.Array, axis: int, count: int, side: int) -> list[jax.Array]:
        """What the devices on one side have of the next `count` keys, the nearest one first.

        Those off the layout are zeros, which `around` cuts away.
        """
        ranks, parts = len(self.shards.sizes), []
        for hop in range(1, math.ceil(count / self.size) + 1):
            length = min(self.size, count - (hop - 1) * self.size)
            first = self.size - length if side < 0 else 0
            edge = lax.slice_in_dim(array, first, first + length, axis=axis)
            pairs = [(shard, shard - side * hop) for shard in range(ranks)]
            if self.shards.is_ring:
                pairs = [(one, other % ranks) for one, other in pairs]
            pairs = [(one, other) for one, other in pairs if 0 <= other < ranks]
            parts.append(lax.ppermute(edge, self.axis_name, pairs))
        return parts

    @property
    def query_start(self) -> Any:
        """The first query of this device."""
        return self._of_device([self.shards.own(shard).start for shard in self._numbers])

    @property
    def key_start(self) -> Any:
        """The first key that this device gets."""
        return self._of_device(self.starts)

    def _of_device(self, numbers: Sequence[int]) -> Any:
        """The one of `numbers` that is this device's: there is one for each along the axis."""
        if len(set(numbers)) == 1:
            return numbers[0]
        return jnp.asarray(numbers, jnp.int32)[lax.axis_index(self.axis_name)]
