"""Neighborhood attention and its tangent in one pass, box by box.

With S the logits, dS their tangent and P the softmax of S, `dlse = sum(P dS)` and
`dO = sum(P (dS - dlse) V + P dV)`. Both are sums with the weights P and P dS.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuneigh._backends.cpu.attention import add_bias, fill_logits, flat_bias
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
    transposed,
    visible,
    write_tile,
)
from cuneigh._backends.cpu.rows import Rows
from cuneigh._backends.cpu.tiles import Box
from cuneigh._problem import JvpResults, Operands, Problem


@np.errstate(all="ignore")
def jvp(
    problem: Problem, operands: Operands, tangents: Operands, results: JvpResults, allocate: Any
) -> None:
    primal, moved = tables(operands), tables(tangents)
    bias, bias_tangent = (flat_bias(problem, each.rpb) for each in (operands, tangents))
    out_rows, tangent_rows = (
        None if array is None else Rows(array) for array in (results.output, results.tangent_output)
    )
    lse_rows, tangent_lse_rows = (
        None if array is None else Rows(array[..., None])
        for array in (results.lse, results.tangent_lse)
    )

    def compute(box: Box, space: Workspace) -> None:
        beside = space.beside  # for what tangents hold, by the same names
        masked = masked_keys(box, primal)
        keys, key_tangents = (
            read_halo(box, of, "key", masked, where, vectors=False)
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

        # The exponentials of the logits less the maximum of their row: P, but for their sum
        shape = *box.lead, box.tile.keys, box.tile.width
        weights = space("weights", *shape)
        columns = transposed(box, query, problem.scale, space, "query columns")
        fill_logits(box, keys, columns, bias, weights)
        hide(box, weights)
        fill_masked(masked, weights, -np.inf)
        row_max = weights.max(-2, initial=-np.inf)
        row_max[row_max == -np.inf] = 0
        weights -= row_max[..., None, :]
        np.exp(weights, out=weights)
        row_sum = column_sums(weights)
        normalizer = 1 / np.where(row_sum == 0, 1, row_sum)

        # P dS
        moving, half = space("weight tangents", *shape), space("logit tangents", *shape)
        columns, column_tangents = (
            transposed(box, of, 1, where, "query columns")
            for of, where in ((query, space), (query_tangent, beside))
        )
        keys.times(column_tangents, moving)
        moving += key_tangents.times(columns, half)
        moving *= problem.scale  # of numbers scaled before most digits may be lost
        add_bias(box, bias_tangent, moving)
        moving *= weights
        if not np.isfinite(column_sums(moving)).all():  # not 0 * inf
            np.copyto(moving[..., : box.tile.halo, :], 0, where=~visible(box))
            fill_masked(masked, moving, 0)
        lse_tangent = column_sums(moving) * normalizer

        dims = *box.lead, box.tile.width, problem.value_dim
        output = values.sums(box, weights, space("output", *dims))
        output *= normalizer[..., None]
        if tangent_rows is not None:
            tangent = values.sums(box, moving, space("output tangent", *dims))
            tangent += value_tangents.sums(box, weights, space("sums of tangents", *dims))
            tangent *= normalizer[..., None]
            tangent -= lse_tangent[..., None] * output
            write_tile(box, tangent_rows, tangent)
        if out_rows is not None:
            write_tile(box, out_rows, output)
        if lse_rows is not None:
            write_tile(box, lse_rows, (np.log(row_sum) + row_max)[..., None])
        if tangent_lse_rows is not None:
            write_tile(box, tangent_lse_rows, lse_tangent[..., None])

    for_each_box(problem, compute)
