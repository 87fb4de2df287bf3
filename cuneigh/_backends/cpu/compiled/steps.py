"""What the loops of `kernels` are made of: one query with the keys of its window at a time.

Every step is an intrinsic of Numba's, in vector instructions (`vectors`). Rows of numbers are given
by their addresses, integers, so that Numba compiles for one kind of arguments only. A window is a
list of places: where the row of each key begins, in numbers after that of the first key.
Lists are as long as whole vectors, and so are the weights: one for each place.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types
from numba.extending import intrinsic

from cuneigh._backends.cpu.compiled.vectors import INT64, Value, Vectors


class Steps(NamedTuple):
    """The intrinsics for rows of one size."""

    dots: Any
    """``dots(row, rows, places, j, factor, out)``: for a vector of i, factor * the product of `row`
    and the row at places[j + i], to out[j + i]."""
    weighted: Any
    """``weighted(weights, rows, places, n, factor, out)``: factor * the sum of the rows."""
    spread: Any
    """``spread(weights, row, rows, places, n)``: add weights[i] * row to every row."""
    dot: Any
    """``dot(a, b)``: the product of two rows."""
    sum: Any
    """``sum(row)``"""
    copy: Any
    """``copy(row, out)``: copy a row, and add zeros up to a whole vector."""
    add: Any
    """``add(row, out)``: add to a row."""


def steps_of_rows(dim: int, bits: int, lanes: int) -> Steps:
    """The steps that have to do with rows of `dim` numbers."""
    number = {32: types.float32, 64: types.float64}[bits]

    def step(returns: Any) -> Callable[[Callable[..., Any]], Any]:
        return _intrinsic(bits, lanes, returns)

    @step(types.void)
    def dots(
        v: Vectors, row: Value, rows: Value, places: Value, j: Value, factor: Value, out: Value
    ) -> None:
        b = v.builder
        row, rows, out = map(v.pointer, (row, rows, out))
        parts = [(start, v.load(row, start, size)) for start, size in v.parts(dim)]

        def products(i: int) -> Value:
            of_key = v.element(rows, _place(v, places, b.add(j, INT64(i))))
            total = None
            for start, part in parts:
                total = v.plus_product(total, part, v.load(of_key, start))
            return total

        v.store(b.fmul(v.sums(products), v.splat(factor)), out, j)

    @step(types.void)
    def weighted(
        v: Vectors, weights: Value, rows: Value, places: Value, n: Value, factor: Value, out: Value
    ) -> None:
        b, parts = v.builder, v.parts(dim)
        weights, rows, out = map(v.pointer, (weights, rows, out))
        # An addition takes four cycles, in each of which two may begin.
        sets = max(8 >> (len(parts) - 1).bit_length(), 1)
        totals = [[v.variable(0.0) for _ in parts] for _ in range(sets)]

        def add(j: Value, of_set: list[Value]) -> None:
            of_key = v.element(rows, _place(v, places, j))
            weight = v.splat(b.load(v.element(weights, j)))
            for (start, _), total in zip(parts, of_set, strict=True):
                b.store(v.plus_product(b.load(total), weight, v.load(of_key, start)), total)

        whole = b.and_(n, INT64(-sets))
        with v.steps(INT64(0), whole, sets) as j:
            for i, of_set in enumerate(totals):
                add(b.add(j, INT64(i)), of_set)
        if sets > 1:
            with v.steps(whole, n, 1) as j:
                add(j, totals[0])
        for i, (start, size) in enumerate(parts):
            sums = [b.load(of_set[i]) for of_set in totals]
            while len(sums) > 1:
                sums = [b.fadd(x, y) for x, y in zip(sums[::2], sums[1::2], strict=True)]
            v.store(b.fmul(sums[0], v.splat(factor)), out, INT64(start), size)

    @step(types.void)
    def spread(
        v: Vectors, weights: Value, row: Value, rows: Value, places: Value, n: Value
    ) -> None:
        b = v.builder
        weights, row, rows = map(v.pointer, (weights, row, rows))
        parts = [(INT64(start), v.load(row, start, size)) for start, size in v.parts(dim)]
        with v.steps(INT64(0), n, 1) as j:
            of_key = v.element(rows, _place(v, places, j))
            weight = v.splat(b.load(v.element(weights, j)))
            for start, part in parts:
                v.store(v.plus_product(v.load(of_key, start), weight, part), of_key, start)

    @step(number)
    def dot(v: Vectors, a: Value, b: Value) -> Value:
        a, b = map(v.pointer, (a, b))
        total = None
        for start, size in v.parts(dim):
            total = v.plus_product(total, v.load(a, start, size), v.load(b, start, size))
        return v.sum(total)

    @step(number)
    def sum(v: Vectors, row: Value) -> Value:
        row, total = v.pointer(row), v.constant(0.0)
        for start, size in v.parts(dim):
            total = v.builder.fadd(total, v.load(row, start, size))
        return v.sum(total)

    @step(types.void)
    def copy(v: Vectors, row: Value, out: Value) -> None:
        row, out = map(v.pointer, (row, out))
        for start, size in v.parts(dim):
            v.store(v.load(row, start, size), out, INT64(start))

    @step(types.void)
    def add(v: Vectors, row: Value, out: Value) -> None:
        row, out = map(v.pointer, (row, out))
        for start, size in v.parts(dim):
            total = v.builder.fadd(v.load(out, start, size), v.load(row, start, size))
            v.store(total, out, INT64(start), size)

    return Steps(dots, weighted, spread, dot, sum, copy, add)


class WeightSteps(NamedTuple):
    """The intrinsics for the logits and weights of one query, `n` of them up to whole vectors."""

    maximum: Any
    """``maximum(logits, n)``"""
    soften: Any
    """``soften(logits, n, shift)``: exp(logit - shift) in their place; returns the sum."""
    differentiate: Any
    """``differentiate(weights, gradients, n, delta, scale)``: the gradients of the weights
    become those of unscaled logits, scale * weight * (gradient - delta)."""
    read: Any
    """``read(numbers, i)``"""
    write: Any
    """``write(number, numbers, i)``"""


def steps_of_weights(bits: int, lanes: int) -> WeightSteps:
    number = {32: types.float32, 64: types.float64}[bits]

    @_intrinsic(bits, lanes, number)
    def maximum(v: Vectors, logits: Value, n: Value) -> Value:
        b, logits = v.builder, v.pointer(logits)
        largest = v.variable(-math.inf)
        with v.steps(INT64(0), n, lanes) as j:
            b.store(v.larger(v.load(logits, j), b.load(largest)), largest)
        return v.maximum(b.load(largest))

    @_intrinsic(bits, lanes, number)
    def soften(v: Vectors, logits: Value, n: Value, shift: Value) -> Value:
        b, logits, shift = v.builder, v.pointer(logits), v.splat(shift)
        total = v.variable(0.0)
        with v.steps(INT64(0), n, lanes) as j:
            weights = v.exponential(b.fsub(v.load(logits, j), shift))
            v.store(weights, logits, j)
            b.store(b.fadd(b.load(total), weights), total)
        return v.sum(b.load(total))

    @_intrinsic(bits, lanes, types.void)
    def differentiate(
        v: Vectors, weights: Value, gradients: Value, n: Value, delta: Value, scale: Value
    ) -> None:
        b, delta, scale = v.builder, v.splat(delta), v.splat(scale)
        weights, gradients = map(v.pointer, (weights, gradients))
        with v.steps(INT64(0), n, lanes) as j:
            shifted = b.fsub(v.load(gradients, j), delta)
            v.store(b.fmul(b.fmul(v.load(weights, j), scale), shifted), gradients, j)

    @_intrinsic(bits, lanes, number)
    def read(v: Vectors, numbers: Value, i: Value) -> Value:
        return v.builder.load(v.element(v.pointer(numbers), i))

    @_intrinsic(bits, lanes, types.void)
    def write(v: Vectors, number: Value, numbers: Value, i: Value) -> None:
        v.builder.store(number, v.element(v.pointer(numbers), i))

    return WeightSteps(maximum, soften, differentiate, read, write)


def _place(v: Vectors, places: Value, j: Value) -> Value:
    integers = v.builder.inttoptr(places, INT64.as_pointer())
    return v.builder.load(v.builder.gep(integers, [j]))


def _intrinsic(bits: int, lanes: int, returns: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that makes an intrinsic of a function that builds LLVM's code.

    The function takes `Vectors` and LLVM's value of every argument, and returns that of the result.
    """

    def decorate(build: Callable[..., Any]) -> Any:
        names = list(inspect.signature(build).parameters)[1:]

        def typed(*arguments: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                result = build(Vectors(builder, bits, lanes), *values)
                return context.get_dummy_value() if result is None else result

            return returns(*arguments), generate

        # Numba asks for as many parameters as the intrinsic has.
        source = f"lambda context, {', '.join(names)}: typed({', '.join(names)})"
        return intrinsic(eval(source, {"typed": typed}))

    return decorate
