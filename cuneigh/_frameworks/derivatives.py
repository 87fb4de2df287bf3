"""How the operations are differentiated, whatever the framework: by one another.

The tangent of a forward is a jvp and its gradient a backward. The derivative of either, which is of
second order, is an hvp: a product with the Hessian of `sum(grad_output * output) + sum(grad_lse *
lse)` as a function of the operands and of both gradients. That is symmetric, so that the hvp is
what the backward changes by, and what comes back from it. All of these have kernels of their own.

The unfused operations are products: of queries and keys, of weights and values, and of weights and
queries. A derivative of a product is a sum of products, so that they are differentiated by one
another, to any order. What remains, the tangent of a jvp and the derivatives of an hvp, `composed`
computes of unfused operations, and the framework differentiates that, with arrays of the size of
the logits in memory, in float32 at least.

A backward that follows from a forward is a function of the operands and of the gradients alone. One
that a user calls is a function of `output` and `lse` as well (`Calculus.apply` makes none such);
`composed` computes it of a forward and a backward that follows from that.

Arrays go by name, as in `ARRAYS`; what is absent, or None, was not given, is not wanted or is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cuneigh._problem import (
    ARRAYS,
    DIFFERENTIATED,
    INCOMING,
    OfResults,
    Operands,
    Operation,
    Problem,
    Spec,
)

Named = Mapping[str, Any]


def is_composed(operation: Operation, follows: bool, *, forwards: bool) -> bool:
    """Whether a framework differentiates an operation as what `composed` makes of it.

    `follows` says that it is a backward which follows from its forward, `forwards` that tangents
    are asked for and not gradients.
    """
    if operation == "backward":
        return not follows
    return operation == "hvp" or (operation == "jvp" and forwards)


class Apply(Protocol):
    """The results of an operation, all or those `wanted`, from its arguments.

    There may be more arrays than it takes.
    """

    def __call__(
        self, problem: Problem, arrays: Named, wanted: Sequence[str] | None = None
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Calculus:
    """What a framework computes derivatives with; it can differentiate all of it."""

    apply: Apply
    change: Callable[[Problem, Named], Any]
    """The result of a qk with 0 in hidden slots, as it is where operands are changes of some."""
    xp: Any
    """The module with the framework's ``exp`` and ``where``."""
    cast: Callable[[Any, str], Any]
    zeros: Callable[[Spec], Any]

    def filled(self, problem: Problem, arrays: Named, names: tuple[str, ...]) -> dict[str, Any]:
        """Those called `names` that `problem` has, with zeros for the absent ones."""
        return {
            name: self.zeros(problem.spec(name)) if arrays.get(name) is None else arrays[name]
            for name in names
            if problem.has(name)
        }


def tangents_of(
    problem: Problem, arrays: Named, results: Named, tangents: Named, calculus: Calculus
) -> dict[str, Any]:
    """The tangents of the results of an operation that is not composed, at least one of `tangents`
    being there."""
    filled, apply = calculus.filled, calculus.apply
    operation = problem.operation
    if operation == "forward":
        moved = filled(problem, tangents, DIFFERENTIATED)
        directions = {f"tangent_{name}": array for name, array in moved.items()}
        given = {**arrays, **results, **directions}
        made = apply(problem.but("jvp"), given, ("tangent_output", "tangent_lse"))
        return {name: made[f"tangent_{name}"] for name in ("output", "lse")}
    if operation == "backward":
        if not any(tangents.get(name) is not None for name in DIFFERENTIATED):
            changed = {name: tangents.get(name) for name in INCOMING}
            return apply(problem, {**arrays, **changed, **filled(problem, changed, INCOMING[:1])})
        return hvp(problem, arrays, tangents, calculus, of_results=False)
    if operation == "qk":
        return {"logits": _logits(problem, arrays, tangents, calculus)}
    if operation == "av":
        return {"output": _output(problem, arrays, tangents, calculus)}
    # Both gradients are linear in what comes in, and in the other arguments together.
    (incoming,) = (name for name in arrays if name.startswith("grad_"))
    made = {}
    if tangents.get(incoming) is not None:
        made = apply(problem, {**arrays, incoming: tangents[incoming]})
    return _sums(made, _crossed(problem, arrays, incoming, tangents, calculus))


