"""How near a backend must come to the float64 oracle, and the one check that all backends share.

No tolerance is chosen by hand. The oracle says what is right, the obvious computation in the
precision under test says what that precision can do, and a backend may err

    2 max|obvious - oracle| + 2 eps max|v| (1 + max|logit|) + 1 ulp of max|oracle|

over a whole tensor. `eps` is that of the accumulator, the ulp that of the result's dtype. For a
gradient, and for the unfused operations, the largest absolute sum of the terms of one element takes
the place of max|v|; lse is a sum of weights, so that 1 takes its place there. The unfused
operations take no exponentials, so they have no factor for logits. A logit is a sum itself and its
rounding is in proportion to its terms, so that |logit| too is measured by their absolute sum: with
what is left when they cancel, two orders of summation of the obvious computation differed by more
than the tolerance in 2 of 11,000 examples.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from helpers.expected import expect, forward_results
from helpers.strategies import Inputs, numpy_dtype

from cuneigh._problem import JvpResults, OfResults, Operands, Problem, Spec


def assert_close(
    name: str,
    got: np.ndarray,
    oracle: np.ndarray,
    obvious: np.ndarray,
    term_bound: float,
    dtype: str,
    max_logit: float,
    accumulator: str | None = None,
    context: object = "",
) -> None:
    """Raise AssertionError unless `got` is as near to `oracle` as this module's docstring asks.

    `obvious` is the plain computation in `dtype`, `accumulator` the dtype that sums are taken in
    (float64 for float64, float32 for all others). Where the oracle is -inf the result must be too,
    where it is NaN or inf the result must not be finite. `context` is printed on failure.
    """
    assert got.shape == oracle.shape, f"{name}: shape {got.shape}, not {oracle.shape}; {context}"
    assert got.dtype == numpy_dtype(dtype), f"{name}: dtype {got.dtype}, not {dtype}; {context}"
    if accumulator is None:
        accumulator = "float64" if dtype == "float64" else "float32"
    got, obvious = got.astype(np.float64), obvious.astype(np.float64)
    finite = np.isfinite(oracle)
    assert np.isfinite(obvious[finite]).all(), f"{name}: inputs overflow {dtype}; {context}"
    wrong = np.where(
        finite, ~np.isfinite(got), np.where(oracle == -np.inf, got != -np.inf, np.isfinite(got))
    )
    if wrong.any():
        where = tuple(map(int, np.argwhere(wrong)[0]))
        raise AssertionError(
            f"{name}{list(where)} is {got[where]}, not {oracle[where]} "
            f"({wrong.sum()} of {wrong.size} elements are wrongly finite or not)\n{context}"
        )
    if not finite.any():
        return
    errors = np.abs(np.subtract(got, oracle, where=finite, out=np.zeros(oracle.shape)))
    obvious_error = np.abs(obvious[finite] - oracle[finite]).max()
    rounding = 2 * np.finfo(accumulator).eps * term_bound * (1 + max_logit)
    last_place = ulp(np.abs(oracle[finite]).max(), dtype)
    allowed = 2 * obvious_error + rounding + last_place
    if errors.max() > allowed:
        where = tuple(map(int, np.unravel_index(errors.argmax(), errors.shape)))
        raise AssertionError(
            f"{name}{list(where)} is {got[where]!r}, not {oracle[where]!r}: it errs "
            f"{errors.max():.3g}, which exceeds {allowed:.3g} = twice the obvious computation's "
            f"{obvious_error:.3g} + {rounding:.3g} (terms of up to {term_bound:.3g}, logits of up "
            f"to {max_logit:.3g}) + 1 ulp {last_place:.3g}\n{context}"
        )


def ulp(magnitude: float, dtype: str) -> float:
    """Distance of two neighboring numbers of `dtype` at `magnitude`."""
    info = ml_dtypes.finfo(numpy_dtype(dtype))
    smallest = float(info.smallest_subnormal)
    if magnitude == 0:
        return smallest
    return max(2.0 ** np.floor(np.log2(magnitude)) * float(info.eps), smallest)


# Running a backend


def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array whose every element must be overwritten before it is read."""
    return np.full(shape, np.nan if dtype in FLOATS else 0x55, numpy_dtype(dtype))


FLOATS = ("float16", "bfloat16", "float32", "float64")


