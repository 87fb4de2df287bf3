"""The obvious computation in the precision under test, by which errors are measured.

Inputs as given, every sum taken in the accumulator's dtype (float32, or float64 for float64) one
term after another. In half precision a kernel that uses matrix units rounds what enters a product,
before or after it normalizes, and one without them does not. None of that is an error, and any of
it may cancel by luck in a small tensor, so each way is taken and the one that errs most counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from helpers.strategies import Inputs, numpy_dtype

from cuneigh._problem import Operands, Problem, Spec
from cuneigh.reference import Slots, window_slots

HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Gathered:
    """Operands as every query's slots hold them, zeros in hidden slots; None where absent."""

    problem: Problem
    slots: Slots
    dtype: str
    query: Any
    """[batch, heads, queries, dim]"""
    keys: Any
    """[batch, heads, queries, slots, dim]"""
    values: Any
    bias: Any
    """[heads, queries, slots]"""

    @property
    def visible(self) -> np.ndarray:
        """[batch, 1, queries, slots]"""
        return self.slots.visible[:, None]


def gather(problem: Problem, operands: Operands, dtype: str) -> Gathered:
    slots = window_slots(problem, operands)

    def flat(tokens: Any) -> Any:
        """[batch, heads, tokens, dim]"""
        tokens = np.asarray(tokens).astype(dtype)
        return np.moveaxis(tokens.reshape(len(tokens), -1, *tokens.shape[-2:]), 2, 1)

    def held(tokens: Any, additional: Any) -> Any:
        if tokens is None:
            return None
        rows = flat(tokens)
        if additional is not None:
            rows = np.concatenate([rows, flat(additional)], axis=2)
        rows = np.repeat(rows, problem.group_size, axis=1)
        hidden = ~slots.visible[:, None, ..., None]
        return np.where(hidden, np.zeros((), dtype), rows[:, :, slots.row])

    bias = None
    if operands.rpb is not None:
        rpb = operands.rpb.astype(dtype).reshape(problem.heads, -1)[:, slots.offset]
        bias = np.zeros((problem.heads, *slots.row.shape), dtype)
        bias[..., : problem.window_size] = rpb
    return Gathered(
        problem,
        slots,
        dtype,
        None if operands.query is None else flat(operands.query),
        held(operands.key, operands.additional_keys),
        held(operands.value, operands.additional_values),
        bias,
    )


def one_by_one(terms: np.ndarray, axis: int) -> np.ndarray:
    """Sum over an axis, rounded to the dtype of `terms` after every addition."""
    return np.add.accumulate(terms, axis=axis, dtype=terms.dtype).take(-1, axis=axis)


