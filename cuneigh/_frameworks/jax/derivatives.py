"""JAX's side of `cuneigh._frameworks.derivatives`: the rules by which JAX differentiates a call.

There are two, from which JAX makes derivatives of every order in either mode. The tangent of a call
is made of calls that are linear in tangents, and each of those can be transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from cuneigh._backends import serving
from cuneigh._frameworks.contract import numpy_dtype
from cuneigh._frameworks.derivatives import (
    COMPOSED,
    Calculus,
    Named,
    composed,
    gradients_of,
    tangents_of,
)
from cuneigh._frameworks.jax.calls import CustomCall, compute, primitive
from cuneigh._problem import ARRAYS, STARTS, TANGENTS, Problem, Spec

LINEAR = {"backward": ("grad_output", "grad_lse"), "jvp": TANGENTS}
"""The arguments in which the operations that are `COMPOSED` are linear."""

KEPT = ("output", "lse")
"""What a jvp is told of its forward, too, for its transpose, which is the backward."""


def calculus_of(backend: str | None, starts: jax.Array | None) -> Calculus:
    """For derivatives of a call, by the backend that it was given where that will do.

    `starts` are those of all calls, if a program computes them.
    """

    def apply(
        problem: Problem,
        arrays: Named,
        wanted: Sequence[str] | None = None,
        hidden_is_zero: bool = False,
    ) -> dict[str, Any]:
        names, results, _ = ARRAYS[problem.operation]
        if problem.operation == "jvp":
            names = (*names, *KEPT)
        given = {name: arrays[name] for name in names if arrays.get(name) is not None}
        if starts is not None:
            given[STARTS] = starts
        asked = tuple(name for name in wanted or results if problem.has(name))
        of = serving(backend, problem.operation)
        call = CustomCall(problem, of, tuple(given), asked, hidden_is_zero)
        return dict(zip(asked, compute(call, *given.values()), strict=True))

    def change(problem: Problem, arrays: Named) -> jax.Array:
        return apply(problem, arrays, hidden_is_zero=True)["logits"]

    def cast(array: jax.Array, dtype: str) -> jax.Array:
        return array.astype(numpy_dtype(dtype))

    def zeros(spec: Spec) -> jax.Array:
        return jnp.zeros(spec.shape, numpy_dtype(spec.dtype))

    return Calculus(apply, change, jnp, cast, zeros)


def _tangent(
    primals: Sequence[Any], tangents: Sequence[Any], *, call: CustomCall
) -> tuple[list[Any], list[Any]]:
    """The results of a call, and their tangents."""
    operation = call.problem.operation
    arrays = dict(zip(call.arguments, primals, strict=True))
    calculus = calculus_of(call.backend, arrays.pop(STARTS, None))
    pairs = zip(call.arguments, tangents, strict=True)
    moved = {name: tangent for name, tangent in pairs if type(tangent) is not ad.Zero}
    # A forward keeps its lse, too, which its derivatives need.
    asked = ARRAYS[operation].results if operation == "forward" else call.results
    made = dict(zip(asked, compute(replace(call, results=asked), *primals), strict=True))
    turn = _turned if operation in COMPOSED else tangents_of
    turned = turn(call.problem, arrays, made, moved, calculus)
    tangents_out = [
        ad.Zero.from_primal_value(made[name]) if turned.get(name) is None else turned[name]
        for name in call.results
    ]
    return [made[name] for name in call.results], tangents_out


def _turned(
    problem: Problem, arrays: Named, results: Named, moved: Named, calculus: Calculus
) -> dict[str, Any]:
    """The tangents of the results of a composed operation."""
    linear = LINEAR[problem.operation]
    wanted = tuple(results)
    turned: dict[str, Any] = {}
    if any(name in moved for name in linear):
        directions = calculus.filled(problem, moved, linear)
        if problem.operation == "backward" and "grad_lse" not in arrays:
            del directions["grad_lse"]
        of_directions = tuple(name for name in wanted if name not in KEPT)
        given = {**results, **arrays, **directions}
        turned = calculus.apply(problem, given, of_directions)
    others = {
        name: tangent
        for name, tangent in moved.items()
        if name not in linear and not (problem.operation == "jvp" and name in KEPT)
    }
    if not others:
        return turned

    def made_of(*primals: jax.Array) -> dict[str, Any]:
        made = composed(problem, {**arrays, **dict(zip(others, primals, strict=True))}, calculus)
        return {name: made[name] for name in wanted}

    primals = tuple(arrays[name] for name in others)
    _, made = jax.jvp(made_of, primals, tuple(others.values()))
    return {name: made[name] + turned[name] if name in turned else made[name] for name in wanted}


def _transpose(incoming: Sequence[Any], *arguments: Any, call: CustomCall) -> list[Any]:
    """The gradients of the arguments that a call is linear in, which are those not known."""
    problem = call.problem
    unknown = [
        name
        for name, array in zip(call.arguments, arguments, strict=True)
        if ad.is_undefined_primal(array)
    ]
    arrays = {
        # Of its very type: what varies along axes of a mesh has a gradient that does.
        name: ad.instantiate_zeros(ad.Zero(array.aval)) if name in unknown else array
        for name, array in zip(call.arguments, arguments, strict=True)
    }
    calculus = calculus_of(call.backend, arrays.pop(STARTS, None))
    given = {
        name: gradient
        for name, gradient in zip(call.results, incoming, strict=True)
        if type(gradient) is not ad.Zero
    }
    if not given:
        return [None] * len(arguments)
    made = _transposed(problem, arrays, given, unknown, calculus)
    return [made[name] if name in unknown else None for name in call.arguments]


def _transposed(
    problem: Problem, arrays: Named, given: Named, unknown: Sequence[str], calculus: Calculus
) -> Mapping[str, Any]:
    if problem.operation == "jvp":
        incoming = {name.removeprefix("tangent_"): gradient for name, gradient in given.items()}
        results = {name: arrays[name] for name in KEPT}
        of = gradients_of(problem.but("forward"), arrays, results, incoming, calculus)
        return {f"tangent_{name}": gradient for name, gradient in of.items()}
    if problem.operation == "backward":

        def made_of(*primals: jax.Array) -> dict[str, Any]:
            changed = dict(zip(unknown, primals, strict=True))
            made = composed(problem, {**arrays, **changed}, calculus)
            return {name: made[name] for name in given}

        _, back = jax.vjp(made_of, *(arrays[name] for name in unknown))
        return dict(zip(unknown, back(dict(given)), strict=True))
    return gradients_of(problem, arrays, {}, given, calculus)


def register() -> None:
    """Have JAX differentiate calls by these rules."""
    ad.primitive_jvps[primitive] = _tangent
    ad.primitive_transposes[primitive] = _transpose
