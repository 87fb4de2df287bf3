"""Every operation in float64 on whole matrices, by NumPy or CuPy: the oracle of `attack`.

It shares nothing with the package but the fields of `Problem` and `Axis`. Who sees whom is written
out again in `brute_force`. Beside each result is what it may err by, as `accuracy` has it, but
from bounds on the terms instead of an obvious computation.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from helpers.brute_force import relative, slots_along, visible_keys
from helpers.strategies import numpy_dtype

from cuneigh._problem import Problem
from cuneigh._window import Axis

FACTOR = 8.0
"""Roundings of the largest sum of terms that an element may be off."""


class Result(NamedTuple):
    expected: Any
    allowed: float


@cache
def visible_along(axis: Axis) -> np.ndarray:
    """[queries, keys]"""
    visible = np.zeros((axis.length, axis.key_length), bool)
    for x in range(axis.length):
        visible[x, visible_keys(axis, x)] = True
    return visible


@cache
def mask(problem: Problem) -> np.ndarray:
    """[queries, keys and additional keys]"""
    visible = np.ones((1, 1), bool)
    for axis in problem.axes:
        visible = np.kron(visible, visible_along(axis))
    extra = np.ones((len(visible), problem.additional or 0), bool)
    return np.concatenate([visible, extra], 1)


def slots_of(problem: Problem) -> np.ndarray:
    """[queries, slots]: the key in each slot; the number of keys where the slot is hidden."""
    keys = math.prod(problem.key_tokens)
    first, hidden = np.zeros((1, 1), int), np.zeros((1, 1), bool)
    for axis in problem.axes:
        along = np.full((axis.length, axis.kernel_size), -1)
        for x in range(axis.length):
            for slot, y in slots_along(axis, x):
                along[x, slot] = y
        shape = len(first) * axis.length, -1
        first = (first[:, None, :, None] * axis.key_length + along[None, :, None, :]).reshape(shape)
        hidden = (hidden[:, None, :, None] | (along < 0)[None, :, None, :]).reshape(shape)
    extra = keys + np.arange(problem.additional or 0)
    found = np.where(hidden, keys + len(extra), first)
    return np.concatenate([found, np.broadcast_to(extra, (len(found), len(extra)))], 1)


def bias_index(problem: Problem) -> np.ndarray:
    """[queries, keys]: which element of a head's rpb belongs to a pair; any for hidden pairs."""
    index = np.zeros((1, 1), int)
    for axis in problem.axes:
        along = np.zeros((axis.length, axis.key_length), int)
        for x in range(axis.length):
            for slot, y in slots_along(axis, x):
                along[x, y] = relative(axis, x, slot)
        size = 2 * axis.kernel_size - 1
        index = (index[:, None, :, None] * size + along[None, :, None, :]).reshape(
            len(index) * axis.length, -1
        )
    return index


