"""The launches of every operation: what each multiplies, and the kernels around the products."""

from __future__ import annotations

import math
from typing import Any

from cuneigh._backends.gemm.plan import NAME, USES, plan_of
from cuneigh._backends.gemm.sources import row_source, softmax_source, weight_factor
from cuneigh._backends.gemm.walk import Chunk, Matrix, Walk
from cuneigh._gpu import sums
from cuneigh._gpu.announce import announce
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.program import Program
from cuneigh._gpu.views import Views, load_width, readable
from cuneigh._problem import JvpResults, Operands, Problem


def forward(problem: Problem, operands: Operands, output: Any, lse: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    walk = _walk_over(problem, program, *operands[:3], output)
    query = walk.queries(operands.query)
    key = walk.keys(operands.key, operands.additional_keys)
    value = walk.keys(operands.value, operands.additional_values)
    result = walk.queries(output)
    logits = walk.dense(problem.accumulator)
    weights = _overwriting(logits, walk)
    source = softmax_source(problem, walk.plan)
    views = Views(problem.rank)
    views.bias(operands.rpb)
    views.scalars(lse)
    views.addresses(logits.buffer, weights.buffer)
    for chunk in walk.chunks():
        chunk.gather(query, key, value)
        chunk.multiply(logits, query, key, transpose_right=True)
        chunk.row_kernel("gemm/softmax", source, views)
        chunk.multiply(result, weights, value, factor=1 / weight_factor(problem))
        chunk.scatter(result)


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
    walk = _walk_over(problem, program, *operands[:3], grad_output, gradients.query)
    query = walk.queries(operands.query)
    key = walk.keys(operands.key, operands.additional_keys)
    value = walk.keys(operands.value, operands.additional_values)
    grad_rows = walk.queries(grad_output)
    grad_query = walk.queries(gradients.query)
    logits, grad_weights = (walk.dense(problem.accumulator) for _ in range(2))
    weights, grad_logits = _overwriting(logits, walk), _overwriting(grad_weights, walk)
    halo_sums = _HaloSums(walk, gradients)
    delta = program.allocate(lse.shape, problem.accumulator) if problem.rpb_dtype else None
    source = row_source(problem, walk.plan.lanes(problem), problem.rpb_dtype)
    views = Views(problem.rank)
    views.bias(operands.rpb)
    views.vectors(grad_output, output)
    views.scalars(lse, grad_lse, delta)
    views.addresses(logits.buffer, grad_weights.buffer, weights.buffer, grad_logits.buffer)
    for chunk in walk.chunks():
        chunk.gather(query, key, value, grad_rows)
        chunk.multiply(logits, query, key, transpose_right=True)
        chunk.multiply(grad_weights, grad_rows, value, transpose_right=True)
        chunk.row_kernel("gemm/gradient", source, views)
        chunk.multiply(grad_query, grad_logits, key, factor=problem.scale)
        chunk.scatter(grad_query)
        halo_sums.add_keys(chunk, grad_logits, query, problem.scale)
        halo_sums.add_values(chunk, weights, grad_rows, 1 / weight_factor(problem))
    if problem.rpb_dtype:
        sums.attention_rpb(problem, operands, grad_output, lse, delta, gradients.rpb, program)


def jvp(
    problem: Problem, operands: Operands, tangents: Operands, results: JvpResults, program: Program
) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    tangents = Operands(*(readable(array, program) for array in tangents))
    walk = _walk_over(problem, program, *operands[:3])
    query, tangent_query = walk.queries(operands.query), walk.queries(tangents.query)
    key, tangent_key, value, tangent_value = (
        walk.keys(*of)
        for of in (
            (operands.key, operands.additional_keys),
            (tangents.key, tangents.additional_keys),
            (operands.value, operands.additional_values),
            (tangents.value, tangents.additional_values),
        )
    )
    output, tangent_output = (
        None if array is None else walk.queries(array)
        for array in (results.output, results.tangent_output)
    )
    logits, moved = (walk.dense(problem.accumulator) for _ in range(2))
    weights, tangent_weights = _overwriting(logits, walk), _overwriting(moved, walk)
    softmax, of_weights = Views(problem.rank), Views(problem.rank)
    softmax.bias(operands.rpb)
    softmax.scalars(results.lse)
    softmax.addresses(logits.buffer, weights.buffer)
    of_weights.bias(tangents.rpb)
    of_weights.scalars(results.tangent_lse)
    of_weights.addresses(weights.buffer, moved.buffer, tangent_weights.buffer)
    source = row_source(problem, walk.plan.lanes(problem), problem.rpb_dtype)
    factor = 1 / weight_factor(problem)
    for chunk in walk.chunks():
        chunk.gather(query, tangent_query, key, tangent_key, value, tangent_value)
        chunk.multiply(logits, query, key, transpose_right=True)
        chunk.multiply(moved, tangent_query, key, transpose_right=True)
        chunk.multiply(moved, query, tangent_key, transpose_right=True, adds=True)
        chunk.row_kernel("gemm/softmax", softmax_source(problem, walk.plan), softmax)
        chunk.row_kernel("gemm/tangent", source, of_weights)
        if output is not None:
            chunk.multiply(output, weights, value, factor)
            chunk.scatter(output)
        if tangent_output is not None:
            chunk.multiply(tangent_output, tangent_weights, value)
            chunk.multiply(tangent_output, weights, tangent_value, factor, adds=True)
            chunk.scatter(tangent_output)


def qk(problem: Problem, operands: Operands, logits: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    walk = _walk_over(problem, program, operands.query, operands.key)
    query = walk.queries(operands.query)
    key = walk.keys(operands.key, operands.additional_keys)
    products = walk.dense(problem.accumulator)
    source = row_source(problem, walk.plan.lanes(problem), problem.rpb_dtype, kHiddenIsZero=False)
    views = Views(problem.rank)
    views.bias(operands.rpb)
    views.vectors(logits)
    views.addresses(products.buffer)
    for chunk in walk.chunks():
        chunk.gather(query, key)
        chunk.multiply(products, query, key, transpose_right=True)
        chunk.row_kernel("gemm/select", source, views)


def qk_backward(
    problem: Problem,
    operands: Operands,
    grad_logits: Any,
    gradients: Operands,
    program: Program,
) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    walk = _walk_over(problem, program, operands.query, operands.key, gradients.query)
    query = walk.queries(operands.query)
    key = walk.keys(operands.key, operands.additional_keys)
    grad_query = walk.queries(gradients.query)
    products = walk.dense(problem.dtype)
    halo_sums = _HaloSums(walk, gradients)
    source = row_source(problem, walk.plan.lanes(problem), None)
    views = Views(problem.rank)
    views.vectors(grad_logits)
    views.addresses(products.buffer)
    for chunk in walk.chunks():
        chunk.gather(query, key)
        chunk.row_kernel("gemm/spread", source, views)
        chunk.multiply(grad_query, products, key, factor=problem.scale)
        chunk.scatter(grad_query)
        halo_sums.add_keys(chunk, products, query, problem.scale)
    if problem.rpb_dtype:
        sums.stored_rpb(problem, grad_logits, None, gradients.rpb, program)


def av(problem: Problem, weights: Any, operands: Operands, output: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    walk = _walk_over(problem, program, operands.value, output)
    value = walk.keys(operands.value, operands.additional_values)
    result = walk.queries(output)
    products = walk.dense(problem.dtype)
    source = row_source(problem, walk.plan.lanes(problem), None)
    views = Views(problem.rank)
    views.vectors(weights)
    views.addresses(products.buffer)
    for chunk in walk.chunks():
        chunk.gather(value)
        chunk.row_kernel("gemm/spread", source, views)
        chunk.multiply(result, products, value)
        chunk.scatter(result)


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
    walk = _walk_over(problem, program, operands.value, grad_output)
    value = walk.keys(operands.value, operands.additional_values)
    grad_rows = walk.queries(grad_output)
    products, spread = walk.dense(problem.accumulator), walk.dense(problem.dtype)
    halo_sums = _HaloSums(walk, gradients)
    spread_source = row_source(problem, walk.plan.lanes(problem), None)
    select_source = row_source(problem, walk.plan.lanes(problem), None, kHiddenIsZero=True)
    spread_views, select_views = Views(problem.rank), Views(problem.rank)
    spread_views.vectors(weights)
    spread_views.addresses(spread.buffer)
    select_views.bias(None)
    select_views.vectors(grad_weights)
    select_views.addresses(products.buffer)
    for chunk in walk.chunks():
        chunk.gather(value, grad_rows)
        chunk.multiply(products, grad_rows, value, transpose_right=True)
        chunk.row_kernel("gemm/select", select_source, select_views)
        chunk.row_kernel("gemm/spread", spread_source, spread_views)
        halo_sums.add_values(chunk, spread, grad_rows, 1.0)


class _HaloSums:
    """The gradients of keys and values, summed over the halos of all chunks."""

    def __init__(self, walk: Walk, gradients: Operands) -> None:
        self.gradients = gradients
        uses_key, uses_value = USES[walk.problem.operation]
        self.keys = walk.halo(walk.problem.head_dim) if uses_key else None
        self.values = walk.halo(walk.problem.value_dim) if uses_value else None
        self.partial: dict[Matrix, Any] = {}
        if walk.plan.sum_bytes:
            keys = math.prod(walk.problem.key_tokens) + (walk.problem.additional or 0)
            for halo in (self.keys, self.values):
                if halo is not None:
                    self.partial[halo] = walk.program.allocate((keys, halo.width), halo.dtype)

    def add_keys(self, chunk: Chunk, grad_logits: Matrix, query: Matrix, factor: float) -> None:
        assert self.keys is not None
        chunk.multiply(self.keys, grad_logits, query, factor, transpose_left=True)
        chunk.sum_halos(
            self.keys,
            self.gradients.key,
            self.gradients.additional_keys,
            self.partial.get(self.keys),
        )

    def add_values(self, chunk: Chunk, weights: Matrix, grad_rows: Matrix, factor: float) -> None:
        assert self.values is not None
        chunk.multiply(self.values, weights, grad_rows, factor, transpose_left=True)
        chunk.sum_halos(
            self.values,
            self.gradients.value,
            self.gradients.additional_values,
            self.partial.get(self.values),
        )


def _overwriting(product: Matrix, walk: Walk) -> Matrix:
    """The matrix of what is made of a product: the same if the numbers have the same dtype."""
    return product if product.dtype == walk.problem.dtype else walk.dense(walk.problem.dtype)


def _walk_over(problem: Problem, program: Program, *tokens: Array) -> Walk:
    """A walk over `problem`, which reads and writes `tokens`."""
    aligned = load_width(tokens) == 16
    plan = plan_of(problem, program.device, contiguous=aligned and _one_stride(tokens))
    announce(NAME, problem.operation, problem, plan)
    return Walk(problem, plan, program)


def _one_stride(tokens: tuple[Array, ...]) -> bool:
    """Whether one stride leads from token to token of every array, as cuBLAS asks of rows.

    Tokens must not overlap.
    """
    for array in tokens:
        strides, counts = array.strides[1:-2], array.shape[1:-2]
        if strides[-1] < array.shape[-1]:
            return False
        inner = zip(strides[1:], counts[1:], strict=True)
        if any(
            stride != below * count for stride, (below, count) in zip(strides, inner, strict=False)
        ):
            return False
    return True
