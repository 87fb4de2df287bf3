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
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from helpers.obvious import (
    gather,
    gradients_of,
    head_major,
    logits_of,
    obvious_backward,
    obvious_forward,
    one_by_one,
    token_major,
    worst,
)
from helpers.strategies import Inputs, numpy_dtype

from cuneigh import reference
from cuneigh._problem import Operands, Problem, Spec


@dataclass(frozen=True)
class Expected:
    """What a result must be, and by what its error is measured."""

    oracle: np.ndarray
    obvious: np.ndarray
    term_bound: float
    dtype: str


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


# What to expect


def expect(problem: Problem, inputs: Inputs) -> tuple[dict[str, Expected], float]:
    """Every result of the operation by name, and the largest logit that is exponentiated."""
    with np.errstate(all="ignore"):  # non-finite inputs are legal
        return EXPECT[problem.operation](problem, inputs)


def expect_forward(problem: Problem, inputs: Inputs) -> tuple[dict[str, Expected], float]:
    output, lse = reference.forward(problem, inputs.operands)
    outputs, lses = obvious_forward(problem, inputs.operands)
    exact = gather(problem, inputs.operands, "float64")
    results = {
        "output": Expected(output, worst(output, outputs), largest(exact.values), problem.dtype),
        "lse": Expected(lse, worst(lse, lses), 1.0, problem.accumulator),
    }
    return results, largest(logit_terms(problem, inputs.operands))


def expect_backward(problem: Problem, inputs: Inputs) -> tuple[dict[str, Expected], float]:
    operands = inputs.operands
    oracle = reference.backward(problem, operands, inputs.grad_output, inputs.grad_lse)
    output, lse = forward_results(problem, operands)
    ways = obvious_backward(problem, operands, inputs, output, lse)

    exact = gather(problem, operands, "float64")
    exact_lse = head_major(reference.forward(problem, operands)[1][..., None], "float64")
    weights = np.where(exact_lse == -np.inf, 0, np.exp(logits_of(exact) - exact_lse))
    sizes = gather(problem, magnitudes(operands), "float64")
    d_output = np.abs(head_major(inputs.grad_output, "float64"))
    d_weights = (d_output[..., None, :] * sizes.values).sum(-1)
    delta = (weights * d_weights).sum(-1, keepdims=True)
    if inputs.grad_lse is not None:
        delta = delta + np.abs(head_major(inputs.grad_lse[..., None], "float64"))
    terms = gradients_of(sizes, weights * (d_weights + delta), weights, d_output)
    max_logit = largest(logit_terms(problem, operands))
    return expect_gradients(problem, oracle, ways, terms), max_logit


def expect_qk(problem: Problem, inputs: Inputs) -> tuple[dict[str, Expected], float]:
    held = gather(problem, inputs.operands, problem.accumulator)
    terms = logit_terms(problem, inputs.operands)
    oracle = reference.qk(problem, inputs.operands)
    obvious = token_major(logits_of(held), problem.logits)
    return {"logits": Expected(oracle, obvious, largest(terms), problem.dtype)}, 0.0


def expect_qk_backward(problem: Problem, inputs: Inputs) -> tuple[dict[str, Expected], float]:
    oracle = reference.qk_backward(problem, inputs.operands, inputs.grad_logits)

    def gradients(operands: Operands, grad_logits: np.ndarray, dtype: str) -> Operands:
        held = gather(problem, operands, dtype)
        d_logits = np.where(held.slots.visible, head_major(grad_logits, dtype), 0)
        return gradients_of(held, d_logits.astype(dtype))

    obvious = gradients(inputs.operands, inputs.grad_logits, problem.accumulator)
    terms = gradients(magnitudes(inputs.operands), np.abs(inputs.grad_logits), "float64")
    return expect_gradients(problem, oracle, [obvious], terms), 0.0


