"""Neighborhood attention's two products on their own, with logits or weights in memory.

The logits of a box are dense, ``[lead, keys, width]``; those in memory hold one row of slots for
each query. A table of indices leads from every slot to its dense element. Slots of hidden keys lead
to one element behind all others.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cuneigh._backends.cpu.attention import add_bias, flat_bias
from cuneigh._backends.cpu.boxes import (
    Workspace,
    fill_masked,
    for_each_box,
    masked_keys,
    read_halo,
    read_tile,
    tables,
    tile_space,
    transposed,
    view_tile,
    write_tile,
)
from cuneigh._backends.cpu.gradients import BoxGradients, Sums, bias_gradient, halo_gradients
from cuneigh._backends.cpu.rows import Array, Rows
from cuneigh._backends.cpu.tiles import Box, Tile, combined
from cuneigh._backends.cpu.tokens import Integers
from cuneigh._problem import Operands, Problem

HIDDEN = -(1 << 40)
"""What stands for a hidden key along one axis: less than any keys of the others make up for."""


class Slots:
    """The dense elements of a box that the slots of its queries stand for."""

    def __init__(self, box: Box, space: Workspace) -> None:
        tile = box.tile
        shape = *box.lead, tile.keys, tile.width
        size = math.prod(shape)
        self._flat = space("dense", size + 1)
        self.dense = self._flat[:size].reshape(shape)

        key = slot_keys(tile)
        column = np.arange(tile.width).reshape(tile.group_size, tile.queries, 1)
        element = (key * tile.width + column).reshape(tile.width, -1)
        block = np.arange(math.prod(box.lead)).reshape(*box.lead, 1, 1) * (tile.keys * tile.width)
        self._index = block + element
        hidden = np.tile(key < 0, (tile.group_size, 1))
        self._index[..., hidden] = size

    def select(self, hidden: float) -> Array:
        """``[lead, width, slots]`` of the dense elements; `hidden` in hidden slots."""
        self._flat[-1] = hidden
        return self._flat[self._index]

    def spread(self, slots: Array) -> Array:
        """Fill the dense elements from ``[lead, width, slots]``, with 0 where there is no slot."""
        self._flat[...] = 0
        self._flat[self._index] = slots
        return self.dense


def slot_keys(tile: Tile) -> Integers:
    """``[queries, slots]``: which key of the tile is in each slot; negative if it is hidden."""
    along = []
    for r, strip in enumerate(tile.strips):
        stride = math.prod(later.keys for later in tile.strips[r + 1 :])
        key = strip.slot_keys()
        along.append(np.where(key >= 0, key * stride, HIDDEN))
    keys: Integers = combined(np.add, along)
    additional = np.broadcast_to(np.arange(tile.halo, tile.keys), (tile.queries, tile.additional))
    return np.concatenate([keys, additional], 1)


@np.errstate(all="ignore")
def qk(problem: Problem, operands: Operands, logits: Array, allocate: Any) -> None:
    inputs = tables(operands)
    bias = flat_bias(problem, operands.rpb)
    logit_rows = Rows(logits)

    def compute(box: Box, space: Workspace) -> None:
        masked = masked_keys(box, inputs)
        keys = read_halo(box, inputs, "key", masked, space, vectors=False)
        tile = view_tile(box, inputs.query, space, "query")
        columns = transposed(box, tile, 1, space, "query columns")
        slots = Slots(box, space)
        dense = keys.times(columns, slots.dense)
        dense *= problem.scale  # of numbers scaled before most digits may be lost
        add_bias(box, bias, dense)
        fill_masked(masked, slots.dense, -np.inf)
        write_tile(box, logit_rows, slots.select(-np.inf))

    for_each_box(problem, compute)


@np.errstate(all="ignore")
def qk_backward(
    problem: Problem, operands: Operands, grad_logits: Array, gradients: Operands, allocate: Any
) -> None:
    inputs = tables(operands)
    grad_rows, query_gradient = Rows(grad_logits), Rows(gradients.query)

    def compute(box: Box, space: Workspace) -> BoxGradients:
        masked = masked_keys(box, inputs)
        keys = read_halo(box, inputs, "key", masked, space, vectors=True)
        query = read_tile(box, inputs.query, space, "query")
        given = read_tile(box, grad_rows, space, "grad logits")
        dense = Slots(box, space).spread(given)
        fill_masked(masked, dense, 0)
        grad_query = keys.sums(box, dense, tile_space(box, space, "grad query", problem.head_dim))
        grad_query *= problem.scale
        write_tile(box, query_gradient, grad_query)
        key, additional_keys = halo_gradients(box, dense, query, masked, space, "grad key")
        rpb = None if operands.rpb is None else bias_gradient(box, dense)
        return BoxGradients(box, key=key, additional_keys=additional_keys, rpb=rpb)

    shared = Sums(problem, gradients, allocate)
    for_each_box(problem, compute, shared.add)
    shared.store()


@np.errstate(all="ignore")
def av(problem: Problem, weights: Array, operands: Operands, output: Array, allocate: Any) -> None:
    inputs = tables(operands)
    weight_rows, out_rows = Rows(weights), Rows(output)

    def compute(box: Box, space: Workspace) -> None:
        masked = masked_keys(box, inputs)
        values = read_halo(box, inputs, "value", masked, space, vectors=True)
        dense = Slots(box, space).spread(read_tile(box, weight_rows, space, "weights"))
        fill_masked(masked, dense, 0)
        out = tile_space(box, space, "output", problem.value_dim)
        write_tile(box, out_rows, values.sums(box, dense, out))

    for_each_box(problem, compute)


@np.errstate(all="ignore")
def av_backward(
    problem: Problem,
    weights: Array,
    operands: Operands,
    grad_output: Array,
    grad_weights: Array,
    gradients: Operands,
    allocate: Any,
) -> None:
    inputs = tables(operands)
    weight_rows, grad_rows, weight_gradient = map(Rows, (weights, grad_output, grad_weights))

    def compute(box: Box, space: Workspace) -> BoxGradients:
        masked = masked_keys(box, inputs)
        values = read_halo(box, inputs, "value", masked, space, vectors=False)
        grad_out = read_tile(box, grad_rows, space, "grad output")
        slots = Slots(box, space)
        columns = transposed(box, grad_out, 1, space, "grad output columns")
        values.times(columns, slots.dense)
        fill_masked(masked, slots.dense, 0)
        write_tile(box, weight_gradient, slots.select(0))
        dense = slots.spread(read_tile(box, weight_rows, space, "weights"))
        fill_masked(masked, dense, 0)
        value, additional_values = halo_gradients(box, dense, grad_out, masked, space, "grad value")
        return BoxGradients(box, value=value, additional_values=additional_values)

    shared = Sums(problem, gradients, allocate)
    for_each_box(problem, compute, shared.add)
    shared.store()
