"""What every public function shares: its three ranks, and the way from arguments to results."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import compress, repeat
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from cuneigh._arrays import Arguments, Face, GpuFace, HostFace, Launcher, Watcher, meet
from cuneigh._backends import choose
from cuneigh._device import CPU, Device, current
from cuneigh._ops.launch import Routine, known_backends, perform, routine_for
from cuneigh._problem import GRADIENT, RESULTS, Problem, Spec, finite_scale

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


class Call:
    """A call apart from its arrays: it serves every call like it."""

    def __init__(
        self,
        name: str,
        face: Face,
        place: Any,
        arguments: tuple[str, ...],
        problem: Problem,
        backend: str | None,
        results: Sequence[Spec | None],
    ) -> None:
        if backend is not None and not isinstance(backend, str):
            raise TypeError(f"{name}: backend={backend!r} is {type(backend).__name__}, not a str")
        self.name = name
        """Of the public function."""
        self.face, self.place = face, place
        self.arguments = arguments
        """The names of the arrays that it takes, in their order."""
        self.problem, self.backend = problem, backend
        self.results = tuple(results)
        """Those of all results that the operation has, None where not wanted."""
        self._gradients: dict[tuple[bool, ...], Call] = {}

    def compute(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays of the caller's framework for the results, None where that is None.

        A framework that watches the arguments, to differentiate or to trace the call, comes first.
        """
        face = self.face
        if isinstance(face, Watcher) and face.watches(arrays):
            return face.record(self, arrays)
        return self.run(arrays)

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """`compute` without anybody watching: the chosen backend fills the results.

        A problem that is empty launches nothing: its results are those of no keys at all.
        """
        face, problem, device = self.face, self.problem, self._device
        if device is not None and (problem.is_empty or isinstance(face, Launcher)):
            choose(problem, device, self.backend)  # raises what any other problem would
        if problem.is_empty:
            values = (0.0, -math.inf) if problem.operation == "forward" else repeat(0.0)
            return [
                None if spec is None else face.full(self.place, *spec, value)
                for spec, value in zip(self.results, values, strict=False)
            ]
        if isinstance(face, Launcher):
            return face.launch(self, arrays)
        assert device is not None, "only a launcher hides where its arrays are"
        if device.kind == "cpu":
            return self._on_host(cast(HostFace, face), arrays)
        return self._on_gpu(cast(GpuFace, face), device.index, arrays)

    @cached_property
    def with_lse(self) -> Call:
        """The same call with all results of the operation, which is ``forward``."""
        results = self.problem.output, self.problem.lse
        return Call(
            self.name, self.face, self.place, self.arguments, self.problem, self.backend, results
        )

    def gradient(self, given: tuple[bool, ...]) -> Call:
        """The call for the gradients of the arguments.

        Its own arguments are those of this one, its results if the operation is ``forward``, and
        then the gradients of its results, as far as they are `given`.
        """
        call = self._gradients.get(given)
        if call is None:
            problem, operation = self.problem.gradient, self.problem.operation
            names = self.arguments
            if operation == "forward":
                names += RESULTS[operation]
            names += tuple(compress(GRADIENT[operation][1], given))
            results = (problem.logits, *problem.specs) if operation == "av" else problem.specs
            call = Call(self.name, self.face, self.place, names, problem, self.backend, results)
            self._gradients[given] = call
        return call

    @cached_property
    def _routine(self) -> Routine:
        assert self._device is not None, "only a launcher hides where its arrays are"
        index = self._device.index
        return routine_for(
            known_backends(), self.problem, index, self.backend, self.arguments, self.results
        )

    @cached_property
    def _device(self) -> Device | None:
        return self.face.device(self.place)

    def _on_host(self, face: HostFace, arrays: Sequence[Any]) -> list[Any]:
        place = self.place

        def allocate(shape: tuple[int, ...], dtype: str) -> Any:
            return face.borrow(face.empty(place, shape, dtype))

        chosen = choose(self.problem, CPU, self.backend)
        given = dict(zip(self.arguments, map(face.borrow, arrays), strict=True))
        made = [None if spec is None else face.empty(place, *spec) for spec in self.results]
        native = [None if array is None else face.borrow(array) for array in made]
        perform(chosen, self.problem, given, native, allocate)
        return made

    def _on_gpu(self, face: GpuFace, index: int, arrays: Sequence[Any]) -> list[Any]:
        """What every warm call does; how long it takes is how long the host takes for a call."""
        place, routine = self.place, self._routine
        with current(index):
            addresses, layouts, kept = face.memory(arrays)
            program = routine.program(layouts)
            made = face.allocate(place, (*self.results, *program.workspace), addresses)
            program.run(addresses, face.stream(place))
        del kept  # its memory goes only to what comes after these launches
        return made[: len(self.results)]


def call_of(
    name: str,
    arguments: Arguments,
    problem: Problem,
    backend: str | None,
    results: Sequence[Spec | None],
) -> Call:
    """The call of the public function `name` with these arguments."""
    face, place, arrays, _ = arguments
    return Call(name, face, place, tuple(arrays), problem, backend, results)


def compute(
    name: str,
    arguments: Arguments,
    problem: Problem,
    backend: str | None,
    results: Sequence[Spec | None],
) -> list[Any]:
    """Arrays of the caller's framework for `results`, None where that is None."""
    call = call_of(name, arguments, problem, backend, results)
    return call.compute(tuple(arguments.arrays.values()))
