"""Gradients of what many boxes share: keys, values, additional ones and rpb.

A box computes what its queries add to each. `Sums` adds that up in the order of the boxes, so that
the sums do not depend on the threads that computed them.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cuneigh._backends.cpu.boxes import Workspace, confined_product, fill_masked, visible
from cuneigh._backends.cpu.rows import Array
from cuneigh._backends.cpu.strips import Booleans
from cuneigh._backends.cpu.tiles import Box
from cuneigh._problem import Operands, Problem


class BoxGradients(NamedTuple):
    """What one box adds to the gradients; None where it adds nothing."""

    box: Box
    key: Array | None = None
    """``[batch, tiles.., keys of the halo, kv_heads, dim]``, like `value`."""
    value: Array | None = None
    additional_keys: Array | None = None
    """``[batch, additional keys, kv_heads, dim]``, like `additional_values`."""
    additional_values: Array | None = None
    rpb: Array | None = None
    """``[heads, offsets]``"""


def halo_gradients(
    box: Box,
    weights: Array,
    rows: Array,
    masked: Booleans | None,
    space: Workspace,
    name: str,
) -> tuple[Array, Array | None]:
    """``weights @ rows`` for the keys of the halos, and for the additional ones.

    `weights` are ``[lead, keys, width]`` and `rows`, the vectors of the queries, are
    ``[lead, width, dim]``. The results are laid out as in `BoxGradients`.
    """
    *outer, kv_heads = box.lead
    halos = space(name, *outer, box.tile.halo, kv_heads, rows.shape[-1])
    out = halos.swapaxes(-2, -3)
    confined_product(weights[..., : box.tile.halo, :], rows, lambda: visible(box), out)
    fill_masked(masked, out, 0)
    if not box.tile.additional:
        return halos, None
    tiles = tuple(range(1, 1 + len(box.tile.strips)))
    return halos, np.matmul(weights[..., box.tile.halo :, :], rows).sum(tiles).swapaxes(1, 2)


def bias_gradient(box: Box, grad_logits: Array) -> Array:
    """``[heads, offsets]`` from the gradients of the logits, ``[lead, keys, width]``."""
    tile = box.tile
    summed = grad_logits[..., : tile.halo, :].sum(tuple(range(len(box.lead) - 1)))
    grouped = summed.reshape(len(box.kv_heads), tile.halo, tile.group_size, tile.queries)
    by_head = grouped.swapaxes(1, 2).reshape(len(box.heads), tile.halo * tile.queries)
    offsets, count = (
        tile.bias_index.ravel(),
        math.prod(2 * strip.axis.kernel_size - 1 for strip in tile.strips),
    )
    return np.array([np.bincount(offsets, head, count) for head in by_head])


class Sums:
    """The gradients that boxes share, to which every box adds.

    Those of keys lack the factor `scale` until they are stored. It may be so small that products
    with it are subnormal numbers, of which sums would have lost most digits.
    """

    def __init__(self, problem: Problem, gradients: Operands, allocate: Any) -> None:
        self._gradients = gradients._replace(query=None)
        self._scale = problem.scale
        self._sums = Operands(
            *(
                None if gradient is None else self._zeros(gradient, problem, allocate)
                for gradient in self._gradients
            )
        )

    @staticmethod
    def _zeros(gradient: Array, problem: Problem, allocate: Any) -> Array:
        """Zeros to add to: the gradient itself, unless its dtype is too narrow."""
        if gradient.dtype != problem.accumulator:
            gradient = allocate(gradient.shape, problem.accumulator)
        gradient[...] = 0
        return gradient

    @property
    def totals(self) -> Operands:
        """What is added to, in the dtype of the accumulator; None where nothing is."""
        return self._sums

    @np.errstate(all="ignore")
    def add(self, of_box: BoxGradients) -> None:
        box = of_box.box
        batch = slice(box.batch.start, box.batch.stop)
        kv_heads = slice(box.kv_heads.start, box.kv_heads.stop)
        heads = slice(box.heads.start, box.heads.stop)
        if of_box.key is not None:
            add_halos(box, self._sums.key[batch, ..., kv_heads, :], of_box.key)
        if of_box.value is not None:
            add_halos(box, self._sums.value[batch, ..., kv_heads, :], of_box.value)
        if of_box.additional_keys is not None:
            self._sums.additional_keys[batch, :, kv_heads] += of_box.additional_keys
        if of_box.additional_values is not None:
            self._sums.additional_values[batch, :, kv_heads] += of_box.additional_values
        if of_box.rpb is not None:
            self._sums.rpb[heads] += of_box.rpb.reshape(self._sums.rpb[heads].shape)

    def store(self) -> None:
        """Bring the sums to where they belong."""
        for total in (self._sums.key, self._sums.additional_keys):
            if total is not None and self._scale != 1:
                total *= self._scale
        for gradient, total in zip(self._gradients, self._sums, strict=True):
            if gradient is not None and gradient is not total:
                gradient[...] = total


def add_halos(box: Box, total: Array, halos: Array) -> None:
    """Add what is laid out as in `BoxGradients` to ``total[batch, tokens.., kv_heads, dim]``."""
    batch, *tiles, kv_heads = box.lead
    sizes = [strip.keys for strip in box.tile.strips]
    halos = halos.reshape(batch, *tiles, *sizes, kv_heads, halos.shape[-1])
    if box.keys_are_disjoint:
        strides = [
            [
                cast(int, step) * stride
                for step, stride in zip(steps, total.strides[1:], strict=False)
            ]
            for steps in (box.key_tokens.across, box.key_tokens.along)
        ]
        first_keys = (slice(int(first[0]), None) for first in box.first_key)
        keys = as_strided(
            total[:, *first_keys],
            halos.shape,
            (total.strides[0], *itertools.chain(*strides), *total.strides[-2:]),
        )
        keys += halos
        return
    for runs in itertools.product(*(strip.runs for strip in box.tile.strips)):
        slices = [
            [slice(first, first + (run.stop - run.start) * d, d) for first in begins.tolist()]
            for along, strip, run in zip(box.first_key, box.tile.strips, runs, strict=True)
            for d, begins in [(strip.axis.dilation, along + strip.offsets[run][:1].sum())]
        ]
        for tile, tokens in zip(np.ndindex(*tiles), itertools.product(*slices), strict=True):
            keys = total[slice(None), *tokens]
            keys += halos[(slice(None), *tile, *runs)]