def identity(array: Any) -> Any:
    return array


def run_backend(
    backend: ModuleType,
    problem: Problem,
    inputs: Inputs,
    *,
    to_native: Callable[[np.ndarray], Any] = identity,
    to_numpy: Callable[[Any], np.ndarray] = identity,
    allocate: Callable[[tuple[int, ...], str], Any] = poisoned,
    adapt: Callable[[ModuleType], Any] = identity,
) -> dict[str, np.ndarray]:
    """The results of the operation of `problem`, by name, into outputs filled with NaN first.

    `to_native` brings an array to the backend's device and should keep its strides. Inputs must
    come back as they were. `adapt` makes one that fills such arrays of the backend.
    """
    backend = adapt(backend)
    originals: list[tuple[Any, np.ndarray]] = []

    def native(array: np.ndarray | None) -> Any:
        if array is None:
            return None
        there = to_native(array)
        originals.append((there, array.copy()))
        return there

    def empty(spec: Spec) -> Any:
        return to_native(poisoned(spec.shape, spec.dtype))

    operands = Operands(*(native(array) for array in inputs.operands))
    gradients = Operands(
        *(None if spec is None else empty(spec) for spec in problem.gradient_specs)
    )
    match problem.operation:
        case "forward":
            results = {"output": empty(problem.output)}
            lse = empty(problem.lse) if inputs.wants_lse else None
            if inputs.wants_lse:
                results["lse"] = lse
            backend.forward(problem, operands, results["output"], lse, allocate)
        case "backward":
            output, lse = map(native, forward_results(problem, inputs.operands))
            grad_output, grad_lse = native(inputs.grad_output), native(inputs.grad_lse)
            backend.backward(
                problem, operands, grad_output, output, lse, grad_lse, gradients, allocate
            )
            results = named(gradients)
        case "jvp":
            tangents = Operands(*(native(array) for array in inputs.tangents))
            made = JvpResults(*map(empty, problem.results))
            backend.jvp(problem, operands, tangents, made, allocate)
            results = made._asdict()
        case "hvp":
            made = OfResults(empty(problem.output), empty(problem.lse))
            backend.hvp(
                problem,
                operands,
                OfResults(*map(native, forward_results(problem, inputs.operands))),
                OfResults(native(inputs.grad_output), native(inputs.grad_lse)),
                Operands(*map(native, inputs.tangents)),
                OfResults(*map(native, inputs.tangents_incoming)),
                gradients,
                made,
                allocate,
            )
            results = named(gradients)
            results |= {"tangent_output": made.output, "tangent_lse": made.lse}
        case "qk":
            results = {"logits": empty(problem.logits)}
            backend.qk(problem, operands, results["logits"], allocate)
        case "qk_backward":
            backend.qk_backward(problem, operands, native(inputs.grad_logits), gradients, allocate)
            results = named(gradients)
        case "av":
            results = {"output": empty(problem.output)}
            weights = native(inputs.weights)
            backend.av(problem, weights, operands, results["output"], allocate)
        case "av_backward":
            weights, grad_output = native(inputs.weights), native(inputs.grad_output)
            grad_weights = empty(problem.logits)
            backend.av_backward(
                problem, weights, operands, grad_output, grad_weights, gradients, allocate
            )
            results = named(gradients) | {"grad weights": grad_weights}
    for there, original in originals:
        unchanged = to_numpy(there).tobytes() == original.tobytes()  # NaN included
        assert unchanged, f"{backend.NAME} wrote to an input of {problem}"
    return {name: to_numpy(array) for name, array in results.items()}


def named(gradients: Operands) -> dict[str, Any]:
    return {
        f"grad {name}": array for name, array in gradients._asdict().items() if array is not None
    }


def check_backend(backend: ModuleType, problem: Problem, inputs: Inputs, **native: Any) -> None:
    """Run the operation of `problem` and compare every result with the oracle.

    `native` are the keyword arguments of `run_backend`.
    """
    got = run_backend(backend, problem, inputs, **native)
    expected, max_logit = expect(problem, inputs)
    for name, array in got.items():
        result = expected[name]
        assert_close(
            f"{backend.NAME}: {name}",
            array,
            result.oracle,
            result.obvious,
            result.term_bound,
            result.dtype,
            max_logit,
            accumulator=problem.accumulator,
            context=problem,
        )
