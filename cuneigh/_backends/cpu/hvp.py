"""How the gradients of neighborhood attention change along tangents, box by box.

With S the logits, P their softmax and dP the gradient of P, `dS = P (dP - delta)` is the gradient
of S. Where all of them change by what has a prime here,

    P' = P (S' - lse')    O' = P' V + P V'    delta' = sum(dO' O + dO O') - dlse'
    dS' = P' (dP - delta) + P (dP' - delta')  dV' = P'^T dO + P^T dO'
    dQ' = scale (dS' K + dS K')               dK' = scale (dS'^T Q + dS^T Q')
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuneigh._backends.cpu.attention import add_bias, fill_logits, flat_bias, row_sums
from cuneigh._backends.cpu.boxes import (
    Workspace,
    column_sums,
    fill_masked,
    for_each_box,
    hide,
    masked_keys,
    read_halo,
    read_tile,
    tables,
    tile_space,
    transposed,
    visible,
    write_tile,
)
from cuneigh._backends.cpu.gradients import BoxGradients, Sums, bias_gradient, halo_gradients
from cuneigh._backends.cpu.rows import Array, Rows
from cuneigh._backends.cpu.strips import Booleans
from cuneigh._backends.cpu.tiles import Box
from cuneigh._problem import OfResults, Operands, Problem


@np.errstate(all="ignore")
def hvp(
    problem: Problem,
    operands: Operands,
    results: OfResults,
    incoming: OfResults,
    tangents: Operands,
    tangents_incoming: OfResults,
    gradients: Operands,
    tangents_of_results: OfResults,
    allocate: Any,
) -> None:
    primal, moved = tables(operands), tables(tangents)
    bias, bias_tangent = (flat_bias(problem, each.rpb) for each in (operands, tangents))
    out_rows, lse_rows = rows_of(results)
    grad_rows, grad_lse_rows = rows_of(incoming)
    grad_tangent_rows, grad_lse_tangent_rows = rows_of(tangents_incoming)
    out_tangent_rows, lse_tangent_rows = rows_of(tangents_of_results)
    query_gradient = Rows(gradients.query)

    def compute(box: Box, space: Workspace) -> BoxGradients:
        beside = space.beside  # for what tangents hold, by the same names
        masked = masked_keys(box, primal)
        keys, key_tangents = (
            read_halo(box, of, "key", masked, where, vectors=True)
            for of, where in ((primal, space), (moved, beside))
        )
        values, value_tangents = (
            read_halo(box, of, "value", masked, where, vectors=True)
            for of, where in ((primal, space), (moved, beside))
        )
        query, query_tangent = (
            read_tile(box, of.query, where, "query")
            for of, where in ((primal, space), (moved, beside))
        )
        # P
        shape = *box.lead, box.tile.keys, box.tile.width
        weights = space("weights", *shape)
        row_lse = read_tile(box, lse_rows, space, "lse")[..., 0]
        row_lse[row_lse == -np.inf] = 0
        columns = transposed(box, query, problem.scale, space, "query columns")
        fill_logits(box, keys, columns, bias, weights)
        weights -= row_lse[..., None, :]
        hide(box, weights)
        fill_masked(masked, weights, -np.inf)
        np.exp(weights, out=weights)

        # lse' and P'
        moving, half = beside("weights", *shape), space("term", *shape)
        columns, column_tangents = (
            transposed(box, of, 1, where, "query columns")
            for of, where in ((query, space), (query_tangent, beside))
        )
        keys.times(column_tangents, moving)
        moving += key_tangents.times(columns, half)
        moving *= problem.scale  # of numbers scaled before most digits may be lost
        add_bias(box, bias_tangent, moving)
        moving *= weights
        clear_hidden(box, masked, moving)
        lse_tangent = column_sums(moving)
        moving -= np.multiply(weights, lse_tangent[..., None, :], out=half)
        if lse_tangent_rows is not None:
            write_tile(box, lse_tangent_rows, lse_tangent[..., None])

        # O'
        dims = *box.lead, box.tile.width, problem.value_dim
        output_tangent = values.sums(box, moving, space("output tangent", *dims))
        output_tangent += value_tangents.sums(box, weights, space("sums of tangents", *dims))
        if out_tangent_rows is not None:
            write_tile(box, out_tangent_rows, output_tangent)

        # dV', delta and delta'
        grad_out = read_tile(box, grad_rows, space, "grad output")
        output = read_tile(box, out_rows, space, "output")
        delta = row_sums(grad_out, output)
        delta_tangent = row_sums(grad_out, output_tangent)
        if grad_lse_rows is not None:
            delta -= read_tile(box, grad_lse_rows, space, "grad lse")[..., 0]
        if grad_lse_tangent_rows is not None:
            delta_tangent -= read_tile(box, grad_lse_tangent_rows, space, "grad lse")[..., 0]
        value = halo_gradients(box, moving, grad_out, masked, space, "grad value")
        grad_tangent = None
        if grad_tangent_rows is not None:
            grad_tangent = read_tile(box, grad_tangent_rows, beside, "grad output")
            delta_tangent += row_sums(grad_tangent, output)
            value = added(
                value, halo_gradients(box, weights, grad_tangent, masked, beside, "grad value")
            )

        # dS' and dS
        grad_columns = transposed(box, grad_out, 1, space, "grad output columns")
        grad_logits = values.times(grad_columns, space("grad logits", *shape))
        grad_logits -= delta[..., None, :]
        moving *= grad_logits
        grad_logits *= weights
        grad_tangents = value_tangents.times(grad_columns, beside("grad logits", *shape))
        if grad_tangent is not None:
            tangent_columns = transposed(box, grad_tangent, 1, beside, "grad output columns")
            grad_tangents += values.times(tangent_columns, half)
        grad_tangents -= delta_tangent[..., None, :]
        grad_tangents *= weights
        grad_tangents += moving
        for each in (grad_logits, grad_tangents):
            clear_hidden(box, masked, each)

        # dQ', dK' and drpb'
        grad_query = tile_space(box, space, "grad query", problem.head_dim)
        keys.sums(box, grad_tangents, grad_query)
        grad_query += key_tangents.sums(
            box, grad_logits, tile_space(box, beside, "grad query", problem.head_dim)
        )
        grad_query *= problem.scale
        write_tile(box, query_gradient, grad_query)
        key = added(
            halo_gradients(box, grad_tangents, query, masked, space, "grad key"),
            halo_gradients(box, grad_logits, query_tangent, masked, beside, "grad key"),
        )
        rpb = None if bias is None else bias_gradient(box, grad_tangents)
        return BoxGradients(box, key[0], value[0], key[1], value[1], rpb)

    shared = Sums(problem, gradients, allocate)
    for_each_box(problem, compute, shared.add)
    shared.store()


def rows_of(of: OfResults) -> tuple[Any, Any]:
    """`Rows` of what there is for output and lse."""
    return (
        None if of.output is None else Rows(of.output),
        None if of.lse is None else Rows(of.lse[..., None]),
    )


def clear_hidden(box: Box, masked: Booleans | None, weights: Array) -> None:
    """Set what ``weights[lead, keys, width]`` has for hidden pairs to 0, if 0 * inf came of it."""
    if not np.isfinite(column_sums(weights)).all():
        np.copyto(weights[..., : box.tile.halo, :], 0, where=~visible(box))
        fill_masked(masked, weights, 0)


HaloGradients = tuple[Array, Array | None]
"""Of the keys of the halos, and of the additional ones."""


def added(a: HaloGradients, b: HaloGradients) -> HaloGradients:
    """The sum, in the memory of the first."""
    for one, other in zip(a, b, strict=True):
        if one is not None:
            one += other
    return a