def gradients_of(
    problem: Problem,
    arrays: Named,
    results: Named,
    incoming: Named,
    calculus: Calculus,
    needed: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The gradients of the arguments of an operation that is not composed.

    `incoming` has those of the results, by their names, at least one of them. Those of arguments
    that are not `needed` may be absent.
    """
    operation = problem.operation
    if operation == "forward":
        given = {f"grad_{name}": array for name, array in incoming.items()}
        given |= calculus.filled(problem, given, ("grad_output",))
        return calculus.apply(problem.but("backward"), {**arrays, **results, **given})
    if operation == "qk":
        (grad_logits,) = incoming.values()
        return calculus.apply(problem.but("qk_backward"), {**arrays, "grad_logits": grad_logits})
    if operation == "av":
        (grad_output,) = incoming.values()
        return calculus.apply(problem.but("av_backward"), {**arrays, "grad_output": grad_output})
    if operation == "jvp":
        tangents = {
            name: gradient
            for name in OfResults._fields
            if (gradient := incoming.get(f"tangent_{name}")) is not None
        }
        made = {}
        if tangents:
            made = gradients_of(problem.but("forward"), arrays, results, tangents, calculus)
        back = {f"tangent_{name}": gradient for name, gradient in made.items()}
        return {**back, **gradients_of_operands(problem, arrays, results, incoming, calculus)}
    if operation == "backward":
        of_results = needed is None or any(name in needed for name in INCOMING)
        made = hvp(problem, arrays, incoming, calculus, of_results)
        back = {f"grad_{name}": made.get(f"tangent_{name}") for name in OfResults._fields}
        return {**made, **back}
    (name,) = (name for name in arrays if name.startswith("grad_"))
    if operation == "qk_backward":
        back = _logits(problem, arrays, incoming, calculus)
    else:
        back = _output(problem, arrays, incoming, calculus)
    return {name: back, **_crossed(problem, arrays, name, incoming, calculus)}


def gradients_of_operands(
    problem: Problem, arrays: Named, results: Named, incoming: Named, calculus: Calculus
) -> dict[str, Any]:
    """The gradients of the operands of a jvp, as `gradients_of` has them.

    The product of its tangents with `incoming` is that of the gradients, by a backward, with the
    tangents of the operands; so they are how these gradients change along those.
    """
    of_results, of_tangents = (
        {f"grad_{name}": incoming.get(f"{prefix}{name}") for name in OfResults._fields}
        for prefix in ("", "tangent_")
    )
    given = {**arrays, **{name: results[name] for name in OfResults._fields}}
    if all(gradient is None for gradient in of_tangents.values()):
        of_results |= calculus.filled(problem, of_results, INCOMING[:1])
        return calculus.apply(problem.but("backward"), {**given, **of_results})
    given |= {**of_tangents, **calculus.filled(problem, of_tangents, INCOMING[:1])}
    directions = {name: arrays.get(f"tangent_{name}") for name in DIFFERENTIATED}
    return hvp(problem, given, {**directions, **of_results}, calculus, of_results=False)


def hvp(
    problem: Problem, arrays: Named, moved: Named, calculus: Calculus, of_results: bool
) -> dict[str, Any]:
    """The results of an hvp at the arguments of a backward, some of which move.

    `of_results` says whether the tangents of output and lse are wanted, too.
    """
    directions = calculus.filled(problem, moved, DIFFERENTIATED)
    directions |= {name: moved[name] for name in INCOMING if moved.get(name) is not None}
    given = {f"tangent_{name}": array for name, array in directions.items()}
    wanted = None if of_results else DIFFERENTIATED
    return calculus.apply(problem.but("hvp"), {**arrays, **given}, wanted)


def _logits(problem: Problem, arrays: Named, moved: Named, calculus: Calculus) -> Any:
    """The change of logits where the operands change by `moved`; 0 in hidden slots."""
    terms = []
    rpb = moved.get("rpb")
    if moved.get("query") is not None or rpb is not None:
        of_query = problem.but("qk", rpb_dtype=None if rpb is None else problem.rpb_dtype)
        query = calculus.filled(problem, moved, ("query",))
        terms.append(calculus.change(of_query, {**arrays, **query, "rpb": rpb}))
    if moved.get("key") is not None or moved.get("additional_keys") is not None:
        keys = calculus.filled(problem, moved, ("key", "additional_keys"))
        of_keys = problem.but("qk", rpb_dtype=None)
        terms.append(calculus.change(of_keys, {**arrays, **keys, "rpb": None}))
    return sum(terms[1:], start=terms[0]) if terms else None


def _output(problem: Problem, arrays: Named, moved: Named, calculus: Calculus) -> Any:
    """The change of the sums of values where weights and values change by `moved`."""
    terms = []
    if moved.get("weights") is not None:
        terms.append(calculus.apply(problem.but("av"), {**arrays, "weights": moved["weights"]}))
    if moved.get("value") is not None or moved.get("additional_values") is not None:
        values = calculus.filled(problem, moved, ("value", "additional_values"))
        terms.append(calculus.apply(problem.but("av"), {**arrays, **values}))
    outputs = [made["output"] for made in terms]
    return sum(outputs[1:], start=outputs[0]) if outputs else None


def _crossed(
    problem: Problem, arrays: Named, incoming: str, moved: Named, calculus: Calculus
) -> dict[str, Any]:
    """A gradient with `moved` in the place of the operands that it multiplies `incoming` with.

    The gradient of each of two factors is a product with the other one. So this is both how the
    gradients change where the operands do, and the gradient of that.
    """
    factors = tuple(name for name in ARRAYS[problem.operation].results if name != "rpb")
    if all(moved.get(name) is None for name in factors):
        return {}
    operands = calculus.filled(problem, moved, factors)
    kept = {name: arrays.get(name) for name in (incoming, "key_mask")}
    unbiased = problem.but(problem.operation, rpb_dtype=None)
    return calculus.apply(unbiased, {**operands, **kept})


def _sums(a: Named, b: Named) -> dict[str, Any]:
    """What is in both added up; the rest as it is."""
    return {
        name: one if other is None else other if one is None else one + other
        for name in {**a, **b}
        for one, other in ((a.get(name), b.get(name)),)
    }


def composed(problem: Problem, arrays: Named, calculus: Calculus) -> dict[str, Any]:
    """What an operation computes, of operations that the framework can differentiate."""
    compose = {"backward": _backward, "jvp": _jvp, "hvp": _unfused_hvp}[problem.operation]
    made = compose(problem, arrays, calculus)
    return {
        name: calculus.cast(array, problem.spec(name).dtype)
        for name, array in made.items()
        if array is not None
    }


def _backward(problem: Problem, arrays: Named, calculus: Calculus) -> dict[str, Any]:
    """A backward with any `output` and `lse`, of which the gradients are functions, too.

    By another lse all weights of a row are `ratio` times those of the forward.
    """
    forward = calculus.apply(problem.but("forward"), arrays)
    given = {
        name: None if array is None else calculus.cast(array, problem.accumulator)
        for name, array in arrays.items()
        if name in (*INCOMING, *OfResults._fields)
    }
    output = calculus.cast(forward["output"], problem.accumulator)
    ratio = _exponentials(forward["lse"], given["lse"], calculus)
    grad_output = ratio[..., None] * given["grad_output"]
    grad_lse = (grad_output * (output - given["output"])).sum(-1)
    if given.get("grad_lse") is not None:
        grad_lse = grad_lse + ratio * given["grad_lse"]
    incoming = {
        "grad_output": calculus.cast(grad_output, problem.dtype),
        "grad_lse": grad_lse,
    }
    return calculus.apply(problem, {**arrays, **forward, **incoming})


def _exponentials(logits: Any, lse: Any, calculus: Calculus) -> Any:
    """Those of `logits` less `lse`; all 0 where that is -inf."""
    return calculus.xp.exp(logits - calculus.xp.where(lse == -math.inf, math.inf, lse))


def _jvp(problem: Problem, arrays: Named, calculus: Calculus) -> dict[str, Any]:
    operands = {name: arrays.get(name) for name in Operands._fields}
    made = calculus.apply(problem.but("forward"), operands)
    unfused = _Unfused(problem, arrays, calculus)
    moved = {name: unfused.wide.get(f"tangent_{name}") for name in DIFFERENTIATED}
    weights = unfused.weights(made["lse"])
    grown = weights * _logits(unfused.logits, unfused.wide, moved, calculus)
    tangent_lse = grown.sum(-1)
    moved["weights"] = grown - weights * tangent_lse[..., None]
    given = {**unfused.wide, "weights": weights}
    tangent_output = _output(unfused.sums, given, moved, calculus)
    return {**made, "tangent_output": tangent_output, "tangent_lse": tangent_lse}


def _unfused_hvp(problem: Problem, arrays: Named, calculus: Calculus) -> dict[str, Any]:
    """By the formulas of ``cuneigh.reference.hvp``."""
    unfused = _Unfused(problem, arrays, calculus)
    wide = unfused.wide
    moved = {name: wide.get(f"tangent_{name}") for name in (*DIFFERENTIATED, *INCOMING)}
    weights = unfused.weights(arrays["lse"])
    grown = weights * _logits(unfused.logits, wide, moved, calculus)
    tangent_lse = grown.sum(-1)
    tangent_weights = grown - weights * tangent_lse[..., None]
    tangent_output = _output(
        unfused.sums,
        {**wide, "weights": weights},
        {**moved, "weights": tangent_weights},
        calculus,
    )

    grad_output, grad_tangent = wide["grad_output"], moved["grad_output"]
    delta = (grad_output * wide["output"]).sum(-1)
    tangent_delta = (grad_output * tangent_output).sum(-1)
    of_values = unfused.products(grad_output, moved)
    if grad_tangent is not None:
        tangent_delta = tangent_delta + (grad_tangent * wide["output"]).sum(-1)
        of_values = of_values + unfused.products(grad_tangent, wide)
    if wide.get("grad_lse") is not None:
        delta = delta - wide["grad_lse"]
    if moved["grad_lse"] is not None:
        tangent_delta = tangent_delta - moved["grad_lse"]
    grad_weights = unfused.products(grad_output, wide) - delta[..., None]
    grad_logits = weights * grad_weights
    tangent_logits = tangent_weights * grad_weights + weights * (
        of_values - tangent_delta[..., None]
    )

    def products_of(problem: Problem, operands: Named, **factors: Any) -> dict[str, Any]:
        made = calculus.apply(problem, {**operands, "key_mask": wide.get("key_mask"), **factors})
        return {name: made[name] for name in made if name != "weights"}

    of_logits = unfused.logits.but("qk_backward")
    unbiased = unfused.logits.but("qk_backward", rpb_dtype=None)
    of_sums = unfused.sums.but("av_backward")
    made = _sums(
        products_of(of_logits, wide, grad_logits=tangent_logits),
        products_of(unbiased, {**moved, "rpb": None}, grad_logits=grad_logits),
    )
    made |= products_of(of_sums, wide, weights=tangent_weights, grad_output=grad_output)
    if grad_tangent is not None:
        more = products_of(of_sums, wide, weights=weights, grad_output=grad_tangent)
        made = _sums(made, more)
    return {**made, "tangent_output": tangent_output, "tangent_lse": tangent_lse}


class _Unfused:
    """The unfused operations on the arrays of a fused one, in the precision of its sums."""

    def __init__(self, problem: Problem, arrays: Named, calculus: Calculus) -> None:
        wide = problem.accumulator
        bias = None if problem.rpb_dtype is None else wide
        self.calculus = calculus
        self.wide: dict[str, Any] = {
            name: array if array is None or name == "key_mask" else calculus.cast(array, wide)
            for name, array in arrays.items()
        }
        self.logits = problem.but("qk", dtype=wide, value_dim=1, rpb_dtype=bias)
        self.sums = problem.but("av", dtype=wide, head_dim=1, scale=1.0, rpb_dtype=None)

    def weights(self, lse: Any) -> Any:
        """The exponentials of the logits less `lse`; all 0 where that is -inf."""
        logits = self.calculus.apply(self.logits, self.wide)["logits"]
        return _exponentials(logits, lse[..., None], self.calculus)

    def products(self, grad_output: Any, of: Named) -> Any:
        """Those of `grad_output` and the values among `of`; 0 in hidden slots."""
        problem = self.logits.but("qk", head_dim=self.sums.value_dim, scale=1.0, rpb_dtype=None)
        given = {
            "query": grad_output,
            "key": of["value"],
            "additional_keys": of.get("additional_values"),
            "key_mask": self.wide.get("key_mask"),
        }
        return self.calculus.change(problem, given)
