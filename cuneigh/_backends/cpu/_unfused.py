"""Neighborhood attention's two products on their own, with logits or weights in memory.

The logits of a box are dense, ``[lead, keys, width]``; those in memory hold one row of slots a
query. A table of indices leads from every slot to its dense element, from slots that hide their key
to one element behind them all.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from cuneigh._backends.cpu._fused import fill_logits, flat_bias
from cuneigh._backends.cpu._gradients import Parts, Sums, bias_part, halo_parts
from cuneigh._backends.cpu._products import (
    Workspace,
    drop_repeated_queries,
    for_each_box,
    read_halo,
    read_tile,
    tables,
    transposed,
    view_tile,
    write_tile,
)
from cuneigh._backends.cpu._rows import Array, Rows
from cuneigh._backends.cpu._tiles import Box, Integers, mesh
from cuneigh._problem import Operands, Problem


class Slots:
    """The dense elements of a box that the slots of its queries stand for."""

    def __init__(self, box: Box, space: Workspace) -> None:
        self._shape = *box.lead, box.keys, box.width
        size = int(np.prod(self._shape))
        self._flat = space("dense", size + 1)
        self.dense = self._flat[:size].reshape(self._shape)

        rows = slot_rows(box)[..., None, None, :, :]  # [tiles.., 1, 1, queries, slots]
        column = np.arange(box.width).reshape(box.group_size, box.queries, 1)
        block = np.arange(size // (box.keys * box.width)).reshape(*box.lead, 1, 1, 1)
        index = block * (box.keys * box.width) + (rows * box.width + column)
        index[np.broadcast_to(rows < 0, index.shape)] = size
        self._index = index.reshape(*box.lead, box.width, -1)

    def select(self, hidden: float) -> Array:
        """``[lead, width, slots]`` of the dense elements; `hidden` in hidden slots."""
        self._flat[-1] = hidden
        return self._flat[self._index]

    def spread(self, slots: Array) -> Array:
        """Fill the dense elements from ``[lead, width, slots]``, with 0 where there is no slot."""
        self._flat[...] = 0
        self._flat[self._index] = slots
        return self.dense


def slot_rows(box: Box) -> Integers:
    """``[tiles.., queries, slots]``: the key among the box's keys in every slot; < 0 if hidden."""
    parts: list[Integers] = []
    step = 1
    for strip in reversed(box.strips):
        start, end = (bound[..., None] for bound in strip.windows())
        row = start + np.arange(strip.axis.kernel_size)
        parts.insert(0, np.where(row < end, row * step, -box.halo))
        step *= strip.keys
    rows: Integers = mesh(operator.add, parts)
    additional = np.arange(box.halo, box.keys)
    return np.concatenate(
        [rows, np.broadcast_to(additional, (*rows.shape[:-1], len(additional)))], -1
    )


@np.errstate(all="ignore")
def qk(problem: Problem, operands: Operands, logits: Array, allocate: Any) -> None:
    inputs = tables(operands)
    bias = flat_bias(problem, operands.rpb)
    logit_rows = Rows(logits)

    def compute(box: Box, space: Workspace) -> None:
        keys = read_halo(box, inputs.key, inputs.additional_keys, space, "key", vectors=False)
        tile = view_tile(box, inputs.query, space, "query")
        columns = transposed(box, tile, problem.scale, space, "query columns")
        slots = Slots(box, space)
        fill_logits(box, keys, columns, bias, slots.dense)
        write_tile(box, logit_rows, slots.select(-np.inf))

    for_each_box(problem, allocate, compute)


@np.errstate(all="ignore")
def qk_backward(
    problem: Problem, operands: Operands, grad_logits: Array, gradients: Operands, allocate: Any
) -> None:
    inputs = tables(operands)
    grad_rows, query_gradient = Rows(grad_logits), Rows(gradients.query)

    def compute(box: Box, space: Workspace) -> Parts:
        keys = read_halo(box, inputs.key, inputs.additional_keys, space, "key", vectors=True)
        query = read_tile(box, inputs.query, space, "query")
        given = read_tile(box, grad_rows, space, "grad logits")
        drop_repeated_queries(box, given)
        slopes = Slots(box, space).spread(given)
        grad_query = keys.sums(box, slopes, space("grad query", *query.shape))
        grad_query *= problem.scale
        write_tile(box, query_gradient, grad_query)
        query *= problem.scale
        key, additional_keys = halo_parts(box, slopes, query, space, "grad key")
        rpb = None if operands.rpb is None else bias_part(box, slopes)
        return Parts(box, key=key, additional_keys=additional_keys, rpb=rpb)

    shared = Sums(problem, gradients, allocate)
    for_each_box(problem, allocate, compute, shared.add)
    shared.store()


@np.errstate(all="ignore")
def av(problem: Problem, weights: Array, operands: Operands, output: Array, allocate: Any) -> None:
    inputs = tables(operands)
    weight_rows, out_rows = Rows(weights), Rows(output)

    def compute(box: Box, space: Workspace) -> None:
        values = read_halo(
            box, inputs.value, inputs.additional_values, space, "value", vectors=True
        )
        dense = Slots(box, space).spread(read_tile(box, weight_rows, space, "weights"))
        out = space("output", *box.lead, box.width, problem.value_dim)
        write_tile(box, out_rows, values.sums(box, dense, out))

    for_each_box(problem, allocate, compute)


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

    def compute(box: Box, space: Workspace) -> Parts:
        values = read_halo(
            box, inputs.value, inputs.additional_values, space, "value", vectors=False
        )
        grad_out = read_tile(box, grad_rows, space, "grad output")
        drop_repeated_queries(box, grad_out)
        slots = Slots(box, space)
        columns = transposed(box, grad_out, 1, space, "grad output columns")
        values.times(columns, slots.dense)
        write_tile(box, weight_gradient, slots.select(0))
        dense = slots.spread(read_tile(box, weight_rows, space, "weights"))
        value, additional_values = halo_parts(box, dense, grad_out, space, "grad value")
        return Parts(box, value=value, additional_values=additional_values)

    shared = Sums(problem, gradients, allocate)
    for_each_box(problem, allocate, compute, shared.add)
    shared.store()