class Dense:
    """A problem and its arrays as matrices ``[batch, heads, tokens, dim]`` of float64."""

    def __init__(self, problem: Problem, arrays: dict[str, Any], xp: Any) -> None:
        self.problem, self.xp = problem, xp
        self.group = problem.group_size
        self._arrays = arrays
        self.seen = xp.asarray(mask(problem))
        if (shown := arrays.get("key_mask")) is not None:  # [batch, 1, queries, keys]
            extra = xp.ones((len(shown), problem.additional or 0), bool)
            shown = xp.concatenate([shown.reshape(len(shown), -1), extra], 1)
            self.seen = self.seen & shown[:, None, None]
        self.eps = float(ml_dtypes.finfo(numpy_dtype(problem.dtype)).eps)
        self.sum_eps = float(np.finfo(problem.accumulator).eps)

    def tokens(self, name: str, extra: str | None = None) -> Any:
        """[batch, heads, tokens (and additional ones), dim], repeated over the query heads."""
        xp, array = self.xp, self._arrays[name]
        if name == "grad_lse":
            array = array[..., None]
        array = array.astype(xp.float64).reshape(len(array), -1, *array.shape[-2:])
        if name in ("key", "value") and (shown := self._arrays.get("key_mask")) is not None:
            array = xp.where(shown.reshape(*array.shape[:2], 1, 1), array, 0)
        if extra is not None and self._arrays.get(extra) is not None:
            array = xp.concatenate([array, self._arrays[extra].astype(xp.float64)], 1)
        array = xp.moveaxis(array, 1, 2)
        if array.shape[1] != self.problem.heads:
            array = xp.repeat(array, self.group, 1)
        return array

    def logits(self) -> tuple[Any, Any]:
        """Logits, -inf where hidden, and the sums of the absolute values of their terms."""
        xp, problem = self.xp, self.problem
        query, key = self.tokens("query"), self.tokens("key", "additional_keys")
        logits = problem.scale * (query @ key.swapaxes(-1, -2))
        terms = abs(problem.scale) * (abs(query) @ abs(key).swapaxes(-1, -2))
        if self._arrays.get("rpb") is not None:
            rpb = self._arrays["rpb"].astype(xp.float64).reshape(problem.heads, -1)
            bias = rpb[:, xp.asarray(bias_index(problem))]
            keys = bias.shape[-1]
            logits[..., :keys] += bias
            terms[..., :keys] += xp.where(xp.isfinite(bias), abs(bias), 0)
        return xp.where(self.seen, logits, -xp.inf), xp.where(self.seen, terms, 0)

    def allowed(self, terms: Any, factor: float = 1.0) -> float:
        """From the absolute sums of terms and the relative error of each term."""
        rounding = self.eps + self.sum_eps * factor
        smallest = float(ml_dtypes.finfo(numpy_dtype(self.problem.dtype)).smallest_normal)
        return FACTOR * (rounding * largest(terms) + smallest)

    def run(self) -> dict[str, Result]:
        return getattr(self, self.problem.operation)()

    def attention(self) -> tuple[Any, Any, Any, float]:
        """Weights, output and lse as they are, and how far logits may magnify errors."""
        xp = self.xp
        logits, terms = self.logits()
        highest = logits.max(-1, keepdims=True)
        highest = xp.where(xp.isfinite(highest), highest, 0)
        weights = xp.exp(logits - highest)
        total = weights.sum(-1, keepdims=True)
        lse = xp.where(total > 0, highest + xp.log(xp.where(total > 0, total, 1)), -xp.inf)
        weights = weights / xp.where(total > 0, total, 1)
        magnified = 1 + largest(terms)
        return weights, weights @ self.tokens("value", "additional_values"), lse[..., 0], magnified

    def forward(self) -> dict[str, Result]:
        _, output, lse, magnified = self.attention()
        values = abs(self.tokens("value", "additional_values"))
        finite = self.xp.where(self.xp.isfinite(lse), abs(lse), 0)
        # lse is of the accumulator's dtype
        of_lse = FACTOR * self.sum_eps * (largest(finite) + magnified)
        return {
            "output": Result(self.whole(output), self.allowed(values, magnified)),
            "lse": Result(self.whole(lse[..., None])[..., 0], of_lse),
        }

    def backward(self) -> dict[str, Result]:
        weights, _, _, magnified = self.attention()
        query, key = self.tokens("query"), self.tokens("key", "additional_keys")
        value, grad = self.tokens("value", "additional_values"), self.tokens("grad_output")
        output = self.tokens("output")
        products, magnitudes = (
            grad @ value.swapaxes(-1, -2),
            abs(grad) @ abs(value).swapaxes(-1, -2),
        )
        delta = (grad * output).sum(-1, keepdims=True)
        magnitudes = magnitudes + abs(grad * output).sum(-1, keepdims=True)
        if self._arrays.get("grad_lse") is not None:
            grad_lse = self.tokens("grad_lse")
            delta, magnitudes = delta - grad_lse, magnitudes + abs(grad_lse)
        grad_logits, terms = weights * (products - delta), weights * magnitudes
        results = {}
        scale = self.problem.scale
        results["query"] = (scale * grad_logits @ key, abs(scale) * terms @ abs(key))
        results["key"] = (
            scale * grad_logits.swapaxes(-1, -2) @ query,
            abs(scale) * terms.swapaxes(-1, -2) @ abs(query),
        )
        results["value"] = weights.swapaxes(-1, -2) @ grad, weights.swapaxes(-1, -2) @ abs(grad)
        if self._arrays.get("rpb") is not None:
            results["rpb"] = self.rpb(grad_logits), self.rpb(terms)
        return self.gradients(results, magnified)

    def qk(self) -> dict[str, Result]:
        logits, terms = self.logits()
        return {"logits": Result(self.selected(logits, -np.inf), self.allowed(terms))}

    def qk_backward(self) -> dict[str, Result]:
        grad = self.spread("grad_logits")
        query, key, scale = self.tokens("query"), self.tokens("key", "additional_keys"), 1.0
        scale = self.problem.scale
        results = {
            "query": (scale * grad @ key, abs(scale * grad) @ abs(key)),
            "key": (
                scale * grad.swapaxes(-1, -2) @ query,
                abs(scale * grad).swapaxes(-1, -2) @ abs(query),
            ),
        }
        if self._arrays.get("rpb") is not None:
            results["rpb"] = self.rpb(grad), self.rpb(abs(grad))
        return self.gradients(results, 1.0)

    def av(self) -> dict[str, Result]:
        weights, value = self.spread("weights"), self.tokens("value", "additional_values")
        return {
            "output": Result(self.whole(weights @ value), self.allowed(abs(weights) @ abs(value)))
        }

    def av_backward(self) -> dict[str, Result]:
        weights, value = self.spread("weights"), self.tokens("value", "additional_values")
        grad = self.tokens("grad_output")
        products, terms = grad @ value.swapaxes(-1, -2), abs(grad) @ abs(value).swapaxes(-1, -2)
        results = {
            "value": (weights.swapaxes(-1, -2) @ grad, abs(weights).swapaxes(-1, -2) @ abs(grad))
        }
        of_weights = Result(self.selected(products, 0.0), self.allowed(terms))
        return {"grad weights": of_weights} | self.gradients(results, 1.0)

    # Between matrices and the arrays of calls

    def whole(self, matrix: Any) -> Any:
        """[batch, x1..xr, heads, dim]"""
        batch, heads, _, dim = matrix.shape
        return self.xp.moveaxis(matrix, 1, 2).reshape(batch, *self.problem.tokens, heads, dim)

    def selected(self, matrix: Any, hidden: float) -> Any:
        """[batch, x1..xr, heads, slots]"""
        xp, slots = self.xp, self.xp.asarray(slots_of(self.problem))
        more = xp.full((*matrix.shape[:3], 1), hidden)
        padded = xp.concatenate([matrix, more], -1)
        picked = xp.take_along_axis(
            padded, xp.broadcast_to(slots, (*matrix.shape[:2], *slots.shape)), -1
        )
        return self.whole(picked)

    def spread(self, name: str) -> Any:
        """[batch, heads, queries, keys] of an array of slots; zeros where there is none."""
        xp = self.xp
        slots = xp.asarray(slots_of(self.problem))
        given = self.tokens(name)
        batch, heads, queries, _ = given.shape
        keys = self.seen.shape[-1]
        matrix = xp.zeros((batch, heads, queries, keys + 1))
        matrix[:, :, xp.arange(queries)[:, None], slots] = given
        return xp.where(self.seen, matrix[..., :keys], 0)

    def rpb(self, matrix: Any) -> Any:
        xp, problem = self.xp, self.problem
        index = xp.asarray(bias_index(problem))
        keys = index.shape[1]
        summed = (
            xp.where(self.seen[..., :keys], matrix[..., :keys], 0).sum(0).reshape(problem.heads, -1)
        )
        shape = tuple(2 * axis.kernel_size - 1 for axis in problem.axes)
        rows = [xp.bincount(index.ravel(), row, math.prod(shape)) for row in summed]
        return xp.stack(rows).reshape(problem.heads, *shape)

    def gradients(self, matrices: dict[str, Any], magnified: float) -> dict[str, Result]:
        """By name, those of keys and values added up over the query heads that share them."""
        results = {}
        tokens = math.prod(self.problem.key_tokens)
        for name, (matrix, terms) in matrices.items():
            if name == "rpb":
                results["grad rpb"] = Result(matrix, self.allowed(terms, magnified))
                continue
            if name != "query":
                batch, heads, *rest = matrix.shape
                shape = batch, heads // self.group, self.group, *rest
                matrix, terms = matrix.reshape(shape).sum(2), terms.reshape(shape).sum(2)
            allowed = self.allowed(terms, magnified)
            matrix = self.xp.moveaxis(matrix, 1, 2)
            of = self.problem.tokens if name == "query" else self.problem.key_tokens
            whole = matrix[:, :tokens] if name != "query" else matrix
            shape = len(matrix), *of, *matrix.shape[2:]
            results[f"grad {name}"] = Result(whole.reshape(shape), allowed)
            if name != "query" and self.problem.additional is not None:
                extra = f"grad additional_{name}s"
                results[extra] = Result(matrix[:, tokens:], allowed)
        return results


def largest(terms: Any) -> float:
    """Of an array that may be empty."""
    return float(terms.max()) if terms.size else 0.0


def wrong(got: Any, result: Result, xp: Any) -> str | None:
    """What is wrong with an array; None if nothing is."""
    expected, allowed = result
    if got.shape != expected.shape:
        return f"its shape is {got.shape}, not {expected.shape}"
    got = got.astype(xp.float64)
    finite = xp.isfinite(expected)
    if not bool((xp.where(finite, xp.isfinite(got), got == expected)).all()):
        return "it is finite where it should not be, or the other way round"
    error = largest(xp.where(finite, abs(got - xp.where(finite, expected, 0)), 0))
    return None if error <= allowed else f"it errs {error:.3g}, where {allowed:.3g} is allowed"
