"""What every public function shares: its three ranks, and the way from arguments to results."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from cuneigh._arrays import Arguments, GpuFace, HostFace, Launcher, Watcher, meet
from cuneigh._backends import choose
from cuneigh._device import CPU, current
from cuneigh._ops.launch import perform, program
from cuneigh._problem import Problem, Spec, finite_scale

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
    face, place = arguments.face, arguments.place
    device = face.device(place)
    if problem.is_empty:
        if device is not None:
            choose(problem, device, backend)  # raises what any other problem would
        values = (0.0, -math.inf) if problem.operation == "forward" else repeat(0.0)
        return [
            None if spec is None else face.full(place, *spec, value)
            for spec, value in zip(results, values, strict=False)
        ]
    if isinstance(face, Launcher):
        if device is not None:
            choose(problem, device, backend)
        return face.launch(arguments, problem, backend, results)
    assert device is not None, "only a launcher hides where its arrays are"
    if device.kind == "cpu":
        return _on_host(cast(HostFace, face), arguments, problem, backend, results)
    return _on_gpu(cast(GpuFace, face), device.index, arguments, problem, backend, results)


def _on_host(
    face: HostFace,
    arguments: Arguments,
    problem: Problem,
    backend: str | None,
    results: Sequence[Spec | None],
) -> list[Any]:
    place = arguments.place

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        return face.borrow(face.empty(place, shape, dtype))

    chosen = choose(problem, CPU, backend)
    given = {name: face.borrow(array) for name, array in arguments.arrays.items()}
    made = [None if spec is None else face.empty(place, *spec) for spec in results]
    native = [None if array is None else face.borrow(array) for array in made]
    perform(chosen, problem, given, native, allocate)
    return made


def _on_gpu(
    face: GpuFace,
    index: int,
    arguments: Arguments,
    problem: Problem,
    backend: str | None,
    results: Sequence[Spec | None],
) -> list[Any]:
    """What every warm call does; how long it takes is how long the host takes for a call."""
    place, arrays = arguments.place, arguments.arrays
    with current(index):
        memories = [face.memory(array) for array in arrays.values()]
        layouts = tuple([(steps, address % 16) for address, steps, _ in memories])
        launches = program(problem, index, backend, tuple(arrays), layouts, tuple(results))
        made = [None if spec is None else face.empty(place, *spec) for spec in results]
        workspace = [face.empty(place, *spec) for spec in launches.workspace]
        addresses = [address for address, _, _ in memories]
        addresses += [face.address(array) for array in made if array is not None]
        addresses += [face.address(array) for array in workspace]
        launches.run(addresses, face.stream(place))
    return made
