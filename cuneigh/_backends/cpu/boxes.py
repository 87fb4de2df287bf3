"""The arrays of a box: what its queries and its halos hold, their products, who sees whom.

`lead` stands for the leading axes ``batch, tiles_1, .., tiles_R, kv_heads`` of a box (`Box.lead`)
and `width` for the query heads of a key head times the queries of a tile. Logits are laid out
``[lead, keys, width]``, the additional keys last: for this order only the small matrix of queries
must be transposed before OpenBLAS multiplies at full speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cuneigh._backends.cpu.rows import Array, Rows
from cuneigh._backends.cpu.strips import Booleans
from cuneigh._backends.cpu.threads import in_order, thread_count
from cuneigh._backends.cpu.tiles import Box, boxes
from cuneigh._problem import Operands, Problem

Result = TypeVar("Result")

ALIGNMENT = 64
"""Bytes of a vector register. Products of unaligned matrices take up to a third longer."""

CACHED_ROWS = 32
"""Rows, often a power of two of bytes apart, that can be in the first-level cache together."""

KEPT_BYTES = 1 << 23
"""What a thread's workspace may hold to be kept for the next call. Fresh memory is slow: the system
maps and clears it page by page, which took a seventh of the time of a backward."""


class Workspace:
    """Aligned arrays by name, which are used again from box to box; they may hold anything."""

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self._memory: dict[str, Array] = {}
        self._arrays: dict[tuple[str, tuple[int, ...]], Array] = {}

    def __call__(self, name: str, *shape: int) -> Array:
        array = self._arrays.get((name, shape))
        if array is None:
            size = math.prod(shape)
            if name not in self._memory or self._memory[name].size < size:
                self._arrays.clear()
                self._memory[name] = self._aligned(size)
            array = self._arrays[name, shape] = self._memory[name][:size].reshape(shape)
        return array

    def _aligned(self, size: int) -> Array:
        array = np.empty(size + ALIGNMENT // self.dtype.itemsize, self.dtype)
        start = -array.ctypes.data % ALIGNMENT // array.itemsize
        return array[start : start + size]

    @cached_property
    def beside(self) -> Workspace:
        """Another one, for arrays of the same names."""
        return Workspace(str(self.dtype))

    def is_worth_keeping(self) -> bool:
        spaces = [self, self.beside] if "beside" in self.__dict__ else [self]
        size = sum(array.nbytes for space in spaces for array in space._memory.values())
        return size <= KEPT_BYTES and len(self._arrays) <= 256


_kept: dict[str, list[Workspace]] = {"float32": [], "float64": []}


@contextmanager
def workspace(dtype: str) -> Iterator[Workspace]:
    """A workspace for one thread."""
    try:
        space = _kept[dtype].pop()
    except IndexError:
        space = Workspace(dtype)
    yield space
    if space.is_worth_keeping() and len(_kept[dtype]) < thread_count():
        _kept[dtype].append(space)


def for_each_box(
    problem: Problem,
    compute: Callable[[Box, Workspace], Result],
    collect: Callable[[Result], None] | None = None,
) -> None:
    """``compute(box, space)`` for all boxes of `problem`, and `collect` its results in order.

    Infinities and NaN are legal in the inputs, and confined where they arise from hidden keys.
    """

    @np.errstate(all="ignore")
    def quietly(box: Box, space: Workspace) -> Result:
        return compute(box, space)

    of_problem, threads = boxes(problem)
    threads = min(thread_count(), threads)
    in_order(quietly, of_problem, threads, lambda: workspace(problem.accumulator), collect)


# What queries and halos hold


def tables(operands: Operands) -> Operands:
    """`Rows` of every operand but rpb; None for those that are absent or empty."""
    mask = operands.key_mask
    arrays = operands._replace(rpb=None, key_mask=None if mask is None else mask[..., None, None])
    present = (array is not None and array.size > 0 for array in arrays)
    return Operands(*(Rows(a) if there else None for a, there in zip(arrays, present, strict=True)))


def tile_space(box: Box, space: Workspace, name: str, dim: int) -> Array:
    """An array ``[lead, width, dim]``, in memory token by token where that can be."""
    if box.tile.group_size > 1:
        return space(name, *box.lead, box.tile.width, dim)
    *outer, heads = box.lead
    return space(name, *outer, box.tile.queries, heads, dim).swapaxes(-2, -3)


def by_token(box: Box, tile: Array) -> Array:
    """``[batch, tiles.., queries, heads, dim]``: a view of ``tile[lead, width, dim]``."""
    by_head = tile
    if box.tile.group_size > 1:
        by_head = tile.reshape(*box.lead[:-1], len(box.heads), box.tile.queries, -1)
    return by_head.swapaxes(-2, -3)


def read_tile(box: Box, rows: Rows, space: Workspace, name: str) -> Array:
    """``[lead, width, dim]``: what the queries of `box` hold."""
    out = tile_space(box, space, name, rows.dim)
    rows.read(box.query_tokens, by_token(box, out))
    return out


def view_tile(box: Box, rows: Rows, space: Workspace, name: str) -> Array:
    """``[batch, tiles.., heads, queries, dim]``: the same, without a copy where possible."""
    view = rows.view(box.query_tokens)
    if view is None or view.dtype != space.dtype:
        return read_tile(box, rows, space, name)
    return view.swapaxes(-2, -3)


def write_tile(box: Box, rows: Rows, values: Array) -> None:
    """Store ``values[lead, width, dim]`` for the queries of `box`."""
    rows.write(box.query_tokens, by_token(box, values))


def transposed(box: Box, tile: Array, factor: float, space: Workspace, name: str) -> Array:
    """``[lead, dim, width]``: `factor` times what `read_tile` or `view_tile` returned."""
    dim, queries = tile.shape[-1], box.tile.queries
    grouped = tile.reshape(*box.lead, box.tile.group_size, queries, dim)
    columns = grouped.swapaxes(-1, -2).swapaxes(-2, -3)  # [lead, dim, group_size, queries]
    out = space(name, *box.lead, dim, box.tile.width)
    target = out.reshape(columns.shape)
    for start in range(0, queries, CACHED_ROWS):
        some = slice(start, start + CACHED_ROWS)
        np.copyto(target[..., some], columns[..., some])
    return out if factor == 1 else np.multiply(out, factor, out=out)


class Halo(NamedTuple):
    """``[lead, keys, dim]``: what the keys of the halos hold, and what the additional ones do.

    Masked keys hold zeros.
    """

    tokens: Array
    additional: Array | None

    def times(self, columns: Array, out: Array) -> Array:
        """``[lead, keys, width]``: the product with `columns`, [lead, dim, width]."""
        # For an outer product np.matmul does not call the BLAS.
        product = np.multiply if columns.shape[-2] == 1 else np.matmul
        size = self.tokens.shape[-2]
        product(self.tokens, columns, out=out[..., :size, :])
        if self.additional is not None:
            product(self.additional, columns, out=out[..., size:, :])
        return out

    def sums(self, box: Box, weights: Array, out: Array) -> Array:
        """``[lead, width, dim]``: sums over keys by `weights`, which are [lead, keys, width]."""
        weights = weights.swapaxes(-1, -2)

        def seen() -> Booleans:
            return visible(box).swapaxes(-1, -2)

        confined_product(weights[..., : box.tile.halo], self.tokens, seen, out)
        if self.additional is not None:
            out += np.matmul(weights[..., box.tile.halo :], self.additional)
        return out


def read_halo(
    box: Box,
    inputs: Operands,
    side: Literal["key", "value"],
    masked: Booleans | None,
    space: Workspace,
    *,
    vectors: bool,
) -> Halo:
    """What the keys of `box` hold: their keys or their values, by the tables `inputs`.

    `vectors` says that `Halo.sums` will be called: BLAS then loads whole vectors, which want to be
    aligned, while single numbers for `Halo.times` may come from anywhere.
    """
    rows, additional = getattr(inputs, side), getattr(inputs, f"additional_{side}s")
    tokens: Any
    if box.tile.halo == 0:
        tokens = space(side, *box.lead, 0, (rows or additional).dim)
    elif masked is not None:
        tokens = copy_each_halo(box, rows, space, side)
        tokens[masked] = 0
    else:
        view = view_halo(box, rows, space)
        is_view = view is not None and (is_aligned(view) or not vectors)
        tokens = view if is_view else copy_halo(box, rows, space, side)
    if additional is None:
        return Halo(tokens, None)
    batch, *tiles, kv_heads = box.lead
    out = space(f"additional {side}", batch, 1, kv_heads, box.tile.additional, additional.dim)
    additional.read(box.additional_tokens, out.swapaxes(-2, -3))
    return Halo(tokens, out.reshape(batch, *(1 for _ in tiles), *out.shape[2:]))


def view_halo(box: Box, rows: Rows, space: Workspace) -> Array | None:
    """``[lead, keys of the halo, dim]``; None unless BLAS can read the array as it is."""
    view = rows.view(box.key_tokens)
    if view is None or view.dtype != space.dtype:
        return None
    view = view.swapaxes(-2, -3)
    rows_are_whole = view.strides[-1] == view.itemsize or rows.dim == 1
    return view if rows_are_whole and view.strides[-2] >= rows.dim * view.itemsize else None


def is_aligned(array: Array) -> bool:
    """Whether all rows of `array` are."""
    strides = zip(array.strides[:-1], array.shape, strict=False)
    addresses = array.ctypes.data, *(stride for stride, n in strides if n > 1)
    return not any(address % ALIGNMENT for address in addresses)


def copy_halo(box: Box, rows: Rows, space: Workspace, name: str) -> Array:
    """``[lead, keys of the halo, dim]``; what overlaps along the first axis is copied once."""
    batch, along, *tiles, kv_heads = box.lead
    if box.key_region is None:
        return copy_each_halo(box, rows, space, name)
    tokens, stride = box.key_region
    size = stride * (along - 1) + box.tile.halo
    region = space(name, batch, 1, *tiles, size, kv_heads, rows.dim)
    rows.read(tokens, region)
    strides = list(region.strides)
    strides[1] = stride * strides[-3]
    shape = batch, along, *tiles, box.tile.halo, kv_heads, rows.dim
    return as_strided(region, shape, strides).swapaxes(-2, -3)


def copy_each_halo(box: Box, rows: Rows, space: Workspace, name: str) -> Array:
    """``[lead, keys of the halo, dim]``, of which no two share memory."""
    *outer, kv_heads = box.lead
    out = space(name, *outer, box.tile.halo, kv_heads, rows.dim)
    return rows.read(box.key_tokens, out).swapaxes(-2, -3)


# Who sees whom


def masked_keys(box: Box, inputs: Operands) -> Booleans | None:
    """``[lead, keys of the halo]``: which keys a mask hides; None if it hides none of them."""
    rows: Rows | None = inputs.key_mask
    if rows is None or box.tile.halo == 0:
        return None
    *outer, kv_heads = box.lead
    seen = rows.read(box.key_tokens, np.empty((*outer, box.tile.halo, kv_heads, 1), bool))
    return None if seen.all() else ~seen[..., 0].swapaxes(-1, -2)


def fill_masked(masked: Booleans | None, array: Array, value: float) -> None:
    """Set the ``array[lead, keys, ..]`` of masked keys to `value`, whatever it is."""
    if masked is not None:
        array[..., : masked.shape[-1], :][masked] = value


def hide(box: Box, logits: Array) -> None:
    """Set the ``logits[lead, keys, width]`` of hidden pairs to -inf, whatever they are.

    NaN becomes inf where it is seen, which softmax makes NaN again.
    """
    grouped = logits.reshape(*logits.shape[:-1], box.tile.group_size, box.tile.queries)
    for keys, bound in box.tile.bounds:
        logits_of_keys = grouped[..., keys, :, :]
        np.fmin(logits_of_keys, bound[:, None, :], out=logits_of_keys)


def visible(box: Box) -> Booleans:
    """``[keys of the halo, width]``: who sees whom."""
    return np.tile(box.tile.visible(), (1, box.tile.group_size))


def confined_product(
    weights: Array, rows: Array, seen: Callable[[], Booleans], out: Array
) -> Array:
    """``weights @ rows``, where 0 * inf counts as 0 in terms that are not `seen`.

    Their weights are 0, so that this concerns infinities and NaN in `rows` alone.
    """
    np.matmul(weights, rows, out=out)
    if finite_rows(rows if rows.size < out.size else out).all():
        return out
    stray = ~np.isfinite(rows)
    np.matmul(weights, np.where(stray, 0, rows), out=out)
    visible = seen()
    for term in np.flatnonzero(stray.any(axis=(*range(stray.ndim - 2), -1))):
        reached = visible[:, term, None] & stray[..., None, term, :]
        product = weights[..., term, None] * rows[..., None, term, :]
        np.add(out, product, out=out, where=reached)
    return out


# Sums on BLAS are several times as fast as NumPy's own


def column_sums(array: Array) -> Array:
    """The sums over the last axis but one."""
    sums: Array = np.ones(array.shape[-2], array.dtype) @ array
    return sums


def finite_rows(array: Array) -> Booleans:
    """Whether the sum over the last axis is finite."""
    finite: Booleans = np.isfinite(array @ np.ones(array.shape[-1], array.dtype))
    return finite
