"""PyTorch's side of `cuneigh._frameworks.derivatives`: derivatives of every order, in either mode.

All of it is written in differentiable calls, so that PyTorch can differentiate derivatives again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from cuneigh._backends import serving
from cuneigh._call import Call
from cuneigh._frameworks.contract import Adapter
from cuneigh._frameworks.derivatives import (
    Calculus,
    Named,
    composed,
    gradients_of,
    is_composed,
    tangents_of,
)
from cuneigh._frameworks.torch.tensors import PLAIN, TENSORS
from cuneigh._problem import ARRAYS, DIFFERENTIATED, Problem, Spec

LEVEL = 0
"""The one level of forward mode that PyTorch has; its transformations nest in another way."""

RECORDING: list[Adapter] = []
"""The one adapter that records calls; it is put here by its module, which imports this one."""


def calculus_of(
    name: str,
    backend: str | None,
    device: torch.device,
    follows: bool = True,
    calls: dict[Any, Call] | None = None,
) -> Calculus:
    """For derivatives of the call `name`, by the backend that it was given where that will do.

    `follows` says whether a backward does that from its forward. `calls` keeps what is called.
    """

    def apply(
        problem: Problem, arrays: Named, wanted: Sequence[str] | None = None
    ) -> dict[str, Any]:
        names, results, _ = ARRAYS[problem.operation]
        given = {name: arrays[name] for name in names if arrays.get(name) is not None}
        if calls is None:
            call = call_of(problem, tuple(given), wanted)
        else:
            told = problem, tuple(given), wanted
            call = calls.get(told) or calls.setdefault(told, call_of(*told))
        return dict(zip(results, call.compute(list(given.values())), strict=True))

    def call_of(problem: Problem, given: tuple[str, ...], wanted: Sequence[str] | None) -> Call:
        (adapter,) = RECORDING
        pairs = zip(ARRAYS[problem.operation].results, problem.results, strict=True)
        asked = [None if wanted and name not in wanted else spec for name, spec in pairs]
        of = serving(backend, problem)
        call = Call(name, adapter, device, given, problem, of, asked)
        call.follows = follows and problem.operation == "backward"
        return call

    def change(problem: Problem, arrays: Named) -> torch.Tensor:
        made = apply(problem, arrays)["logits"]
        return torch.where(made == -torch.inf, 0.0, made)

    def zeros(spec: Spec) -> torch.Tensor:
        return TENSORS.full(device, *spec, 0.0)

    return Calculus(apply, change, torch, TENSORS.cast, zeros)


def gradients(
    problem: Problem,
    arrays: Named,
    results: Named,
    incoming: Named,
    needed: Sequence[str],
    calculus: Calculus,
    follows: bool,
) -> dict[str, Any]:
    """The gradients of the arguments of an operation, of those that are `needed` at least.

    `incoming` has those of the results, as far as there are any. `follows` as in `is_composed`.
    """
    incoming = {name: array for name, array in incoming.items() if array is not None}
    if not is_composed(problem.operation, follows, forwards=False):
        return gradients_of(problem, arrays, results, incoming, calculus, needed)

    def compute(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = composed(problem, {**arrays, **dict(zip(needed, given, strict=True))}, calculus)
        return tuple(made[name] for name in incoming)

    _, back = torch.func.vjp(compute, *(arrays[name] for name in needed))
    return dict(zip(needed, back(tuple(incoming.values())), strict=True))


def tangents(
    problem: Problem,
    arrays: Named,
    results: Named,
    moved: Named,
    calculus: Calculus,
    follows: bool,
) -> dict[str, Any]:
    """The tangents of all results of an operation, `moved` being those of its arguments."""
    if torch._C._are_functorch_transforms_active():
        # PyTorch calls the rules of its functions with forward mode off, in which an outer
        # torch.func.jvp would find nothing to differentiate. It is on here, for primals without
        # the tangents at hand.
        with forward_ad._set_fwd_grad_enabled(True):
            primals, kept, directions = map(_primals, (arrays, results, moved))
            made = _tangents(problem, primals, kept, directions, calculus, follows)
    else:
        made = _tangents(problem, arrays, results, moved, calculus, follows)
    return {
        name: torch.zeros_like(result) if made.get(name) is None else made[name]
        for name, result in results.items()
    }


def _primals(arrays: Named) -> Named:
    return {
        name: None if array is None else forward_ad.unpack_dual(array, level=LEVEL).primal
        for name, array in arrays.items()
    }


def _tangents(
    problem: Problem,
    arrays: Named,
    results: Named,
    moved: Named,
    calculus: Calculus,
    follows: bool,
) -> dict[str, Any]:
    moved = {name: array for name, array in moved.items() if array is not None}
    if not is_composed(problem.operation, follows, forwards=True):
        return tangents_of(problem, arrays, results, moved, calculus)
    names: list[str] = []

    def compute(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = composed(problem, {**arrays, **dict(zip(moved, given, strict=True))}, calculus)
        names[:] = made
        return tuple(made.values())

    primals = tuple(arrays[name] for name in moved)
    _, made = torch.func.jvp(compute, primals, tuple(moved.values()))
    return dict(zip(names, made, strict=True))


# Gradients of many at once


def is_mapped(array: torch.Tensor | None) -> bool:
    """Whether the map by which ``is_grads_batched`` works has batched this tensor.

    That is another one than torch.func.vmap, and has no rules for what is written in Python.
    """
    return array is not None and torch._C._functorch.is_legacy_batchedtensor(array)


def mapped(
    compute: Callable[..., Sequence[torch.Tensor | None]], arrays: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """The results of `compute` for arrays that this map has batched, by torch.func.vmap."""
    level = _level(next(array for array in arrays if is_mapped(array)))
    held = [_held(array, level) if is_mapped(array) else array for array in arrays]
    if any(map(is_mapped, held)):
        raise NotImplementedError("cuneigh: batched gradients cannot be batched again")
    dims = tuple(0 if is_mapped(array) else None for array in arrays)
    there: list[bool] = []

    def batched(*given: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        made = compute(*given)
        there[:] = [array is not None for array in made]
        return tuple(array for array in made if array is not None)

    made = iter(torch.func.vmap(batched, dims)(*held))
    return [
        torch._add_batch_dim(next(made).contiguous(), 0, level) if each else None for each in there
    ]


def _held(array: torch.Tensor, level: int) -> torch.Tensor:
    """What the map of this number has made `array` of; the axis that it maps over comes first."""
    return torch._remove_batch_dim(array, level, 1, 0)


def _level(array: torch.Tensor) -> int:
    """The number of the only map that has batched `array`; 0 if there are several.

    PyTorch tells the number to the thread that began the map alone, and not to that in which the
    gradients of a GPU are computed.
    """
    for level in range(1, MOST_MAPS + 1):
        if not is_mapped(_held(array, level)):
            return level
    return 0


MOST_MAPS = 64
"""Maps within each other, at most."""


# Tensors that carry tangents


def is_forward_mode() -> bool:
    """Whether any tensor may carry a tangent."""
    # Where torch.compile traces, forward_ad does not know that it is within torch.func.jvp.
    return forward_ad._current_level >= 0 or (
        torch._C._are_functorch_transforms_active() and _innermost_is_jvp()
    )


def split(arrays: Named) -> tuple[dict[str, Any], dict[str, Any]]:
    """The primals of all of `arrays`, and the tangents of those that have one.

    Within other transformations than torch.func.jvp none is seen: what these have wrapped may hold
    one, which is the business of rules that see that.
    """
    primals, moved = dict(arrays), {}
    if not torch._C._are_functorch_transforms_active() or _innermost_is_jvp():
        for name, array in arrays.items():
            primal, tangent = forward_ad.unpack_dual(array, level=LEVEL)
            if tangent is not None:
                primals[name], moved[name] = primal, tangent
    return primals, moved


def _innermost_is_jvp() -> bool:
    functorch = torch._C._functorch
    innermost = functorch.peek_interpreter_stack().key()
    return innermost == functorch.TransformType.Jvp  # type: ignore[no-any-return]


def in_one_pass(
    call: Call, primals: Named, moved: Named, calculus: Calculus
) -> list[torch.Tensor | None]:
    """The results of a forward with their tangents, from one kernel."""
    directions = calculus.filled(call.problem, moved, DIFFERENTIATED)
    tangents = [array for name in DIFFERENTIATED if (array := directions.get(name)) is not None]
    output, lse, *turned = _at_rest(call.tangent, [*map(primals.get, call.arguments), *tangents])
    made = [output, lse]
    if not any(map(is_mapped, primals.values())):  # but the tangents may be
        for i, array in enumerate(made):
            if is_mapped(array):
                made[i] = _held(array, _level(array))[0]
    if not torch.is_grad_enabled():
        # PyTorch turns that on again where a transformation around this one sees our functions.
        # `make_dual` makes a view of the primal, which is constant there; so is one of the tangent.
        turned = [None if tangent is None else tangent.view_as(tangent) for tangent in turned]
    return [
        None if array is None else forward_ad.make_dual(array, tangent, level=LEVEL)
        for array, tangent in zip(made, turned, strict=True)
    ]


def _at_rest(call: Call, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """`call.compute` of tensors that have no tangents at this level.

    PyTorch's machinery for functions of torch.func would take the host several times as long as the
    call. It has nothing to see here, unless it follows these tensors for another reason.
    """
    if not torch._C._are_functorch_transforms_active():
        return (call.compute if _is_followed(arrays) else call.run)(arrays)
    jvp = retrieve_current_functorch_interpreter()
    level = jvp.level()
    held = [torch._C._functorch._unwrap_for_grad(array, level) for array in arrays]
    if _is_followed(held):
        return call.compute(arrays)
    with jvp.lower():
        made = call.run(held)
    return [
        None if array is None else torch._C._functorch._wrap_for_grad(array, level)
        for array in made
    ]


def _is_followed(arrays: Sequence[torch.Tensor]) -> bool:
    """Whether something else than forward mode must see what is computed of these tensors."""
    if torch.autograd._profiler_enabled() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    recorded = torch.is_grad_enabled()
    return any(
        type(array) not in PLAIN
        or (recorded and array.requires_grad)
        or is_mapped(array)
        or torch._C._functorch.is_functorch_wrapped_tensor(array)
        for array in arrays
    )
