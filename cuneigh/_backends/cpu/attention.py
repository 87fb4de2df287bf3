"""Neighborhood attention and its backward, box by box.

Softmax needs no maximum as long as exponentials and sums stay in the range of the dtype, which the
sums tell. A box in which they do not is computed again, with the maximum subtracted from each row
that needs that; boxes after it subtract it at once, as long as some row does. Whether a row needs
it depends on what that row sees and on nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuneigh._backends.cpu.boxes import (
    Halo,
    Workspace,
    column_sums,
    fill_masked,
    finite_rows,
    for_each_box,
    hide,
    masked_keys,
    read_halo,
    read_tile,
    tables,
    tile_space,
    transposed,
    view_tile,
    visible,
    write_tile,
)
from cuneigh._backends.cpu.gradients import BoxGradients, Sums, bias_gradient, halo_gradients
from cuneigh._backends.cpu.rows import Array, Rows
from cuneigh._backends.cpu.tiles import Box
from cuneigh._problem import Operands, Problem

LOWEST_SUM, HIGHEST_SUM = 1e-10, 1e20
"""A row whose sum of exponentials is between these needs no maximum."""

HIGHEST_MAX = 47.0
"""Magnitude of a row's maximum above which it is subtracted. A row whose sum is between the bounds
has a smaller one, unless it has 1e10 keys, so that it gets the same bits whether or not its box is
computed again."""


@np.errstate(all="ignore")
def forward(
    problem: Problem, operands: Operands, output: Array, lse: Array | None, allocate: Any
) -> None:
    inputs = tables(operands)
    bias = flat_bias(problem, operands.rpb)
    out_rows, lse_rows = Rows(output), None if lse is None else Rows(lse[..., None])
    careful = False  # whether boxes, of late, have needed the maximum

    def compute(box: Box, space: Workspace) -> None:
        masked = masked_keys(box, inputs)
        keys = read_halo(box, inputs, "key", masked, space, vectors=False)
        values = read_halo(box, inputs, "value", masked, space, vectors=True)
        tile = view_tile(box, inputs.query, space, "query")
        columns = transposed(box, tile, problem.scale, space, "query columns")
        weights = space("weights", *box.lead, box.tile.keys, box.tile.width)

        in_place = out_rows.view(box.query_tokens)
        if in_place is None or in_place.dtype != space.dtype or problem.group_size > 1:
            in_place = None
        if in_place is None:
            out = tile_space(box, space, "output", problem.value_dim)
        else:
            out = in_place.swapaxes(-2, -3)

        def fill() -> None:
            fill_logits(box, keys, columns, bias, weights)
            hide(box, weights)
            fill_masked(masked, weights, -np.inf)

        def attend() -> tuple[Array, Array]:
            np.exp(weights, out=weights)
            return column_sums(weights), values.sums(box, weights, out)

        nonlocal careful  # which other threads change meanwhile
        in_range = not careful
        subtracted: Array | int = 0
        fill()
        if in_range:
            row_sum, sums = attend()
            in_range = bool(row_sum.min() >= LOWEST_SUM and row_sum.max() <= HIGHEST_SUM)
            in_range = in_range and bool(finite_rows(sums).all())
            if not in_range:
                fill()
        if not in_range:
            row_max = weights.max(-2, initial=-np.inf)
            row_max[row_max == -np.inf] = 0
            subtracted = np.where(np.abs(row_max) > HIGHEST_MAX, row_max, 0)
            careful = bool(subtracted.any())
            weights -= subtracted[..., None, :]
            row_sum, sums = attend()
            stray = ~finite_rows(sums) & (subtracted == 0)
            if stray.any():
                fill()
                subtracted = np.where(stray, row_max, subtracted)
                weights -= subtracted[..., None, :]
                row_sum, sums = attend()
        sums *= (1 / np.where(row_sum == 0, 1, row_sum))[..., None]
        if in_place is None:
            write_tile(box, out_rows, sums)
        if lse_rows is not None:
            write_tile(box, lse_rows, (np.log(row_sum) + subtracted)[..., None])

    for_each_box(problem, compute)


@np.errstate(all="ignore")
def backward(
    problem: Problem,
    operands: Operands,
    grad_output: Array,
    output: Array,
    lse: Array,
    grad_lse: Array | None,
    gradients: Operands,
    allocate: Any,
) -> None:
    inputs = tables(operands)
    bias = flat_bias(problem, operands.rpb)
    out_rows, grad_rows, query_gradient = Rows(output), Rows(grad_output), Rows(gradients.query)
    lse_rows = Rows(lse[..., None])
    grad_lse_rows = None if grad_lse is None else Rows(grad_lse[..., None])

    def compute(box: Box, space: Workspace) -> BoxGradients:
        masked = masked_keys(box, inputs)
        keys = read_halo(box, inputs, "key", masked, space, vectors=True)
        values = read_halo(box, inputs, "value", masked, space, vectors=False)
        query = read_tile(box, inputs.query, space, "query")
        grad_out = read_tile(box, grad_rows, space, "grad output")
        delta = row_sums(grad_out, read_tile(box, out_rows, space, "output"))
        if grad_lse_rows is not None:
            delta -= read_tile(box, grad_lse_rows, space, "grad lse")[..., 0]

        columns = transposed(box, query, problem.scale, space, "query columns")
        weights = space("weights", *box.lead, box.tile.keys, box.tile.width)
        row_lse = read_tile(box, lse_rows, space, "lse")[..., 0]
        row_lse[row_lse == -np.inf] = 0
        fill_logits(box, keys, columns, bias, weights)
        weights -= row_lse[..., None, :]
        hide(box, weights)
        fill_masked(masked, weights, -np.inf)
        np.exp(weights, out=weights)
        value, additional_values = halo_gradients(
            box, weights, grad_out, masked, space, "grad value"
        )

        columns = transposed(box, grad_out, 1, space, "grad output columns")
        grad_logits = values.times(columns, space("grad logits", *weights.shape))
        grad_logits -= delta[..., None, :]
        grad_logits *= weights
        if not np.isfinite(column_sums(grad_logits)).all():
            np.copyto(grad_logits[..., : box.tile.halo, :], 0, where=~visible(box))  # not 0 * inf
            fill_masked(masked, grad_logits, 0)
        grad_query = tile_space(box, space, "grad query", problem.head_dim)
        keys.sums(box, grad_logits, grad_query)
        grad_query *= problem.scale
        write_tile(box, query_gradient, grad_query)
        key, additional_keys = halo_gradients(box, grad_logits, query, masked, space, "grad key")
        rpb = None if bias is None else bias_gradient(box, grad_logits)
        return BoxGradients(box, key, value, additional_keys, additional_values, rpb)

    shared = Sums(problem, gradients, allocate)
    for_each_box(problem, compute, shared.add)
    shared.store()


def flat_bias(problem: Problem, rpb: Array | None) -> Array | None:
    """``[heads, offsets]``: rpb in the dtype of the accumulator."""
    return None if rpb is None else rpb.reshape(problem.heads, -1).astype(problem.accumulator)


def fill_logits(box: Box, keys: Halo, columns: Array, bias: Array | None, logits: Array) -> None:
    """Fill ``logits[lead, keys, width]`` from scaled queries ``columns[lead, dim, width]``."""
    keys.times(columns, logits)
    add_bias(box, bias, logits)


def add_bias(box: Box, bias: Array | None, logits: Array) -> None:
    """Add `bias`, if there is any, to ``logits[lead, keys, width]``."""
    if bias is not None:
        grouped = logits.reshape(*box.lead, box.tile.keys, box.tile.group_size, box.tile.queries)
        grouped[..., : box.tile.halo, :, :] += tile_bias(box, bias)


def tile_bias(box: Box, bias: Array) -> Array:
    """``[kv_heads, keys of the halo, group_size, queries]`` of `bias`, the same for every tile."""
    by_head = bias[box.heads.start : box.heads.stop, box.tile.bias_index]
    groups = len(box.kv_heads), box.tile.group_size
    grouped = by_head.reshape(*groups, *by_head.shape[1:])
    return grouped.transpose(0, 2, 1, 3)


def row_sums(a: Array, b: Array) -> Array:
    """The sums of ``a * b`` over the last axis."""
    sums: Array = np.einsum("...i,...i->...", a, b)
    return sums
