"""The launches of the naive kernels, operation by operation, and which kernels these are."""

from __future__ import annotations

from typing import Any

from cuneigh import _jit
from cuneigh._device import Device
from cuneigh._gpu import sums
from cuneigh._gpu.hvp import HvpArrays, all_of
from cuneigh._gpu.program import Program
from cuneigh._gpu.rows import (
    RowPlan,
    attention_plan,
    grid_of,
    launch,
    record_of,
    row_plan,
    value_plan,
)
from cuneigh._gpu.views import Views, load_width, readable
from cuneigh._problem import JvpResults, OfResults, Operands, Problem


def kernels(problem: Problem, device: Device) -> list[_jit.Kernel]:
    """The kernels that `problem` needs when its arrays are contiguous."""
    rank, dtype, bias = problem.rank, problem.dtype, problem.rpb_dtype
    key, value = problem.head_dim, problem.value_dim
    match problem.operation:
        case "forward" | "backward" | "jvp" | "hvp":
            plan = row_plan(rank, dtype, bias, key, value).of(problem)
            names = {
                "forward": ["forward"],
                "backward": ["backward_query", "backward_key"],
                "jvp": ["jvp"],
                "hvp": ["jvp"],
            }
            own = [plan.kernel(f"naive/{name}") for name in names[problem.operation]]
            if problem.operation == "hvp":
                plan = row_plan(rank, dtype, bias, key, value, with_tangents=True).of(problem)
                own += [plan.kernel(f"naive/{name}") for name in ("hvp_query", "hvp_key")]
        case "qk":
            own = [_products_kernel(row_plan(rank, dtype, bias, key, 0).of(problem), False)]
        case "qk_backward":
            plan = row_plan(rank, dtype, None, 0, key).of(problem)
            own = [plan.kernel("naive/av"), plan.kernel("naive/inverse")]
        case "av":
            own = [row_plan(rank, dtype, None, 0, value).of(problem).kernel("naive/av")]
        case "av_backward":
            own = [_products_kernel(row_plan(rank, dtype, None, value, 0).of(problem), True)]
            own.append(row_plan(rank, dtype, None, 0, value).of(problem).kernel("naive/inverse"))
    return own + sums.kernels(problem)


def _products_kernel(plan: RowPlan, hidden_is_zero: bool) -> _jit.Kernel:
    return plan.kernel("naive/qk", kHiddenIsZero=hidden_is_zero)


# Attention


