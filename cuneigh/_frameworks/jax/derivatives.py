"""JAX's side of `cuneigh._frameworks.derivatives`: the rules by which JAX differentiates a call.

There are two, from which JAX makes derivatives of every order in either mode. The tangent of a call
is made of calls that are linear in tangents, and each of those can be transposed. That of a jvp is
not, but what it is composed of is a call of its own, so that it can be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import dispatch
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cuneigh._backends import serving
from cuneigh._frameworks.contract import numpy_dtype
from cuneigh._frameworks.derivatives import (
    Calculus,
    Named,
    composed,
    gradients_of,
    gradients_of_operands,
    hvp,
    is_composed,
    tangents_of,
)
from cuneigh._frameworks.jax.calls import (
    CustomCall,
    compute,
    primitive,
    spread,
    spread_over,
    types,
)
from cuneigh._problem import (
    ARRAYS,
    DIFFERENTIATED,
    INCOMING,
    STARTS,
    TANGENTS,
    Operation,
    Problem,
    Spec,
)

LINEAR: dict[Operation, tuple[str, ...]] = {
    "backward": INCOMING,
    "jvp": TANGENTS,
    "hvp": (*TANGENTS, *(f"tangent_{name}" for name in INCOMING)),
}
"""The arguments in which the operations that may be composed are linear."""

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
        of = serving(backend, problem)
        follows = problem.operation == "backward"
        call = CustomCall(problem, of, tuple(given), asked, hidden_is_zero, follows)
        return dict(zip(asked, compute(call, *given.values()), strict=True))

    def change(problem: Problem, arrays: Named) -> jax.Array:
        return apply(problem, arrays, hidden_is_zero=True)["logits"]

    def cast(array: jax.Array, dtype: str) -> jax.Array:
        return array.astype(numpy_dtype(dtype))

    def zeros(spec: Spec) -> jax.Array:
        return jnp.zeros(spec.shape, numpy_dtype(spec.dtype))

    return Calculus(apply, change, jnp, cast, zeros)


def _named(call: CustomCall, given: Sequence[Any]) -> tuple[dict[str, Any], Calculus]:
    """The arguments of a call by name, but for starts, and what computes its derivatives."""
    arrays = dict(zip(call.arguments, given, strict=True))
    return arrays, calculus_of(call.backend, arrays.pop(STARTS, None))


def _tangent(
    primals: Sequence[Any], tangents: Sequence[Any], *, call: CustomCall
) -> tuple[list[Any], list[Any]]:
    """The results of a call, and their tangents."""
    operation = call.problem.operation
    arrays, calculus = _named(call, primals)
    pairs = zip(call.arguments, tangents, strict=True)
    moved = {name: tangent for name, tangent in pairs if type(tangent) is not ad.Zero}
    # A forward keeps its lse, too, which its derivatives need.
    asked = ARRAYS[operation].results if operation == "forward" else call.results
    made = dict(zip(asked, compute(replace(call, results=asked), *primals), strict=True))
    if is_composed(operation, call.follows, forwards=True):
        turned = _turned(call, primals, made, moved)
    else:
        turned = tangents_of(call.problem, arrays, made, moved, calculus)
    tangents_out = [
        ad.Zero.from_primal_value(made[name]) if turned.get(name) is None else turned[name]
        for name in call.results
    ]
    return [made[name] for name in call.results], tangents_out


def _turned(
    call: CustomCall, primals: Sequence[Any], results: Named, moved: Named
) -> dict[str, Any]:
    """The tangents of the results of a composed operation."""
    operation, wanted = call.problem.operation, tuple(results)
    arrays, calculus = _named(call, primals)
    linear = [name for name in LINEAR[operation] if name in arrays]
    turned: dict[str, Any] = {}
    if any(name in moved for name in linear):
        directions = calculus.filled(call.problem, moved, tuple(linear))
        of_directions = tuple(name for name in wanted if name not in KEPT)
        given = {**results, **arrays, **directions}
        turned = calculus.apply(call.problem, given, of_directions)
    others = {
        name: tangent
        for name, tangent in moved.items()
        if name not in linear and not (operation == "jvp" and name in KEPT)
    }
    if not others:
        return turned
    of = _along_in_one if operation == "jvp" else _composed_along
    made = of(call, tuple(others), *primals, *others.values())
    pairs = zip(wanted, made, strict=True)
    return {name: array + turned[name] if name in turned else array for name, array in pairs}


def _composed_along(call: CustomCall, names: tuple[str, ...], *given: jax.Array) -> list[jax.Array]:
    """How the results of a call change along the tangents of the arguments called `names`.

    Its arguments are given, and then the tangents.
    """
    count = len(call.arguments)
    arrays, calculus = _named(call, given[:count])

    def made_of(*primals: jax.Array) -> list[jax.Array]:
        changed = dict(zip(names, primals, strict=True))
        made = composed(call.problem, {**arrays, **changed}, calculus)
        return [made[name] for name in call.results]

    turned: list[jax.Array]
    primals = tuple(arrays[name] for name in names)
    _, turned = jax.jvp(made_of, primals, given[count:])
    return turned


# The tangents of a jvp are composed, but their transpose is not: this is a primitive for its sake.

_along = Primitive("cuneigh_along")
_along.multiple_results = True


def _along_in_one(call: CustomCall, names: tuple[str, ...], *given: jax.Array) -> list[jax.Array]:
    """`_composed_along` for a jvp, which JAX transposes to an hvp."""
    made: list[jax.Array] = _along.bind(*spread(given, spread_over(given)), call=call, names=names)
    return made


def _compute_along(
    *given: jax.Array, call: CustomCall, names: tuple[str, ...]
) -> Sequence[jax.Array]:
    return _composed_along(call, names, *given)


def _transpose_along(
    incoming: Sequence[Any], *given: Any, call: CustomCall, names: tuple[str, ...]
) -> list[Any]:
    count = len(call.arguments)
    arrays, calculus = _named(call, given[:count])
    there = _not_zero(call.results, incoming)
    made: Mapping[str, Any] = {}
    if there:
        made = gradients_of_operands(call.problem, arrays, arrays, there, calculus)
    return [None] * count + [made.get(name) for name in names]


def _tangent_along(
    primals: Sequence[Any], tangents: Sequence[Any], **of: Any
) -> tuple[Sequence[Any], Sequence[Any]]:
    filled = tuple(map(ad.instantiate_zeros, tangents))
    turned: tuple[Sequence[Any], Sequence[Any]]
    turned = jax.jvp(partial(_compute_along, **of), tuple(primals), filled)
    return turned


def _mapped_along(arrays: Sequence[Any], axes: Sequence[Any], **of: Any) -> Any:
    mapped = tuple(axis if isinstance(axis, int) else None for axis in axes)
    made = jax.vmap(partial(_compute_along, **of), mapped)(*arrays)
    return made, [0] * len(made)


def _not_zero(names: Sequence[str], gradients: Sequence[Any]) -> dict[str, Any]:
    """The gradients by name, without those that JAX knows to be 0."""
    pairs = zip(names, gradients, strict=True)
    return {name: gradient for name, gradient in pairs if type(gradient) is not ad.Zero}


def _transpose(incoming: Sequence[Any], *arguments: Any, call: CustomCall) -> list[Any]:
    """The gradients of the arguments that a call is linear in, which are those not known."""
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
    given = _not_zero(call.results, incoming)
    if not given:
        return [None] * len(arguments)
    made = _transposed(call, arrays, given, unknown, calculus)
    return [made[name] if name in unknown else None for name in call.arguments]


def _transposed(
    call: CustomCall, arrays: Named, given: Named, unknown: Sequence[str], calculus: Calculus
) -> Mapping[str, Any]:
    problem = call.problem
    if problem.operation == "jvp":
        incoming = {name.removeprefix("tangent_"): gradient for name, gradient in given.items()}
        results = {name: arrays[name] for name in KEPT}
        of = gradients_of(problem.but("forward"), arrays, results, incoming, calculus)
        return {f"tangent_{name}": gradient for name, gradient in of.items()}
    if problem.operation == "hvp":  # which is symmetric
        moved = {f"grad_{name}": given.get(f"tangent_{name}") for name in KEPT}
        of_results = any(f"tangent_{name}" in unknown for name in INCOMING)
        made = hvp(problem, arrays, {**given, **moved}, calculus, of_results)
        moved = {f"tangent_grad_{name}": made.get(f"tangent_{name}") for name in KEPT}
        return {**{f"tangent_{name}": made.get(name) for name in DIFFERENTIATED}, **moved}
    if problem.operation == "backward" and call.follows:
        # The product of the gradients with `given` is that of `unknown` with tangents along it.
        results = {name: arrays[name] for name in KEPT}
        made = tangents_of(problem.but("forward"), arrays, results, given, calculus)
        return {f"grad_{name}": tangent for name, tangent in made.items()}
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
    ad.primitive_jvps[_along] = _tangent_along
    ad.primitive_transposes[_along] = _transpose_along
    batching.primitive_batchers[_along] = _mapped_along
    _along.def_impl(_compute_along)
    _along.def_abstract_eval(lambda *given, call, names: types(*given, call=call))
    mlir.register_lowering(_along, mlir.lower_fun(_compute_along, multiple_results=True))
    # As what it is lowered to, custom_partitioning, which asks for them.
    dispatch.prim_requires_devices_during_lowering.add(_along)
