"""Results compared with float64 on a sample of tokens, before any time is told.

Every result is a sum of products. What may differ is what rounding each term to the dtype makes of
it: `ROUNDINGS` times eps times the root of the sum of the terms' squares, since roundings do not
all go the same way, and the rounding of the result itself. So may what rounding the partial sums
makes, which walk at random: of n terms, one after another, each partial sum is about as large as
the root of the sum of the squares so far. A wrong key, a missing one or a wrong weight of one is
far beyond that, in windows of any size.

Output and lse are computed anew from the window of a query. A gradient is computed from the output
and the lse of the call that is checked, which have been checked themselves: so a key needs nothing
but the queries that see it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh._measure.arrays import float64
from cuneigh._problem import Operands, Problem

Numbers = npt.NDArray[np.float64]

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-20, "float64": 2.0**-48}
"""Of float32 and float64 eight and sixteen times theirs, for sums in another order."""
TF32 = 2.0**-9
"""Of float32 where factors may be rounded to TF32."""
FLOAT32 = 2.0**-24
EPS_OF_SUMS = {"float64": 2.0**-53}
"""Of the sums of a dtype, where it is not float32's."""
ROUNDINGS = 8.0
SAMPLES = 24
"""Tokens that are looked at besides the corners of the layout."""


class WrongResultError(AssertionError):
    """A result that is further from float64 than rounding explains."""


class Tolerance(NamedTuple):
    """Compares numbers with what they should be."""

    eps: float
    eps_of_sums: float = FLOAT32

    def require(self, what: str, got: Any, terms: Numbers, sizes: Numbers | None = None) -> None:
        """Raise unless `got` is the sum of `terms` over their first axis.

        `sizes` are those of the numbers whose rounding counts, where terms are differences of them.
        """
        right = terms.sum(0)
        sizes = terms if sizes is None else sizes
        eps = self.eps + self.eps_of_sums * np.sqrt(len(terms) / 2)
        allowed = eps * ROUNDINGS * np.sqrt((sizes**2).sum(0)) + self.eps * np.abs(right)
        # An element may be 0 by cancellation: its neighbors say how large the numbers are.
        allowed = np.maximum(allowed, self.eps * np.abs(right).max(initial=0.0))
        error = np.abs(float64(got) - right)
        worst = np.max(error / np.maximum(allowed, np.finfo(np.float64).tiny), initial=0.0)
        if not worst <= 1:  # NaN is wrong, too
            raise WrongResultError(f"{what} errs {worst:.3g} times as much as rounding explains")


def tolerance_of(problem: Problem, tf32: bool = False) -> Tolerance:
    """What rounding explains in results of a problem's dtype."""
    eps = TF32 if tf32 and problem.dtype == "float32" else EPS[problem.dtype]
    return Tolerance(eps, EPS_OF_SUMS.get(problem.dtype, FLOAT32))


def sample(tokens: tuple[int, ...], inner: bool = False) -> list[tuple[int, ...]]:
    """Some tokens of a layout: its corners and a few others; with `inner` only the others."""
    rng = np.random.default_rng(0)
    corners = itertools.product(*(sorted({0, length - 1}) for length in tokens))
    others = [tuple(map(int, rng.integers(tokens))) for _ in range(SAMPLES)]
    return others if inner else [*corners, *others]


def check_forward(
    problem: Problem,
    operands: Operands,
    output: Any,
    lse: Any = None,
    tolerance: Tolerance | None = None,
    tokens: list[tuple[int, ...]] | None = None,
) -> None:
    """Raise WrongResultError unless `output`, and `lse` if there is one, are right."""
    tolerance = tolerance or tolerance_of(problem)
    for token, batch, head in _places(problem, problem.heads, tokens or sample(problem.tokens)):
        place = (batch, *token, head)
        logits, _, value = _row(problem, operands, token, batch, head)
        most = logits.max()
        weights = np.exp(logits - most)
        total = weights.sum()
        tolerance.require(f"output at {place}", output[place], (weights / total)[:, None] * value)
        if lse is not None:
            expected = most + np.log(total)
            error = abs(float(float64(lse[place])) - expected)
            if not error <= 4 * tolerance.eps * (1 + abs(expected)):
                raise WrongResultError(f"lse at {place} errs by {error:.3g}")


