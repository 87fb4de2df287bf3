"""Neighborhood attention and its tangent in one pass, box by box.

With S the logits, dS their tangent and P the softmax of S, `dlse = sum(P dS)` and
`dO = sum(P (dS - dlse) V + P dV)`. Both are sums with the weights P and P dS.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuneigh._backends.cpu.attention import fill_logits, flat_bias
from cuneigh._backends.cpu.boxes import (
    Workspace,
    column_sums,
    for_each_box,
    hide,
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
        keys, key_tangents = (
            read_halo(box, of.key, of.additional_keys, space, name, vectors=False)
            for of, name in ((primal, "key"), (moved, "key tangent"))
        )
        values, value_tangents = (
            read_halo(box, of.value, of.additional_values, space, name, vectors=True)
            for of, name in ((primal, "value"), (moved, "value tangent"))
        )
        columns, column_tangents = (
            transposed(
                box,
                read_tile(box, of.query, space, name),
                problem.scale,
                space,
                f"{name} columns",
            )
            for of, name in ((primal, "query"), (moved, "query tangent"))
        )

        # P, from the logits less the maximum of their row
        shape = *box.lead, box.tile.keys, box.tile.width
        weights = space("weights", *shape)
        fill_logits(box, keys, columns, bias, weights)
        hide(box, weights)
        row_max = weights.max(-2)
        row_max[row_max == -np.inf] = 0
        weights -= row_max[..., None, :]
        np.exp(weights, out=weights)
        row_sum = column_sums(weights)
        seen = row_sum != 0
        normalizer = 1 / np.where(seen, row_sum, 1)
        weights *= normalizer[..., None, :]

        # P dS
        moving, half = space("weight tangents", *shape), space("logit tangents", *shape)
        fill_logits(box, keys, column_tangents, bias_tangent, moving)
        moving += key_tangents.times(columns, half)
        moving *= weights
        if not np.isfinite(column_sums(moving)).all():  # not 0 * inf
            np.copyto(moving[..., : box.tile.halo, :], 0, where=~visible(box))
        lse_tangent = column_sums(moving)

        dims = *box.lead, box.tile.width, problem.value_dim
        output = values.sums(box, weights, space("output", *dims))
        if tangent_rows is not None:
            tangent = values.sums(box, moving, space("output tangent", *dims))
            tangent -= lse_tangent[..., None] * output
            tangent += value_tangents.sums(box, weights, space("sums of tangents", *dims))
            write_tile(box, tangent_rows, tangent)
        if out_rows is not None:
            write_tile(box, out_rows, output)
        if lse_rows is not None:
            write_tile(box, lse_rows, (np.log(row_sum) + row_max)[..., None])
        if tangent_lse_rows is not None:
            write_tile(box, tangent_lse_rows, lse_tangent[..., None])

    for_each_box(problem, compute)
