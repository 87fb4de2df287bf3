"""What every public function shares: its three ranks, and the way from arguments to results."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from cuneigh._arrays import Arguments, Borrower, Launcher, Watcher, meet
from cuneigh._backends import Allocate, Backend, choose
from cuneigh._problem import Operands, Problem, Spec, finite_scale

P = ParamSpec("P")
R = TypeVar("R")

Sizes = int | Sequence[int]
"""An integer for each token axis, or one for all of them."""

Flags = bool | Sequence[bool]
"""A bool for each token axis, or one for all of them."""


CORES: list[Callable[..., Any]] = []
"""What is behind the public functions, for frameworks that must know it to trace through it."""


def public(core: Callable[P, R]) -> Callable[P, R]:
    """The public function that is `core`, once the framework of its first array has been met."""
    CORES.append(core)

    @functools.wraps(core)
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        meet(args, kwargs)
        return core(*args, **kwargs)

    return function


def for_each_rank(
    core: Callable[Concatenate[int, P], R],
) -> tuple[Callable[P, R], Callable[P, R], Callable[P, R]]:
    """The public functions for one, two and three token axes, all of which are `core`.

    `core` takes the number of axes before everything else. Its name lacks the rank, and its
    documentation is that of the function for two axes.
    """
    CORES.append(core)

    def of_rank(rank: int) -> Callable[P, R]:
        def function(*args: P.args, **kwargs: P.kwargs) -> R:
            meet(args, kwargs)
            return core(rank, *args, **kwargs)

        function.__module__ = "cuneigh"
        function.__name__ = function.__qualname__ = core.__name__.replace("na", f"na{rank}d", 1)
        function.__doc__ = _reworded(core.__doc__ or "", rank)
        whole = inspect.signature(core, eval_str=True)
        seen = whole.replace(parameters=list(whole.parameters.values())[1:])
        function.__signature__ = seen  # type: ignore[attr-defined]
        return function

    return of_rank(1), of_rank(2), of_rank(3)


_WORDING = (
    ("na1d", "na2d", "na3d"),
    ("1-D", "2-D", "3-D"),
    ("X1", "X1, X2", "X1, X2, X3"),
    ("K1", "K1 * K2", "K1 * K2 * K3"),
    ("2 * K1 - 1", "2 * K1 - 1, 2 * K2 - 1", "2 * K1 - 1, 2 * K2 - 1, 2 * K3 - 1"),
    ("8", "8, 8", "8, 8, 8"),
)
"""How the documentation words the same thing for one, two and three token axes."""


def _reworded(documentation: str, rank: int) -> str:
    for wording in _WORDING:
        documentation = documentation.replace(wording[1], wording[rank - 1])
    return documentation


def scale_or_default(call: str, scale: object) -> float | None:
    """`scale`, checked; None, which stands for ``head_dim ** -0.5``, stays None."""
    return None if scale is None else finite_scale(call, scale)


def compute(
    call: str,
    arguments: Arguments,
    problem: Problem,
    backend: str | None,
    results: Sequence[Spec | None],
) -> list[Any]:
    """Arrays of the caller's framework for `results`, None where that is None.

    A framework that watches the arguments, to differentiate or to trace the call, comes first.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"{call}: backend={backend!r} is {type(backend).__name__}, not a str")
    face = arguments.face
    if isinstance(face, Watcher) and face.watches(arguments.arrays):
        return face.record(call, arguments, problem, backend, results)
    return run(arguments, problem, backend, results)


def run(
    arguments: Arguments, problem: Problem, backend: str | None, results: Sequence[Spec | None]
) -> list[Any]:
    """`compute` without anybody watching: the chosen backend fills the arrays.

    A problem that is empty launches nothing: its results are those of no keys at all.
    """
    place = arguments.place
    device = arguments.face.device(place)
    chosen = None if device is None else choose(problem, device, backend)
    if problem.is_empty:
        values = (0.0, -math.inf) if problem.operation == "forward" else repeat(0.0)
        return [
            None if spec is None else arguments.face.full(place, *spec, value)
            for spec, value in zip(results, values, strict=False)
        ]
    if isinstance(arguments.face, Launcher):
        return arguments.face.launch(arguments, problem, backend, results)
    assert chosen is not None, "only a launcher hides where its arrays are"
    face = cast(Borrower, arguments.face)

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        return face.borrow(face.empty(place, shape, dtype))

    with face.launching(place):
        given = {name: face.borrow(array) for name, array in arguments.arrays.items()}
        made = [None if spec is None else face.empty(place, *spec) for spec in results]
        native = [None if array is None else face.borrow(array) for array in made]
        launch(chosen, problem, given, native, allocate)
    return [None if array is None else face.deliver(place, array) for array in made]


def launch(
    chosen: Backend,
    problem: Problem,
    given: Mapping[str, Any],
    results: Sequence[Any],
    allocate: Allocate,
) -> None:
    """Have `chosen` fill the native arrays `results` from native arguments, `given` by name.

    Results are in the order in which the public function returns them, None where not wanted.
    """
    operands = Operands(*map(given.get, Operands._fields))
    match problem.operation:
        case "forward":
            output, lse = results
            chosen.forward(problem, operands, output, lse, allocate)
        case "backward":
            chosen.backward(
                problem,
                operands,
                given["grad_output"],
                given["output"],
                given["lse"],
                given.get("grad_lse"),
                Operands(*results),
                allocate,
            )
        case "qk":
            (logits,) = results
            chosen.qk(problem, operands, logits, allocate)
        case "qk_backward":
            chosen.qk_backward(
                problem, operands, given["grad_logits"], Operands(*results), allocate
            )
        case "av":
            (output,) = results
            chosen.av(problem, given["weights"], operands, output, allocate)
        case "av_backward":
            grad_weights, *gradients = results
            chosen.av_backward(
                problem,
                given["weights"],
                operands,
                given["grad_output"],
                grad_weights,
                Operands(*gradients),
                allocate,
            )