def logits_of(held: Gathered) -> np.ndarray:
    """[batch, heads, queries, slots]"""
    scale = held.query.dtype.type(held.problem.scale)
    logits = scale * one_by_one(held.query[..., None, :] * held.keys, -1)
    if held.bias is not None:
        logits = logits + held.bias
    return np.where(held.visible, logits, -np.inf).astype(logits.dtype)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` with the values that `dtype` has."""
    return array.astype(numpy_dtype(dtype)).astype(array.dtype)


def token_major(array: np.ndarray, spec: Spec) -> np.ndarray:
    """[batch, heads, queries, ..] rounded to the dtype of `spec`, in its shape."""
    return np.moveaxis(array, 1, 2).reshape(spec.shape).astype(numpy_dtype(spec.dtype))


def head_major(array: np.ndarray, dtype: str) -> np.ndarray:
    """[batch, X1..Xr, heads, dim] as [batch, heads, queries, dim]."""
    return np.moveaxis(array.reshape(len(array), -1, *array.shape[-2:]), 2, 1).astype(dtype)


def worst(oracle: np.ndarray, ways: list[np.ndarray]) -> np.ndarray:
    """The one of several results that is farthest from `oracle` where that is finite."""
    finite = np.isfinite(oracle)

    def error(way: np.ndarray) -> float:
        return np.abs(way[finite].astype(np.float64) - oracle[finite]).max(initial=0.0)

    return max(ways, key=error)


def obvious_forward(
    problem: Problem, operands: Operands
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every way to compute output, and the one to compute lse."""
    held = gather(problem, operands, problem.accumulator)
    logits = logits_of(held)
    top = logits.max(-1, keepdims=True)
    alive = top != -np.inf
    exponentials = np.exp(logits - np.where(alive, top, 0))
    total = one_by_one(exponentials, -1)[..., None]
    lse = np.where(alive, np.where(alive, top, 0) + np.log(total), -np.inf)

    divisor = np.where(alive, total, 1)
    ways = [(exponentials, divisor)]
    if problem.dtype in HALVES:
        ways.append((rounded(exponentials, problem.dtype), divisor))
        ways.append((rounded(exponentials / divisor, problem.dtype), np.ones_like(divisor)))
    outputs = []
    for weights, divisor in ways:
        sums = one_by_one(weights[..., None] * held.values, -2)
        outputs.append(token_major(np.where(alive, sums / divisor, 0), problem.output))
    return outputs, [token_major(lse[..., 0], problem.lse)]


def obvious_backward(
    problem: Problem, operands: Operands, inputs: Inputs, output: np.ndarray, lse: np.ndarray
) -> list[Operands]:
    """Every way to compute the gradients from the output and lse of a forward."""
    accumulator = problem.accumulator
    held = gather(problem, operands, accumulator)
    lse = head_major(lse[..., None], accumulator)
    alive = lse != -np.inf
    weights = np.where(alive, np.exp(logits_of(held) - np.where(alive, lse, 0)), 0)
    weights = weights.astype(accumulator)
    d_output = head_major(inputs.grad_output, accumulator)
    delta = one_by_one(d_output * head_major(output, accumulator), -1)[..., None]
    if inputs.grad_lse is not None:
        delta = delta - head_major(inputs.grad_lse[..., None], accumulator)
    d_weights = one_by_one(d_output[..., None, :] * held.values, -1)
    d_logits = np.where(held.visible & alive, weights * (d_weights - delta), 0)
    d_logits = d_logits.astype(accumulator)

    ways = [gradients_of(held, d_logits, weights, d_output)]
    if problem.dtype in HALVES:
        halves = rounded(d_logits, problem.dtype), rounded(weights, problem.dtype)
        ways.append(gradients_of(held, *halves, d_output))
    return ways


def obvious_jvp(
    problem: Problem, operands: Operands, tangents: Operands
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every way to compute the tangents of output and lse."""
    accumulator = problem.accumulator
    held, moved = (gather(problem, of, accumulator) for of in (operands, tangents))
    logits = logits_of(held)
    top = logits.max(-1, keepdims=True)
    alive = top != -np.inf
    exponentials = np.exp(logits - np.where(alive, top, 0))
    total = np.where(alive, one_by_one(exponentials, -1)[..., None], 1).astype(accumulator)
    scale = logits.dtype.type(problem.scale)
    d_logits = scale * (
        one_by_one(moved.query[..., None, :] * held.keys, -1)
        + one_by_one(held.query[..., None, :] * moved.keys, -1)
    )
    if moved.bias is not None:
        d_logits = d_logits + moved.bias
    d_logits = np.where(exponentials == 0, 0, d_logits).astype(accumulator)

    # Whether weights are normalized before they are rounded, and whether dlse is subtracted before.
    roundings = [lambda array: array]
    if problem.dtype in HALVES:
        roundings.append(lambda array: rounded(array, problem.dtype))
    tangent_lses, outputs = [], []
    for keep in roundings:
        for divisor in (total, np.ones_like(total)):
            weights = exponentials / (total / divisor)
            kept, normalizer = keep(weights), np.asarray(1 / divisor, accumulator)
            growing = kept * d_logits
            d_lse = one_by_one(growing, -1)[..., None] * normalizer
            tangent_lses.append(token_major(d_lse[..., 0], problem.lse))
            of_values = one_by_one(kept[..., None] * moved.values, -2)
            early = one_by_one(keep(weights * (d_logits - d_lse))[..., None] * held.values, -2)
            late = one_by_one(keep(weights * d_logits)[..., None] * held.values, -2)
            output = one_by_one(kept[..., None] * held.values, -2)
            outputs.append(token_major((early + of_values) * normalizer, problem.output))
            outputs.append(
                token_major((late + of_values - d_lse * output) * normalizer, problem.output)
            )
    return outputs, tangent_lses


def obvious_hvp(
    problem: Problem, operands: Operands, inputs: Inputs, output: np.ndarray, lse: np.ndarray
) -> list[Operands]:
    """Every way to compute the tangents of the gradients."""
    accumulator = problem.accumulator
    held, moved = (gather(problem, of, accumulator) for of in (operands, inputs.tangents))

    def given(array: Any, shape: tuple[int, ...]) -> np.ndarray:
        array = np.zeros(shape) if array is None else array
        return head_major(array.reshape(*problem.lse.shape, -1), accumulator)

    shapes = problem.output.shape, problem.lse.shape
    d_output, d_lse = map(given, (inputs.grad_output, inputs.grad_lse), shapes)
    d_output_moved, d_lse_moved = map(given, inputs.tangents_incoming, shapes)
    output, lse = given(output, shapes[0]), given(lse, shapes[1])
    outputs_moved, (lse_moved, *_) = obvious_jvp(problem, operands, inputs.tangents)
    lse_moved = given(lse_moved, shapes[1])

    alive = lse != -np.inf
    weights = np.where(alive, np.exp(logits_of(held) - np.where(alive, lse, 0)), 0)
    weights = weights.astype(accumulator)
    scale = weights.dtype.type(problem.scale)
    logits_moved = scale * (
        one_by_one(moved.query[..., None, :] * held.keys, -1)
        + one_by_one(held.query[..., None, :] * moved.keys, -1)
    )
    if moved.bias is not None:
        logits_moved = logits_moved + moved.bias
    logits_moved = np.where(weights == 0, 0, logits_moved).astype(accumulator)
    weights_moved = weights * (logits_moved - lse_moved)
    delta = one_by_one(d_output * output, -1)[..., None] - d_lse
    d_weights = one_by_one(d_output[..., None, :] * held.values, -1) - delta
    ways = []
    for output_moved in outputs_moved:
        delta_moved = one_by_one(d_output * given(output_moved, shapes[0]), -1)[..., None]
        delta_moved = delta_moved + one_by_one(d_output_moved * output, -1)[..., None] - d_lse_moved
        d_weights_moved = one_by_one(d_output_moved[..., None, :] * held.values, -1)
        d_weights_moved = d_weights_moved + one_by_one(d_output[..., None, :] * moved.values, -1)
        d_weights_moved = d_weights_moved - delta_moved
        d_logits = weights * d_weights
        d_logits_moved = weights_moved * d_weights + weights * d_weights_moved
        factors = [
            np.where(held.visible & alive, each, 0).astype(accumulator)
            for each in (d_logits_moved, d_logits, weights_moved, weights)
        ]
        kept = [factors]
        if problem.dtype in HALVES:
            kept.append([rounded(each, problem.dtype) for each in factors])
        for of_logits_moved, of_logits, of_moved, of_weights in kept:
            ways.append(
                added(
                    gradients_of(held, of_logits_moved, of_moved, d_output),
                    gradients_of(moved, of_logits, of_weights, d_output_moved)._replace(rpb=None),
                )
            )
    return ways


def added(a: Operands, b: Operands) -> Operands:
    """The sums of what both have; what one has as it is."""
    return Operands(*(x if y is None else x + y for x, y in zip(a, b, strict=True)))


def gradients_of(
    held: Gathered,
    d_logits: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    d_output: np.ndarray | None = None,
) -> Operands:
    """Gradients of the operands in the dtype of `held`, every sum taken one by one."""
    problem = held.problem
    result = Operands(
        *(
            None if spec is None else np.zeros(spec.shape, held.dtype)
            for spec in problem.gradient_specs
        )
    )
    if d_logits is not None:
        scale = d_logits.dtype.type(problem.scale)
        d_query = scale * one_by_one(d_logits[..., None] * held.keys, -2)
        d_keys = d_logits[..., None] * held.query[..., None, :]
        result.query[...] = np.moveaxis(d_query, 1, 2).reshape(result.query.shape)
        scatter(held, d_keys, result.key, result.additional_keys)
        for array in (result.key, result.additional_keys):
            if array is not None:
                array *= scale
        if result.rpb is not None:
            flat = result.rpb.reshape(problem.heads, -1)
            for h in range(problem.heads):
                for b in range(problem.batch):
                    np.add.at(flat[h], held.slots.offset, d_logits[b, h, :, : problem.window_size])
    if weights is not None:
        terms = weights[..., None] * d_output[..., None, :]
        scatter(held, terms, result.value, result.additional_values)
    return result


def scatter(held: Gathered, terms: np.ndarray, tokens: np.ndarray, additional: Any) -> None:
    """Add [batch, heads, queries, slots, dim] to the rows whose slots these are, one by one."""
    problem = held.problem
    rows = tokens.reshape(len(tokens), -1, *tokens.shape[-2:])
    count = rows.shape[1]
    for b in range(problem.batch):
        window = held.slots.visible[b] & (held.slots.row < count)
        extra = held.slots.visible[b] & (held.slots.row >= count)
        for h in range(problem.heads):
            kv = h // problem.group_size
            np.add.at(rows[b, :, kv], held.slots.row[window], terms[b, h][window])
            if additional is not None:
                np.add.at(additional[b, :, kv], held.slots.row[extra] - count, terms[b, h][extra])
