"""What is done with the logits and weights of a tile: a vector for each key, of all queries."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba import types

from cuneigh._backends.cpu.attention import HIGHEST_SUM, LOWEST_SUM
from cuneigh._backends.cpu.compiled.intrinsics import each_key, step
from cuneigh._backends.cpu.compiled.vectors import INT64, Value, Vectors


class WeightSteps(NamedTuple):
    """The intrinsics for logits and weights: of ``counts``, a triple, keys and a tile of queries.

    `bounds` says which keys a query sees along the three axes: for each of them a vector of the
    first key of all queries, then one of the numbers of keys.
    """

    maximum: Any
    """``maximum(logits, counts, bounds, out)``: the largest that each query sees."""
    soften: Any
    """``soften(logits, counts, bounds, shifts, sums)``: exp(logit - shift) in their place, 0 for
    keys that a query does not see; the sum of each query."""
    differentiate: Any
    """``differentiate(weights, gradients, counts, bounds, deltas)``: the gradients of the weights
    become those of the logits, weight * (gradient - delta)."""
    need_no_maximum: Any
    """``need_no_maximum(sums)``: whether these sums of exponentials tell that of all queries."""
    read: Any
    """``read(numbers, i)``"""
    write: Any
    """``write(number, numbers, i)``"""


def steps_of_weights(bits: int, lanes: int) -> WeightSteps:
    number = {32: types.float32, 64: types.float64}[bits]

    def place(v: Vectors, key: Value) -> Value:
        return v.builder.mul(key, INT64(lanes))

    @step(bits, lanes, types.void)
    def maximum(v: Vectors, logits: Value, counts: Value, bounds: Value, out: Value) -> None:
        b, logits = v.builder, v.pointer(logits)
        largest = v.variable(-math.inf)
        with each_key(v, counts, bounds) as (key, _, _, mask):
            logit = b.select(mask, v.load(logits, place(v, key)), v.constant(-math.inf))
            b.store(v.larger(logit, b.load(largest)), largest)
        v.store(b.load(largest), v.pointer(out), 0)

    @step(bits, lanes, types.void)
    def soften(
        v: Vectors, logits: Value, counts: Value, bounds: Value, shifts: Value, sums: Value
    ) -> None:
        b, logits, shift = v.builder, v.pointer(logits), v.load(v.pointer(shifts), 0)
        total = v.variable(0.0)
        with each_key(v, counts, bounds) as (key, _, _, mask):
            weight = v.exponential(b.fsub(v.load(logits, place(v, key)), shift), mask)
            v.store(weight, logits, place(v, key))
            b.store(b.fadd(b.load(total), weight), total)
        v.store(b.load(total), v.pointer(sums), 0)

    @step(bits, lanes, types.void)
    def differentiate(
        v: Vectors, weights: Value, gradients: Value, counts: Value, bounds: Value, deltas: Value
    ) -> None:
        b, delta = v.builder, v.load(v.pointer(deltas), 0)
        weights, gradients = map(v.pointer, (weights, gradients))
        with each_key(v, counts, bounds) as (key, _, _, mask):
            shifted = b.fsub(v.load(gradients, place(v, key)), delta)
            product = b.fmul(v.load(weights, place(v, key)), shifted)
            v.store(b.select(mask, product, v.constant(0.0)), gradients, place(v, key))

    @step(bits, lanes, types.boolean)
    def need_no_maximum(v: Vectors, sums: Value) -> Value:
        b, vector = v.builder, v.load(v.pointer(sums), 0)
        above = b.fcmp_ordered(">=", vector, v.constant(LOWEST_SUM))
        below = b.fcmp_ordered("<=", vector, v.constant(HIGHEST_SUM))
        return v.is_true(b.and_(above, below))

    @step(bits, lanes, number)
    def read(v: Vectors, numbers: Value, i: Value) -> Value:
        return v.builder.load(v.element(v.pointer(numbers), i))

    @step(bits, lanes, types.void)
    def write(v: Vectors, number: Value, numbers: Value, i: Value) -> None:
        v.builder.store(number, v.element(v.pointer(numbers), i))

    return WeightSteps(maximum, soften, differentiate, need_no_maximum, read, write)
