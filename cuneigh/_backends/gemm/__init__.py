"""Neighborhood attention as batched matrix products: the source paper's first formulation.

Boxes of queries are multiplied with the halos of keys that they see, on cuBLAS; kernels around the
products (`cuda/gemm_*.cu`) gather boxes and halos, turn dense logits into weights, and sum the
gradients of halos per key in a fixed order. `_gemm_plan` cuts, `_walk` launches, `_cublas` calls.

The products are dense, and hidden pairs are zeros in them: a non-finite *value* may reach queries
whose halo held it though their window did not (0 * NaN is NaN), and so may, in gradients, any other
non-finite operand. In a forward a non-finite key reaches only the queries whose window holds it.

float32 is multiplied in float32. `CUNEIGH_ALLOW_TF32=1` in the environment allows cuBLAS to round
the factors to TF32, about 2.5 times as fast. A call walks over its tiles in chunks that fit in
`CUNEIGH_WORKSPACE_BYTES` of workspace (512 MiB by default). Where the tiles of one key head are
more than that, half-precision gradients take the float32 sums of that head on top.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from cuneigh import _jit
from cuneigh._backends import naive
from cuneigh._backends.gemm import launch as _walk
from cuneigh._backends.gemm import plan as _gemm_plan
from cuneigh._backends.gemm.launch import (
    Matrix,
    Walk,
    lanes,
    move_source,
    row_source,
    softmax_source,
)
from cuneigh._backends.gemm.plan import GemmPlan
from cuneigh._device import Device
from cuneigh._gpu.announce import announce
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.program import Program
from cuneigh._gpu.views import Views, load_width, readable
from cuneigh._problem import DTYPES, Operands, Problem

NAME = "gemm"


def unsupported(problem: Problem, device: Device) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    reason = naive.unsupported(problem, device)
    if reason is not None or problem.is_empty:
        return reason
    limit = _gemm_plan.workspace_limit()
    plan = plan_of(problem, contiguous=True)
    if plan.chunk_bytes > limit:
        return (
            f"needs {plan.chunk_bytes} bytes of workspace for one tile, but may take {limit}; "
            "CUNEIGH_WORKSPACE_BYTES raises that"
        )
    return None


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call is expected to take, in milliseconds."""
    return plan_of(problem, contiguous=True).milliseconds


def plan_of(problem: Problem, contiguous: bool) -> GemmPlan:
    return _gemm_plan.make_plan(
        problem, _gemm_plan.workspace_limit(), _gemm_plan.allows_tf32(), contiguous
    )


