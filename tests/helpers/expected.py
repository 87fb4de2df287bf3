"""What every operation must give: the float64 oracle, and by what errors are measured.

For each result of an operation `expect` computes the oracle, the obvious computation in the
precision under test (`obvious`), and the largest absolute sum of the terms of one element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from helpers.obvious import (
    added,
    gather,
    gradients_of,
    head_major,
    logits_of,
    obvious_backward,
    obvious_forward,
    obvious_hvp,
    obvious_jvp,
    one_by_one,
    token_major,
    worst,
)
from helpers.strategies import Inputs, numpy_dtype

from cuneigh import reference
from cuneigh._problem import OfResults, Operands, Problem


@dataclass(frozen=True)
class Expected:
    """What a result must be, and by what its error is measured."""

    oracle: np.ndarray
    obvious: np.ndarray
    term_bound: float
    dtype: str


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


def expect_jvp(problem: Problem, inputs: Inputs) -> tuple[dict[str, Expected], float]:
    operands = inputs.operands
    tangents = inputs.tangents._replace(key_mask=operands.key_mask)
    results, max_logit = expect_forward(problem, inputs)
    oracle = reference.jvp(problem, operands, tangents)
    ways, tangent_lses = obvious_jvp(problem, operands, tangents)

    exact = gather(problem, operands, "float64")
    exact_lse = head_major(reference.forward(problem, operands)[1][..., None], "float64")
    weights = np.where(exact_lse == -np.inf, 0, np.exp(logits_of(exact) - exact_lse))
    sizes, moved = (gather(problem, magnitudes(of), "float64") for of in (operands, tangents))
    d_logits = abs(problem.scale) * (
        (moved.query[..., None, :] * sizes.keys).sum(-1)
        + (sizes.query[..., None, :] * moved.keys).sum(-1)
    )
    if moved.bias is not None:
        d_logits = d_logits + moved.bias
    d_lse = (weights * d_logits).sum(-1, keepdims=True)
    d_weights = weights * (d_logits + d_lse)
    terms = d_weights[..., None] * sizes.values + weights[..., None] * moved.values
    results["tangent_output"] = Expected(
        oracle.tangent_output,
        worst(oracle.tangent_output, ways),
        largest(terms.sum(-2)),
        problem.dtype,
    )
    results["tangent_lse"] = Expected(
        oracle.tangent_lse,
        worst(oracle.tangent_lse, tangent_lses),
        largest(d_lse),
        problem.accumulator,
    )
    return results, max_logit


def expect_hvp(problem: Problem, inputs: Inputs) -> tuple[dict[str, Expected], float]:
    operands = inputs.operands
    tangents = inputs.tangents._replace(key_mask=operands.key_mask)
    inputs = inputs._replace(tangents=tangents)
    incoming = OfResults(inputs.grad_output, inputs.grad_lse)
    results, max_logit = expect_jvp(problem, inputs)
    oracle, _ = reference.hvp(problem, operands, incoming, tangents, inputs.tangents_incoming)
    output, lse = forward_results(problem, operands)
    ways = obvious_hvp(problem, operands, inputs, output, lse)

    exact = gather(problem, operands, "float64")
    exact_lse = head_major(reference.forward(problem, operands)[1][..., None], "float64")
    weights = np.where(exact_lse == -np.inf, 0, np.exp(logits_of(exact) - exact_lse))
    sizes, moved = (gather(problem, magnitudes(of), "float64") for of in (operands, tangents))

    def given(array: Any, shape: tuple[int, ...]) -> np.ndarray:
        array = np.zeros(shape) if array is None else np.abs(array)
        return head_major(array.reshape(*problem.lse.shape, -1), "float64")

    def delta_of(d_weights: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return (weights * d_weights).sum(-1, keepdims=True)

    shapes = problem.output.shape, problem.lse.shape
    d_output, d_lse = map(given, incoming, shapes)
    d_output_moved, d_lse_moved = map(given, inputs.tangents_incoming, shapes)
    d_logits_moved = abs(problem.scale) * (
        (moved.query[..., None, :] * sizes.keys).sum(-1)
        + (sizes.query[..., None, :] * moved.keys).sum(-1)
    )
    if moved.bias is not None:
        d_logits_moved = d_logits_moved + moved.bias
    weights_moved = weights * (d_logits_moved + delta_of(d_logits_moved, weights))
    d_weights = (d_output[..., None, :] * sizes.values).sum(-1)
    d_weights_moved = (d_output_moved[..., None, :] * sizes.values).sum(-1)
    d_weights_moved = d_weights_moved + (d_output[..., None, :] * moved.values).sum(-1)
    delta = delta_of(d_weights, weights) + d_lse
    delta_moved = delta_of(d_weights_moved, weights) + delta_of(d_weights, weights_moved)
    of_logits = weights * (d_weights + delta)
    of_logits_moved = weights_moved * (d_weights + delta)
    of_logits_moved += weights * (d_weights_moved + delta_moved + d_lse_moved)
    terms = added(
        gradients_of(sizes, of_logits_moved, weights_moved, d_output),
        gradients_of(moved, of_logits, weights, d_output_moved)._replace(rpb=None),
    )
    made = expect_gradients(problem, oracle, ways, terms)
    return made | {name: results[name] for name in ("tangent_output", "tangent_lse")}, max_logit


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
        d_logits = np.where(held.visible, head_major(grad_logits, dtype), 0)
        return gradients_of(held, d_logits.astype(dtype))

    obvious = gradients(inputs.operands, inputs.grad_logits, problem.accumulator)
    terms = gradients(magnitudes(inputs.operands), np.abs(inputs.grad_logits), "float64")
    return expect_gradients(problem, oracle, [obvious], terms), 0.0


def expect_av(problem: Problem, inputs: Inputs) -> tuple[dict[str, Expected], float]:
    def sums(operands: Operands, weights: np.ndarray, dtype: str) -> np.ndarray:
        held = gather(problem, operands, dtype)
        read = np.where(held.visible, head_major(weights, dtype), 0).astype(dtype)
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
        read = np.where(held.visible, head_major(weights, dtype), 0).astype(dtype)
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
    "jvp": expect_jvp,
    "hvp": expect_hvp,
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
        for name, spec in problem.gradient_specs._asdict().items()
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
    return Operands(*(None if a is None else a if a.dtype == bool else np.abs(a) for a in operands))
