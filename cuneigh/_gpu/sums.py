"""What is summed over all queries, and delta, which every gradient of attention needs.

Sums over all queries are the gradients of the additional keys and values and of the relative
positional bias (rpb). Every block sums a share of the queries; a last kernel adds up the shares in
a fixed order. The kernels are those of cuda/sums.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from cuneigh import _jit
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.boxes import Box
from cuneigh._gpu.hvp import HvpArrays
from cuneigh._gpu.program import Program
from cuneigh._gpu.rows import (
    THREADS,
    RowPlan,
    attention_plan,
    grid_of,
    launch,
    record_of,
    row_plan,
    value_plan,
)
from cuneigh._gpu.views import Views
from cuneigh._problem import OfResults, Operands, Problem


def kernels(problem: Problem) -> list[_jit.Kernel]:
    """The kernels of the sums of `problem` when its arrays are contiguous."""
    rank, dtype = problem.rank, problem.dtype
    key, value = problem.head_dim, problem.value_dim
    plans = {
        "backward": row_plan(rank, dtype, problem.rpb_dtype, key, value),
        "hvp": row_plan(rank, dtype, problem.rpb_dtype, key, value, with_tangents=True),
        "qk_backward": row_plan(rank, dtype, None, 0, key),
        "av_backward": row_plan(rank, dtype, None, 0, value),
    }
    plan = plans.get(problem.operation)
    if plan is None:
        return []
    if problem.operation == "hvp":
        return _hvp_kernels(problem, plan.of(problem))
    stored = problem.operation != "backward"
    found: list[_jit.Kernel] = []
    dtypes: list[str] = []  # of the gradients
    if problem.additional:
        found.append(plan.kernel("sums/additional" if stored else "sums/attention_additional"))
        dtypes.append(dtype)
    if problem.rpb_dtype:
        rpb_plan = _stored_plan(problem) if stored else plan.of(problem)
        found.append(rpb_plan.kernel("sums/rpb", kStored=stored))
        dtypes.append(problem.rpb_dtype)
    return found + [_shares_kernel(problem.accumulator, each) for each in dict.fromkeys(dtypes)]


def _hvp_kernels(problem: Problem, plan: RowPlan) -> list[_jit.Kernel]:
    given = {
        "sums/hvp_additional": problem.dtype if problem.additional else None,
        "sums/hvp_rpb": problem.rpb_dtype,
    }
    found = [plan.kernel(name) for name, dtype in given.items() if dtype]
    dtypes = dict.fromkeys(filter(None, given.values()))
    return found + [_shares_kernel(problem.accumulator, dtype) for dtype in dtypes]


class Units(NamedTuple):
    """Of what `delta` makes the units of dQ: `UnitArguments` of cuda/sums/units.cuh."""

    units: Array
    """[batch, x1..xr, heads], to be filled."""
    magnitudes: Array
    """The largest of the keys and values that queries of a cell may see."""
    shifts: Box
    """Cells are 2^shift tokens long, along each axis."""


def delta_kernel(problem: Problem, with_units: bool = False) -> _jit.Kernel:
    """The kernel of `delta`, or of `hvp_delta`, when its arrays are contiguous."""
    plan = row_plan(problem.rank, problem.dtype, None, 0, problem.value_dim)
    if problem.operation == "hvp":
        return plan.kernel("sums/hvp_delta")
    return plan.kernel("sums/delta", kUnits=with_units)


def delta(
    problem: Problem,
    grad_output: Any,
    output: Any,
    lse: Any,
    grad_lse: Any,
    statistics: Any,
    program: Program,
    units: Units | None = None,
) -> None:
    """Fill `statistics` [batch, x1..xr, heads, 2]: lse in base 2, and delta of every query.

    delta = sum(grad_output * output) - grad_lse. The units are filled, too, if there are any.
    """
    plan = value_plan(problem, problem.value_dim, grad_output, output)
    views = Views(problem.rank)
    views.vectors(grad_output, output)
    views.scalars(lse, grad_lse)
    views.pairs(statistics)
    if units is not None:
        views.scalars(units.units)
        views.addresses(units.magnitudes)
        views.numbers(*units.shifts)
    record = record_of(problem, plan, keys=False)
    grid = grid_of(problem, plan, keys=False)
    kernel = plan.kernel("sums/delta", kUnits=units is not None)
    launch(program, kernel, record, views, grid)


def hvp_delta(
    problem: Problem,
    incoming: OfResults,
    tangents_incoming: OfResults,
    results: OfResults,
    tangents_of_results: OfResults,
    statistics: tuple[Array, Array],
    program: Program,
) -> None:
    """Fill the first of `statistics` as `delta` does, the second with the tangents of both."""
    vectors = (
        *(incoming.output, results.output, tangents_of_results.output),
        tangents_incoming.output,
    )
    plan = value_plan(problem, problem.value_dim, *vectors)
    views = Views(problem.rank)
    views.vectors(*vectors)
    views.scalars(results.lse, tangents_of_results.lse, incoming.lse, tangents_incoming.lse)
    for pairs in statistics:
        views.pairs(pairs)
    record = record_of(problem, plan, keys=False)
    grid = grid_of(problem, plan, keys=False)
    launch(program, plan.kernel("sums/hvp_delta"), record, views, grid)


# Gradients of the operands of attention, whose weights are recomputed


def attention_gradients(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    lse: Any,
    delta: Any,
    gradients: Operands,
    program: Program,
) -> None:
    """Fill the gradients of the additional keys and values, and of rpb, as far as there are any."""
    if problem.additional:
        _attention_additional(problem, operands, grad_output, lse, delta, gradients, program)
    if operands.rpb is not None:
        attention_rpb(problem, operands, grad_output, lse, delta, gradients.rpb, program)


def _attention_additional(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    lse: Any,
    delta: Any,
    gradients: Operands,
    program: Program,
) -> None:
    plan = attention_plan(problem, operands, values=(grad_output,))
    results = _additional_results(problem)
    count = _share_count(program, results, problem, plan)
    key_shares, value_shares = (
        program.allocate((count, *gradient.shape), problem.accumulator)
        for gradient in (gradients.additional_keys, gradients.additional_values)
    )
    views = Views(problem.rank)
    views.vectors(operands.query)
    views.additional(operands.additional_keys, operands.additional_values)
    views.vectors(grad_output)
    views.scalars(lse, delta)
    views.pointers(key_shares, value_shares)
    slices = max(plan.key_slices(problem.head_dim), plan.value_slices(problem.value_dim))
    launch(
        program,
        plan.kernel("sums/attention_additional"),
        record_of(problem, plan, keys=False),
        views,
        (results * count, slices),
    )
    _add_up(program, key_shares, gradients.additional_keys, problem)
    _add_up(program, value_shares, gradients.additional_values, problem)


def attention_rpb(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    lse: Any,
    delta: Any,
    gradient: Any,
    program: Program,
) -> None:
    """Fill the gradient of rpb."""
    plan = attention_plan(problem, operands, values=(grad_output,)).of(problem)
    views = Views(problem.rank)
    views.mask(operands.key_mask)
    views.vectors(*operands[:3])
    views.bias(operands.rpb)
    views.vectors(grad_output)
    views.scalars(lse, delta)
    views.vectors(None)
    kernel = plan.kernel("sums/rpb", kStored=False)
    _sum_rpb(problem, plan, kernel, views, gradient, program)


# How these gradients change along tangents


def hvp_gradients(
    problem: Problem, arrays: HvpArrays, gradients: Operands, program: Program
) -> None:
    """Fill the tangents of the gradients of the additional keys and values, and of rpb."""
    plan = arrays.plan(problem)
    if problem.additional:
        results = _additional_results(problem)
        count = _share_count(program, results, problem, plan)
        key_shares, value_shares = (
            program.allocate((count, *gradient.shape), problem.accumulator)
            for gradient in (gradients.additional_keys, gradients.additional_values)
        )
        views = arrays.views(problem)
        views.pointers(key_shares, value_shares)
        slices = max(plan.key_slices(problem.head_dim), plan.value_slices(problem.value_dim))
        launch(
            program,
            plan.kernel("sums/hvp_additional"),
            record_of(problem, plan, keys=False),
            views,
            (results * count, slices),
        )
        _add_up(program, key_shares, gradients.additional_keys, problem)
        _add_up(program, value_shares, gradients.additional_values, problem)
    if gradients.rpb is not None:
        kernel = plan.kernel("sums/hvp_rpb")
        _sum_rpb(problem, plan, kernel, arrays.views(problem), gradients.rpb, program)


# Gradients of the operands of the two products, whose weights are in memory


def stored_additional(
    program: Program,
    problem: Problem,
    weights: Any,
    vectors: Any,
    gradient: Any,
    dim: int,
    scale: float,
) -> None:
    """Fill the gradient of the additional keys (or values).

    It is `scale` times the sum of the `vectors` of all queries, of `dim` elements, under the
    `weights` that they give to an additional key.
    """
    plan = value_plan(problem, dim, vectors)
    results = _additional_results(problem)
    count = _share_count(program, results, problem, plan)
    shares = program.allocate((count, *gradient.shape), problem.accumulator)
    views = Views(problem.rank)
    views.vectors(weights, vectors)
    views.pointers(shares)
    launch(
        program,
        plan.kernel("sums/additional"),
        record_of(problem, plan, keys=False, value_dim=dim, scale=scale),
        views,
        (results * count, plan.value_slices(dim)),
    )
    _add_up(program, shares, gradient, problem)


def stored_rpb(
    problem: Problem, grad_logits: Any, key_mask: Any, gradient: Any, program: Program
) -> None:
    """Fill the gradient of rpb, given that of the logits."""
    views = Views(problem.rank)
    views.mask(key_mask)
    views.vectors(*(None,) * 7, grad_logits)
    plan = _stored_plan(problem)
    _sum_rpb(problem, plan, plan.kernel("sums/rpb", kStored=True), views, gradient, program)


def _stored_plan(problem: Problem) -> RowPlan:
    """The plan of the gradient of rpb where no head vector is loaded."""
    return row_plan(problem.rank, problem.dtype, None, 0, 0).of(problem)


def _sum_rpb(
    problem: Problem,
    plan: RowPlan,
    kernel: _jit.Kernel,
    views: Views,
    gradient: Any,
    program: Program,
) -> None:
    """Fill the gradient of rpb, or its tangent, by `kernel`; `views` lacks the shares."""
    count = _share_count(program, gradient.size, problem, plan)
    shares = program.allocate((count, *gradient.shape), problem.accumulator)
    views.pointers(shares)
    launch(
        program,
        kernel,
        record_of(problem, plan, keys=False),
        views,
        (gradient.size * count, 1),
    )
    _add_up(program, shares, gradient, problem)


# Shares


def _additional_results(problem: Problem) -> int:
    """Additional keys of all batches and key heads."""
    return problem.batch * (problem.additional or 0) * problem.kv_heads


def _share_count(program: Program, results: int, problem: Problem, plan: RowPlan) -> int:
    """Blocks that share the sum over all queries for each of `results` results."""
    blocks = 8 * program.device.sm_count
    useful = math.ceil(math.prod(problem.tokens) / (4 * plan.groups))
    return max(1, min(math.ceil(blocks / results), useful))


def _add_up(program: Program, shares: Array, result: Array, problem: Problem) -> None:
    """Add up the leading axis of `shares` into `result`."""
    program.launch(
        _shares_kernel(problem.accumulator, result.dtype),
        (math.ceil(result.size / THREADS), 1),
        THREADS,
        [shares.pointer],
        [shares.shape[0]],
        [result.size],
        [result.pointer],
    )


def _shares_kernel(number: str, result: str) -> _jit.Kernel:
    source = _jit.plan_source({"kThreads": THREADS}, types={"Number": number, "Result": result})
    return _jit.Kernel("sums/shares", source)