def expect_av(problem: Problem, inputs: Inputs) -> tuple[dict[str, Expected], float]:
    def sums(operands: Operands, weights: np.ndarray, dtype: str) -> np.ndarray:
        held = gather(problem, operands, dtype)
        read = np.where(held.slots.visible, head_major(weights, dtype), 0).astype(dtype)
        return one_by_one(read[..., None] * held.values, -2)

    oracle = reference.av(problem, inputs.weights, inputs.operands)
    obvious = sums(inputs.operands, inputs.weights, problem.accumulator)
    terms = sums(magnitudes(inputs.operands), np.abs(inputs.weights), "float64")
    obvious = token_major(obvious, problem.output)
    return {"output": Expected(oracle, obvious, largest(terms), problem.dtype)}, 0.0


def expect_av_backward(problem: Problem, inputs: Inputs) -> tuple[dict[str, Expected], float]:
    def gradients(
        operands: Operands, weights: np.ndarray, grad_output: np.ndarray, dtype: str
    ) -> tuple[np.ndarray, Operands]:
        held = gather(problem, operands, dtype)
        d_output = head_major(grad_output, dtype)
        d_weights = one_by_one(d_output[..., None, :] * held.values, -1)
        read = np.where(held.slots.visible, head_major(weights, dtype), 0).astype(dtype)
        return d_weights, gradients_of(held, weights=read, d_output=d_output)

    oracle_weights, oracle = reference.av_backward(
        problem, inputs.weights, inputs.operands, inputs.grad_output
    )
    obvious_weights, obvious = gradients(
        inputs.operands, inputs.weights, inputs.grad_output, problem.accumulator
    )
    terms_of_weights, terms = gradients(
        magnitudes(inputs.operands),
        np.abs(inputs.weights),
        np.abs(inputs.grad_output),
        "float64",
    )
    results = expect_gradients(problem, oracle, [obvious], terms)
    results["grad weights"] = Expected(
        oracle_weights,
        token_major(obvious_weights, problem.logits),
        largest(terms_of_weights),
        problem.dtype,
    )
    return results, 0.0


EXPECT = {
    "forward": expect_forward,
    "backward": expect_backward,
    "qk": expect_qk,
    "qk_backward": expect_qk_backward,
    "av": expect_av,
    "av_backward": expect_av_backward,
}


def expect_gradients(
    problem: Problem, oracle: Operands, ways: list[Operands], terms: Operands
) -> dict[str, Expected]:
    def obvious(name: str, dtype: str) -> np.ndarray:
        rounded_ways = [getattr(way, name).astype(numpy_dtype(dtype)) for way in ways]
        return worst(getattr(oracle, name), rounded_ways)

    return {
        f"grad {name}": Expected(
            getattr(oracle, name),
            obvious(name, spec.dtype),
            largest(getattr(terms, name)),
            spec.dtype,
        )
        for name, spec in problem.specs._asdict().items()
        if spec is not None
    }


def forward_results(problem: Problem, operands: Operands) -> tuple[np.ndarray, np.ndarray]:
    """The output and lse that a perfect forward saves for its backward."""
    output, lse = reference.forward(problem, operands)
    return output.astype(numpy_dtype(problem.dtype)), lse.astype(problem.accumulator)


def logit_terms(problem: Problem, operands: Operands) -> np.ndarray:
    """The absolute sum of the terms of every logit: [batch, heads, queries, slots]."""
    sizes = gather(problem, magnitudes(operands), "float64")
    terms = abs(problem.scale) * (sizes.query[..., None, :] * sizes.keys).sum(-1)
    if sizes.bias is not None:
        terms = terms + np.where(np.isfinite(sizes.bias), sizes.bias, 0)
    return terms


def largest(array: np.ndarray) -> float:
    """The largest finite magnitude; 0 if there is none."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0.0))


def magnitudes(operands: Operands) -> Operands:
    return Operands(*(None if array is None else np.abs(array) for array in operands))


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
    gradients = Operands(*(None if spec is None else empty(spec) for spec in problem.specs))
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