def check_gradients(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    output: Any,
    lse: Any,
    gradients: Operands,
    tolerance: Tolerance | None = None,
    tokens: list[tuple[int, ...]] | None = None,
) -> None:
    """Raise unless the gradients of query, key and value are those of the problem."""
    tolerance = tolerance or tolerance_of(problem)
    some = (tokens or sample(problem.tokens))[:12]
    for token, batch, head in _places(problem, problem.heads, some):
        place = (batch, *token, head)
        logits, key, value = _row(problem, operands, token, batch, head)
        gradient = float64(grad_output[place])
        weights = np.exp(logits - float64(lse[place]))
        delta = gradient @ float64(output[place])
        terms = _grad_logits(problem, weights, value @ gradient, delta, key)
        tolerance.require(f"the gradient of query at {place}", gradients.query[place], *terms)
    for token, batch, kv_head in _places(problem, problem.kv_heads, some):
        place = (batch, *token, kv_head)
        heads = slice(kv_head * problem.group_size, (kv_head + 1) * problem.group_size)
        seen_by = np.ix_(*_indices(problem, token, "inverse"))

        def rows(array: Any, heads: slice, batch: int, seen_by: Any) -> Numbers:
            inner = (..., heads, slice(None)) if array.ndim == problem.rank + 3 else (..., heads)
            return float64(array[batch][inner][seen_by])

        about = (heads, batch, seen_by)
        query = rows(operands.query, *about).reshape(-1, problem.head_dim)
        gradient = rows(grad_output, *about).reshape(-1, problem.value_dim)
        out = rows(output, *about).reshape(-1, problem.value_dim)
        key, value = float64(operands.key[place]), float64(operands.value[place])
        weights = np.exp(problem.scale * (query @ key) - rows(lse, *about).reshape(-1))
        delta = (gradient * out).sum(-1)
        terms = _grad_logits(problem, weights, gradient @ value, delta, query)
        tolerance.require(f"the gradient of key at {place}", gradients.key[place], *terms)
        of_value = weights[:, None] * gradient
        tolerance.require(f"the gradient of value at {place}", gradients.value[place], of_value)


def _grad_logits(
    problem: Problem, weights: Numbers, grad_weights: Numbers, delta: Any, vectors: Numbers
) -> tuple[Numbers, Numbers]:
    """Gradients of logits times vectors, and what they would be if nothing cancelled.

    The gradient of a weight and delta may be nearly the same, as they are where a query sees one
    key; both have been rounded.
    """
    differences = grad_weights - delta, np.abs(grad_weights) + np.abs(delta)
    terms, sizes = (problem.scale * (weights * each)[:, None] * vectors for each in differences)
    return terms, sizes


def _places(
    problem: Problem, heads: int, tokens: list[tuple[int, ...]]
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Tokens, each in some batch and head."""
    rng = np.random.default_rng(1)
    for token in tokens:
        yield token, int(rng.integers(problem.batch)), int(rng.integers(heads))


def _row(
    problem: Problem, operands: Operands, token: tuple[int, ...], batch: int, head: int
) -> tuple[Numbers, Numbers, Numbers]:
    """Logits, keys and values of the window of a query, the additional ones last."""
    window, kv_head = np.ix_(*_indices(problem, token, "window")), head // problem.group_size
    key, value = (
        float64(array[batch][..., kv_head, :][window]).reshape(-1, dim)
        for array, dim in ((operands.key, problem.head_dim), (operands.value, problem.value_dim))
    )
    if problem.additional:
        key = np.concatenate((key, float64(operands.additional_keys[batch])[:, kv_head]))
        value = np.concatenate((value, float64(operands.additional_values[batch])[:, kv_head]))
    query = float64(operands.query[(batch, *token, head)])
    return problem.scale * (key @ query), key, value


def _indices(problem: Problem, token: tuple[int, ...], rule: str) -> list[npt.NDArray[np.int64]]:
    """Along each axis, the tokens in the window, or in the inverse window, of a token."""
    found = []
    for axis, x in zip(problem.axes, token, strict=True):
        group = x % axis.dilation
        begin, end = getattr(axis, rule)(x // axis.dilation, group)
        found.append(np.arange(begin, end) * axis.dilation + group)
    return found
