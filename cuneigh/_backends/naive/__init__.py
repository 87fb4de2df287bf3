"""The definition in CUDA: one group of lanes for each query or key, all parameters, all dtypes.

An honest baseline: coalesced and vectorized, deterministic, and nothing of the size of the logits
in memory unless the operation's own result is. Every kernel of `cuda/naive_*.cu` is launched here.
A non-finite value reaches only the queries whose window holds it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from cuneigh import _jit
from cuneigh._device import Device
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.program import Program
from cuneigh._gpu.rows import THREADS, RowPlan, box_of, predicted, row_plan
from cuneigh._gpu.views import AXIS, Views, axis_record, load_width, readable
from cuneigh._problem import Operands, Problem

NAME = "naive"


def unsupported(problem: Problem, device: Device) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    if device.kind != "cuda":
        return (
            "needs arrays on a CUDA device, but these are on the CPU; with an NVIDIA GPU, install "
            "'cuneigh[cuda12]' or 'cuneigh[cuda13]' and pass CuPy, PyTorch or JAX arrays that live "
            "on it"
        )
    return None


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call is expected to take on an H200, in milliseconds."""
    return predicted(problem)


def forward(problem: Problem, operands: Operands, output: Any, lse: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    plan = _attention_plan(problem, operands, values=(output,))
    views = Views(problem.rank)
    views.vectors(*operands[:3])
    views.additional(operands.additional_keys, operands.additional_values)
    views.bias(operands.rpb)
    views.vectors(output)
    views.scalars(lse)
    _launch(
        program,
        "naive/forward",
        plan.source(),
        _record(problem, plan, keys=False),
        views,
        _grid(problem, plan, keys=False, slices=_slices(problem.value_dim, plan.value_capacity)),
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
    plan = _attention_plan(
        problem,
        operands,
        keys=(gradients.query, gradients.key),
        values=(grad_output, output, gradients.value),
    )
    key_slices = _slices(problem.head_dim, plan.key_capacity)
    value_slices = _slices(problem.value_dim, plan.value_capacity)
    slices = max(key_slices, value_slices)
    delta = program.allocate(lse.shape, problem.accumulator)

    views = Views(problem.rank)
    views.vectors(*operands[:3])
    views.additional(operands.additional_keys, operands.additional_values)
    views.bias(operands.rpb)
    views.vectors(grad_output, output)
    views.scalars(lse, grad_lse, delta)
    views.vectors(gradients.query)
    _launch(
        program,
        "naive/backward_query",
        plan.source(),
        _record(problem, plan, keys=False),
        views,
        _grid(problem, plan, keys=False, slices=key_slices),
    )

    views = Views(problem.rank)
    views.vectors(*operands[:3])
    views.bias(operands.rpb)
    views.vectors(grad_output)
    views.scalars(lse, delta)
    views.vectors(gradients.key, gradients.value)
    _launch(
        program,
        "naive/backward_key",
        plan.source(),
        _record(problem, plan, keys=True),
        views,
        _grid(problem, plan, keys=True, slices=slices),
    )

    summed_gradients(problem, operands, grad_output, lse, delta, gradients, program)


def summed_gradients(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    lse: Any,
    delta: Any,
    gradients: Operands,
    program: Program,
) -> None:
    """The gradients that are sums over all queries: of the additional keys and values, and rpb."""
    if problem.additional:
        plan = _attention_plan(problem, operands, values=(grad_output,))
        rows = problem.batch * problem.additional * problem.kv_heads
        count = _shares(program, rows, math.prod(problem.tokens), plan)
        key_shares = program.allocate(
            (count, *gradients.additional_keys.shape), problem.accumulator
        )
        value_shares = program.allocate(
            (count, *gradients.additional_values.shape), problem.accumulator
        )
        views = Views(problem.rank)
        views.vectors(operands.query)
        views.additional(operands.additional_keys, operands.additional_values)
        views.vectors(grad_output)
        views.scalars(lse, delta)
        views.pointers(key_shares, value_shares)
        slices = max(
            _slices(problem.head_dim, plan.key_capacity),
            _slices(problem.value_dim, plan.value_capacity),
        )
        _launch(
            program,
            "sums/attention_additional",
            plan.source(),
            _record(problem, plan, keys=False),
            views,
            (rows * count, slices),
        )
        _sum(program, key_shares, gradients.additional_keys, problem)
        _sum(program, value_shares, gradients.additional_values, problem)

    if operands.rpb is not None:
        rpb_gradient(problem, operands, grad_output, lse, delta, gradients.rpb, program)


def launch_rows(program: Program, name: str, problem: Problem, plan: RowPlan, views: Views) -> None:
    """Launch a kernel that gives every query to a group of lanes."""
    record = _record(problem, plan, keys=False)
    _launch(program, name, plan.source(), record, views, _grid(problem, plan, keys=False))


def qk(problem: Problem, operands: Operands, logits: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    _multiply(program, problem, operands, logits, dim=problem.head_dim, scale=problem.scale)


def qk_backward(
    problem: Problem,
    operands: Operands,
    grad_logits: Any,
    gradients: Operands,
    program: Program,
) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    dim, scale = problem.head_dim, problem.scale
    _gather(
        program,
        problem,
        grad_logits,
        operands.key,
        operands.additional_keys,
        gradients.query,
        dim,
        scale,
    )
    _scatter(program, problem, grad_logits, operands.query, gradients.key, dim, scale)
    if problem.additional:
        _scatter_additional(
            program, problem, grad_logits, operands.query, gradients.additional_keys, dim, scale
        )
    if operands.rpb is not None:
        stored_rpb_gradient(problem, grad_logits, gradients.rpb, program)


def av(problem: Problem, weights: Any, operands: Operands, output: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    dim = problem.value_dim
    _gather(program, problem, weights, operands.value, operands.additional_values, output, dim, 1.0)


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
    products = Operands(
        query=grad_output, key=operands.value, additional_keys=operands.additional_values
    )
    _multiply(program, problem, products, grad_weights, dim=dim, scale=1.0, hidden_is_zero=True)
    _scatter(program, problem, weights, grad_output, gradients.value, dim, 1.0)
    if problem.additional:
        _scatter_additional(
            program, problem, weights, grad_output, gradients.additional_values, dim, 1.0
        )


def kernels(problem: Problem) -> list[_jit.Kernel]:
    """The kernels that `problem` needs when its arrays are contiguous."""
    rank, dtype = problem.rank, problem.dtype
    key, value = problem.head_dim, problem.value_dim
    plan = row_plan(rank, dtype, problem.rpb_dtype, key, value)
    sums = {problem.dtype} if problem.additional else set()
    names: list[tuple[str, str]] = []
    match problem.operation:
        case "forward":
            names = [("naive/forward", plan.source())]
        case "backward":
            names = [(f"naive/backward_{of}", plan.source()) for of in ("query", "key")]
            if problem.additional:
                names.append(("sums/attention_additional", plan.source()))
            if problem.rpb_dtype:
                names.append(("sums/rpb", plan.source(kStored=False)))
                sums.add(problem.rpb_dtype)
        case "qk":
            source = row_plan(rank, dtype, problem.rpb_dtype, key, 0).source(kHiddenIsZero=False)
            names = [("naive/qk", source)]
        case "qk_backward":
            source = row_plan(rank, dtype, None, 0, key).source()
            names = [("naive/av", source), ("naive/inverse", source)]
            if problem.additional:
                names.append(("sums/additional", source))
            if problem.rpb_dtype:
                source = row_plan(rank, dtype, None, 0, 0).source(kStored=True)
                names.append(("sums/rpb", source))
                sums.add(problem.rpb_dtype)
        case "av":
            names = [("naive/av", row_plan(rank, dtype, None, 0, value).source())]
        case "av_backward":
            source = row_plan(rank, dtype, None, value, 0).source(kHiddenIsZero=True)
            names = [("naive/qk", source)]
            source = row_plan(rank, dtype, None, 0, value).source()
            names.append(("naive/inverse", source))
            if problem.additional:
                names.append(("sums/additional", source))
    if problem.operation.endswith("backward"):
        names += [("sums/shares", _sum_source(problem.accumulator, result)) for result in sums]
    return [_jit.Kernel(name, source) for name, source in names]


# The three products of unfused neighborhood attention, and sums over all queries.


def _multiply(
    program: Program,
    problem: Problem,
    operands: Operands,
    logits: Any,
    dim: int,
    scale: float,
    hidden_is_zero: bool = False,
) -> None:
    """Pointwise-neighborhood: `logits` of every query with the keys of its window."""
    width = load_width((operands.query, operands.key, operands.additional_keys))
    bias = problem.rpb_dtype if operands.rpb is not None else None
    plan = row_plan(problem.rank, problem.dtype, bias, dim, 0, key_bytes=width)
    views = Views(problem.rank)
    views.vectors(operands.query, operands.key)
    views.additional(operands.additional_keys)
    views.bias(operands.rpb)
    views.vectors(logits)
    _launch(
        program,
        "naive/qk",
        plan.source(kHiddenIsZero=hidden_is_zero),
        _record(problem, plan, keys=False, head_dim=dim, scale=scale),
        views,
        _grid(problem, plan, keys=False),
    )


def _gather(
    program: Program,
    problem: Problem,
    weights: Any,
    value: Any,
    additional_values: Any,
    output: Any,
    dim: int,
    scale: float,
) -> None:
    """Neighborhood-neighborhood: `output` of every query from the values of its window."""
    plan = _value_plan(problem, dim, value, additional_values, output)
    views = Views(problem.rank)
    views.vectors(weights, value)
    views.additional(additional_values)
    views.vectors(output)
    _launch(
        program,
        "naive/av",
        plan.source(),
        _record(problem, plan, keys=False, value_dim=dim, scale=scale),
        views,
        _grid(problem, plan, keys=False, slices=_slices(dim, plan.value_capacity)),
    )


def _scatter(
    program: Program, problem: Problem, weights: Any, rows: Any, output: Any, dim: int, scale: float
) -> None:
    """Inverse-neighborhood: `output` of every key from the rows of the queries that see it."""
    plan = _value_plan(problem, dim, rows, output)
    views = Views(problem.rank)
    views.vectors(weights, rows, output)
    _launch(
        program,
        "naive/inverse",
        plan.source(),
        _record(problem, plan, keys=True, value_dim=dim, scale=scale),
        views,
        _grid(problem, plan, keys=True, slices=_slices(dim, plan.value_capacity)),
    )


def _scatter_additional(
    program: Program,
    problem: Problem,
    weights: Any,
    rows: Any,
    output: Any,
    dim: int,
    scale: float,
) -> None:
    """The same for the additional keys, which every query sees."""
    plan = _value_plan(problem, dim, rows)
    places = problem.batch * (problem.additional or 0) * problem.kv_heads
    count = _shares(program, places, math.prod(problem.tokens), plan)
    shares = program.allocate((count, *output.shape), problem.accumulator)
    views = Views(problem.rank)
    views.vectors(weights, rows)
    views.pointers(shares)
    _launch(
        program,
        "sums/additional",
        plan.source(),
        _record(problem, plan, keys=False, value_dim=dim, scale=scale),
        views,
        (places * count, _slices(dim, plan.value_capacity)),
    )
    _sum(program, shares, output, problem)


def rpb_gradient(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    lse: Any,
    delta: Any,
    gradient: Any,
    program: Program,
) -> None:
    """The gradient of the bias, from what a backward is given and delta."""
    plan = _attention_plan(problem, operands, values=(grad_output,))
    views = Views(problem.rank)
    views.vectors(*operands[:3])
    views.bias(operands.rpb)
    views.vectors(grad_output)
    views.scalars(lse, delta)
    views.vectors(None)
    _rpb_gradient(problem, plan, views, gradient, stored=False, program=program)


def stored_rpb_gradient(
    problem: Problem, grad_logits: Any, gradient: Any, program: Program
) -> None:
    """The gradient of the bias, from that of the logits."""
    plan = row_plan(problem.rank, problem.dtype, None, 0, 0)
    views = Views(problem.rank)
    views.vectors(*(None,) * 7, grad_logits)
    _rpb_gradient(problem, plan, views, gradient, stored=True, program=program)


def _rpb_gradient(
    problem: Problem,
    plan: RowPlan,
    views: Views,
    gradient: Any,
    stored: bool,
    program: Program,
) -> None:
    """The gradient of the bias, from the views up to the shares."""
    count = _shares(program, gradient.size, math.prod(problem.tokens), plan)
    shares = program.allocate((count, *gradient.shape), problem.accumulator)
    views.pointers(shares)
    _launch(
        program,
        "sums/rpb",
        plan.source(kStored=stored),
        _record(problem, plan, keys=False),
        views,
        (gradient.size * count, 1),
    )
    _sum(program, shares, gradient, problem)


def _sum(program: Program, shares: Array, result: Array, problem: Problem) -> None:
    """Add up the leading axis of `shares` into `result`."""
    program.launch(
        _jit.Kernel("sums/shares", _sum_source(problem.accumulator, result.dtype)),
        (math.ceil(result.size / THREADS), 1),
        THREADS,
        [shares.pointer],
        [shares.shape[0]],
        [result.size],
        [result.pointer],
    )


def _sum_source(number: str, result: str) -> str:
    return (
        f"static constexpr int kThreads = {THREADS};\n"
        f"using Number = {number};\nusing Result = {result};"
    )


def _shares(program: Program, rows: int, queries: int, plan: RowPlan) -> int:
    """Blocks that share the sum over all queries for one of `rows` results."""
    blocks = 8 * program.device.sm_count
    useful = math.ceil(queries / (4 * plan.groups))
    return max(1, min(math.ceil(blocks / rows), useful))


# From problems to what a kernel receives.


@lru_cache(maxsize=1024)
def _record(
    problem: Problem,
    plan: RowPlan,
    keys: bool,
    head_dim: int | None = None,
    value_dim: int | None = None,
    scale: float | None = None,
) -> np.ndarray[Any, Any]:
    """`Problem` of cuda/cuneigh/layout.cuh; the defaults are those of the problem itself."""
    rank = problem.rank
    record = np.zeros(
        1,
        np.dtype(
            [
                ("axes", AXIS, (rank,)),
                ("box", "i4", (rank,)),
                ("boxes", "i4", (rank,)),
                *((name, "i4") for name in ("batch", "heads", "group_size")),
                *((name, "i4") for name in ("head_dim", "value_dim", "additional")),
                ("scale", "f8"),
            ],
            align=True,
        ),
    )
    box = box_of(problem, keys, plan.groups)
    record["axes"] = [axis_record(axis) for axis in problem.axes]
    record["box"] = box
    record["boxes"] = _boxes(problem, keys, box)
    record["batch"], record["heads"] = problem.batch, problem.heads
    record["group_size"] = problem.group_size
    record["head_dim"] = problem.head_dim if head_dim is None else head_dim
    record["value_dim"] = problem.value_dim if value_dim is None else value_dim
    record["additional"] = problem.additional or 0
    record["scale"] = problem.scale if scale is None else scale
    return record


def _boxes(problem: Problem, keys: bool, box: tuple[int, ...]) -> tuple[int, ...]:
    counts = problem.key_tokens if keys else problem.tokens
    return tuple(math.ceil(count / size) for count, size in zip(counts, box, strict=True))


def _grid(problem: Problem, plan: RowPlan, keys: bool, slices: int = 1) -> tuple[int, int]:
    boxes = math.prod(_boxes(problem, keys, box_of(problem, keys, plan.groups)))
    return boxes * problem.batch * (problem.kv_heads if keys else problem.heads), slices


def _slices(dim: int, capacity: int) -> int:
    return math.ceil(dim / capacity)


def _launch(
    program: Program,
    name: str,
    source: str,
    record: np.ndarray[Any, Any],
    views: Views,
    grid: tuple[int, int],
) -> None:
    program.launch(_jit.Kernel(name, source), grid, THREADS, record, views.words)


def _attention_plan(
    problem: Problem, operands: Operands, keys: tuple[Any, ...] = (), values: tuple[Any, ...] = ()
) -> RowPlan:
    return row_plan(
        problem.rank,
        problem.dtype,
        problem.rpb_dtype,
        problem.head_dim,
        problem.value_dim,
        load_width((operands.query, operands.key, operands.additional_keys, *keys)),
        load_width((operands.value, operands.additional_values, *values)),
    )


def _value_plan(problem: Problem, dim: int, *arrays: Any) -> RowPlan:
    width = load_width(arrays)
    return row_plan(problem.rank, problem.dtype, None, 0, dim, value_bytes=width)