def forward(problem: Problem, operands: Operands, output: Any, lse: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    walk = _walk_over(problem, program, *operands[:3], output)
    query = walk.queries(operands.query)
    key = walk.keys(operands.key, operands.additional_keys)
    value = walk.keys(operands.value, operands.additional_values)
    result = walk.queries(output)
    logits = walk.dense(problem.accumulator)
    weights = _in_place_of(logits, walk)
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
    weights, grad_logits = _in_place_of(logits, walk), _in_place_of(grad_weights, walk)
    sums = _HaloSums(walk, gradients)
    delta = program.allocate(lse.shape, problem.accumulator) if problem.rpb_dtype else None
    source = row_source(problem, walk.lanes, problem.rpb_dtype)
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
        sums.add_keys(chunk, grad_logits, query, problem.scale)
        sums.add_values(chunk, weights, grad_rows, 1 / weight_factor(problem))
    if problem.rpb_dtype:
        naive.rpb_gradient(problem, operands, grad_output, lse, delta, gradients.rpb, program)


def qk(problem: Problem, operands: Operands, logits: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    walk = _walk_over(problem, program, operands.query, operands.key)
    query = walk.queries(operands.query)
    key = walk.keys(operands.key, operands.additional_keys)
    products = walk.dense(problem.accumulator)
    source = row_source(problem, walk.lanes, problem.rpb_dtype, kHiddenIsZero=False)
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
    sums = _HaloSums(walk, gradients)
    source = row_source(problem, walk.lanes, None)
    views = Views(problem.rank)
    views.vectors(grad_logits)
    views.addresses(products.buffer)
    for chunk in walk.chunks():
        chunk.gather(query, key)
        chunk.row_kernel("gemm/spread", source, views)
        chunk.multiply(grad_query, products, key, factor=problem.scale)
        chunk.scatter(grad_query)
        sums.add_keys(chunk, products, query, problem.scale)
    if problem.rpb_dtype:
        naive.stored_rpb_gradient(problem, grad_logits, gradients.rpb, program)


def av(problem: Problem, weights: Any, operands: Operands, output: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    walk = _walk_over(problem, program, operands.value, output)
    value = walk.keys(operands.value, operands.additional_values)
    result = walk.queries(output)
    products = walk.dense(problem.dtype)
    source = row_source(problem, walk.lanes, None)
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
    sums = _HaloSums(walk, gradients)
    spread_source = row_source(problem, walk.lanes, None)
    select_source = row_source(problem, walk.lanes, None, kHiddenIsZero=True)
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
        sums.add_values(chunk, spread, grad_rows, 1.0)


class _HaloSums:
    """The gradients of keys and values, summed over the halos of all chunks."""

    def __init__(self, walk: Walk, gradients: Operands) -> None:
        self.gradients = gradients
        uses_key, uses_value = _gemm_plan.USES[walk.problem.operation]
        self.keys = walk.halo(walk.problem.head_dim) if uses_key else None
        self.values = walk.halo(walk.problem.value_dim) if uses_value else None
        self.partial: dict[Matrix, Any] = {}
        if walk.plan.sum_bytes:
            keys = math.prod(walk.problem.key_tokens) + (walk.problem.additional or 0)
            for halo in (self.keys, self.values):
                if halo is not None:
                    self.partial[halo] = walk.program.allocate((keys, halo.width), halo.dtype)

    def add_keys(
        self, chunk: _walk.Chunk, grad_logits: Matrix, query: Matrix, factor: float
    ) -> None:
        assert self.keys is not None
        chunk.multiply(self.keys, grad_logits, query, factor, transpose_left=True)
        chunk.sum_halos(
            self.keys,
            self.gradients.key,
            self.gradients.additional_keys,
            self.partial.get(self.keys),
        )

    def add_values(
        self, chunk: _walk.Chunk, weights: Matrix, grad_rows: Matrix, factor: float
    ) -> None:
        assert self.values is not None
        chunk.multiply(self.values, weights, grad_rows, factor, transpose_left=True)
        chunk.sum_halos(
            self.values,
            self.gradients.value,
            self.gradients.additional_values,
            self.partial.get(self.values),
        )


def weight_factor(problem: Problem) -> float:
    """What weights are multiplied by where they are stored; cuda/gemm/gemm.cuh says why."""
    return 32768.0 if problem.dtype == "float16" else 1.0


def _in_place_of(product: Matrix, walk: Walk) -> Matrix:
    """Where what becomes of a product is stored: in its place if numbers have the same size."""
    return product if product.dtype == walk.problem.dtype else walk.dense(walk.problem.dtype)


def _walk_over(problem: Problem, program: Program, *tokens: Array) -> Walk:
    """A walk over `problem`, which reads and writes `tokens`."""
    aligned = load_width(tokens) == 16
    plan = plan_of(problem, contiguous=aligned and _one_step(tokens))
    announce(NAME, problem.operation, problem, plan)
    return Walk(problem, plan, program)


def _one_step(tokens: tuple[Array, ...]) -> bool:
    """Whether the tokens of every array lie at one step without overlap, as cuBLAS asks of rows."""
    for array in tokens:
        steps, counts = array.byte_strides[1:-2], array.shape[1:-2]
        if steps[-1] < array.shape[-1] * array.itemsize:
            return False
        inner = zip(steps[1:], counts[1:], strict=True)
        if any(step != below * count for step, (below, count) in zip(steps, inner, strict=False)):
            return False
    return True


def kernels(problem: Problem) -> list[_jit.Kernel]:
    """The kernels that `problem` needs when its arrays are contiguous."""
    plan = plan_of(problem, contiguous=True)
    team = lanes(problem, plan)
    rows = row_source(problem, team, None)
    biased = row_source(problem, team, problem.rpb_dtype)
    uses_key, uses_value = _gemm_plan.USES[problem.operation]
    names: list[tuple[str, str]] = []
    match problem.operation:
        case "forward":
            names = [("gemm/softmax", softmax_source(problem, plan))]
        case "backward":
            names = [("gemm/gradient", biased)]
        case "qk":
            source = row_source(problem, team, problem.rpb_dtype, kHiddenIsZero=False)
            names = [("gemm/select", source)]
        case "qk_backward" | "av":
            names = [("gemm/spread", rows)]
        case "av_backward":
            source = row_source(problem, team, None, kHiddenIsZero=True)
            names = [("gemm/spread", rows), ("gemm/select", source)]
    size = DTYPES[problem.dtype]
    dims = [problem.head_dim] * uses_key + [problem.value_dim] * uses_value
    if plan.direct:
        names.append(("gemm/addresses", _walk.address_source(problem)))
    else:
        gathered, scattered = {
            "forward": ([problem.head_dim], [problem.value_dim]),
            "backward": (dims, [problem.head_dim]),
            "qk": (dims, []),
            "qk_backward": (dims, dims),
            "av": ([], dims),
            "av_backward": (dims, []),
        }[problem.operation]
        for keys, packed in ((True, dims), (False, gathered)):
            names += [
                ("gemm/pack", move_source(problem, _vector(dim, size), kKeys=keys))
                for dim in packed
            ]
        names += [("gemm/unpack", move_source(problem, _vector(dim, size))) for dim in scattered]
    if problem.operation.endswith("backward"):
        most = 16 // DTYPES[problem.accumulator]
        names += [
            ("gemm/halo_sum", move_source(problem, vector))
            for vector in {min(_vector(dim, size), most) for dim in dims}
        ]
    found = [_jit.Kernel(name, source) for name, source in dict.fromkeys(names)]
    if problem.rpb_dtype and problem.operation in ("backward", "qk_backward"):
        of_bias = naive.kernels(replace(problem, additional=None))
        found += [kernel for kernel in of_bias if kernel.name in NAIVE_KERNELS]
    return found


NAIVE_KERNELS = ("sums/rpb", "sums/shares")
"""Kernels of the naive backend that compute the gradient of rpb."""


def _vector(dim: int, size: int) -> int:
    """Elements of a contiguous row of `dim` that move together."""
    bits = 16 | dim * size
    return (bits & -bits) // size