def forward(problem: Problem, operands: Operands, output: Any, lse: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    plan = attention_plan(problem, operands, values=(output,)).of(problem)
    views = Views(problem.rank)
    views.mask(operands.key_mask)
    views.vectors(*operands[:3])
    views.additional(operands.additional_keys, operands.additional_values)
    views.bias(operands.rpb)
    views.vectors(output)
    views.scalars(lse)
    launch(
        program,
        plan.kernel("naive/forward"),
        record_of(problem, plan, keys=False),
        views,
        grid_of(problem, plan, keys=False, slices=plan.value_slices(problem.value_dim)),
    )


def backward(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    output: Any,
    lse: Any,
    grad_lse: Any,
    gradients: Operands,
    program: Program,
) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    grad_output, output = readable(grad_output, program), readable(output, program)
    plan = attention_plan(
        problem,
        operands,
        keys=(gradients.query, gradients.key),
        values=(grad_output, output, gradients.value),
    ).of(problem)
    key_slices = plan.key_slices(problem.head_dim)
    slices = max(key_slices, plan.value_slices(problem.value_dim))
    delta = program.allocate(lse.shape, problem.accumulator)

    views = Views(problem.rank)
    views.mask(operands.key_mask)
    views.vectors(*operands[:3])
    views.additional(operands.additional_keys, operands.additional_values)
    views.bias(operands.rpb)
    views.vectors(grad_output, output)
    views.scalars(lse, grad_lse, delta)
    views.vectors(gradients.query)
    launch(
        program,
        plan.kernel("naive/backward_query"),
        record_of(problem, plan, keys=False),
        views,
        grid_of(problem, plan, keys=False, slices=key_slices),
    )

    views = Views(problem.rank)
    views.mask(operands.key_mask)
    views.vectors(*operands[:3])
    views.bias(operands.rpb)
    views.vectors(grad_output)
    views.scalars(lse, delta)
    views.vectors(gradients.key, gradients.value)
    launch(
        program,
        plan.kernel("naive/backward_key"),
        record_of(problem, plan, keys=True),
        views,
        grid_of(problem, plan, keys=True, slices=slices),
    )

    sums.attention_gradients(problem, operands, grad_output, lse, delta, gradients, program)


def jvp(
    problem: Problem, operands: Operands, tangents: Operands, results: JvpResults, program: Program
) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    tangents = Operands(*(readable(array, program) for array in tangents))
    plan = attention_plan(
        problem,
        operands,
        keys=(tangents.query, tangents.key, tangents.additional_keys),
        values=(
            *(tangents.value, tangents.additional_values),
            *(results.output, results.tangent_output),
        ),
    ).of(problem)
    views = Views(problem.rank)
    views.mask(operands.key_mask)
    for each in (operands, tangents):
        views.vectors(*each[:3])
        views.additional(each.additional_keys, each.additional_values)
        views.bias(each.rpb)
    views.vectors(results.output, results.tangent_output)
    views.scalars(results.lse, results.tangent_lse)
    launch(
        program,
        plan.kernel("naive/jvp"),
        record_of(problem, plan, keys=False),
        views,
        grid_of(problem, plan, keys=False, slices=plan.value_slices(problem.value_dim)),
    )


def hvp(
    problem: Problem,
    operands: Operands,
    results: OfResults,
    incoming: OfResults,
    tangents: Operands,
    tangents_incoming: OfResults,
    gradients: Operands,
    tangents_of_results: OfResults,
    program: Program,
) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    tangents = Operands(*(readable(array, program) for array in tangents))
    tangents_of_results = all_of(problem, tangents_of_results, program)
    moved = JvpResults(None, None, *tangents_of_results)
    jvp(problem, operands, tangents, moved, program)

    delta, tangent_delta = (
        program.allocate(results.lse.shape, problem.accumulator) for _ in range(2)
    )
    arrays = HvpArrays(
        operands,
        tangents,
        readable(incoming.output, program),
        readable(tangents_incoming.output, program),
        results.lse,
        tangents_of_results.lse,
        delta,
        tangent_delta,
    )
    outputs = readable(results.output, program), tangents_of_results.output
    plan = arrays.plan(problem, gradients, *outputs)
    key_slices = plan.key_slices(problem.head_dim)
    views = arrays.views(problem)
    views.vectors(*outputs)
    views.scalars(incoming.lse, tangents_incoming.lse)
    views.vectors(gradients.query)
    launch(
        program,
        plan.kernel("naive/hvp_query"),
        record_of(problem, plan, keys=False),
        views,
        grid_of(problem, plan, keys=False, slices=key_slices),
    )
    views = arrays.views(problem)
    views.vectors(gradients.key, gradients.value)
    slices = max(key_slices, plan.value_slices(problem.value_dim))
    launch(
        program,
        plan.kernel("naive/hvp_key"),
        record_of(problem, plan, keys=True),
        views,
        grid_of(problem, plan, keys=True, slices=slices),
    )
    sums.hvp_gradients(problem, arrays, gradients, program)


# The two products on their own


def qk(problem: Problem, operands: Operands, logits: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    _multiply(program, problem, operands, logits, dim=problem.head_dim, scale=problem.scale)


def qk_backward(
    problem: Problem, operands: Operands, grad_logits: Any, gradients: Operands, program: Program
) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    dim, scale = problem.head_dim, problem.scale
    _sum_keys(
        program,
        problem,
        grad_logits,
        operands.key,
        operands.additional_keys,
        operands.key_mask,
        gradients.query,
        dim,
        scale,
    )
    mask = operands.key_mask
    _sum_queries(program, problem, grad_logits, operands.query, mask, gradients.key, dim, scale)
    if problem.additional:
        sums.stored_additional(
            program, problem, grad_logits, operands.query, gradients.additional_keys, dim, scale
        )
    if operands.rpb is not None:
        sums.stored_rpb(problem, grad_logits, mask, gradients.rpb, program)


def av(problem: Problem, weights: Any, operands: Operands, output: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    _sum_keys(
        program,
        problem,
        weights,
        operands.value,
        operands.additional_values,
        operands.key_mask,
        output,
        problem.value_dim,
        1.0,
    )


def av_backward(
    problem: Problem,
    weights: Any,
    operands: Operands,
    grad_output: Any,
    grad_weights: Any,
    gradients: Operands,
    program: Program,
) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    grad_output = readable(grad_output, program)
    dim = problem.value_dim
    mask = operands.key_mask
    factors = Operands(
        query=grad_output,
        key=operands.value,
        additional_keys=operands.additional_values,
        key_mask=mask,
    )
    _multiply(program, problem, factors, grad_weights, dim=dim, scale=1.0, hidden_is_zero=True)
    _sum_queries(program, problem, weights, grad_output, mask, gradients.value, dim, 1.0)
    if problem.additional:
        sums.stored_additional(
            program, problem, weights, grad_output, gradients.additional_values, dim, 1.0
        )


def _multiply(
    program: Program,
    problem: Problem,
    operands: Operands,
    logits: Any,
    dim: int,
    scale: float,
    hidden_is_zero: bool = False,
) -> None:
    """Fill `logits` with the products of every query and the keys of its window."""
    width = load_width((operands.query, operands.key, operands.additional_keys))
    bias = problem.rpb_dtype if operands.rpb is not None else None
    plan = row_plan(problem.rank, problem.dtype, bias, dim, 0, key_bytes=width).of(problem)
    views = Views(problem.rank)
    views.mask(operands.key_mask)
    views.vectors(operands.query, operands.key)
    views.additional(operands.additional_keys)
    views.bias(operands.rpb)
    views.vectors(logits)
    launch(
        program,
        _products_kernel(plan, hidden_is_zero),
        record_of(problem, plan, keys=False, head_dim=dim, scale=scale),
        views,
        grid_of(problem, plan, keys=False),
    )


def _sum_keys(
    program: Program,
    problem: Problem,
    weights: Any,
    value: Any,
    additional_values: Any,
    key_mask: Any,
    output: Any,
    dim: int,
    scale: float,
) -> None:
    """Fill `output` with every query's sum of the values of its window, under its `weights`."""
    plan = value_plan(problem, dim, value, additional_values, output).of(problem)
    views = Views(problem.rank)
    views.mask(key_mask)
    views.vectors(weights, value)
    views.additional(additional_values)
    views.vectors(output)
    launch(
        program,
        plan.kernel("naive/av"),
        record_of(problem, plan, keys=False, value_dim=dim, scale=scale),
        views,
        grid_of(problem, plan, keys=False, slices=plan.value_slices(dim)),
    )


def _sum_queries(
    program: Program,
    problem: Problem,
    weights: Any,
    vectors: Any,
    key_mask: Any,
    output: Any,
    dim: int,
    scale: float,
) -> None:
    """Fill `output` with every key's sum of the `vectors` of the queries that see it.

    The weights are those that the queries give to the key.
    """
    plan = value_plan(problem, dim, vectors, output).of(problem)
    views = Views(problem.rank)
    views.mask(key_mask)
    views.vectors(weights, vectors, output)
    launch(
        program,
        plan.kernel("naive/inverse"),
        record_of(problem, plan, keys=True, value_dim=dim, scale=scale),
        views,
        grid_of(problem, plan, keys=True, slices=plan.value_slices(dim)),
    )
