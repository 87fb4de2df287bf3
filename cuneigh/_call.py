"""The path of a call, from the arrays of a framework to what a backend launches, in order.

1. `results_of` makes a signature of the arguments and finds the `Call` of an earlier call like it.
   Only where there is none are the arguments examined.
2. `Call.compute` gives the call to the framework if that must see it, to differentiate or to trace.
3. `Call.run` has a backend compute on the CPU. On a GPU it asks the framework's adapter where the
   arrays lie, finds the `Program` for arrays that are laid out so, has the adapter allocate results
   and workspace, and runs the program, which launches the kernels.
4. `program_for` (`_programs`) makes such a program once: it chooses the backend and records what
   that launches.

Kernels that a program lacks are compiled side by side, and with those of a call that PyTorch is
going to differentiate those of its gradient.

Adapters are known here by their contract only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cached_property, partial
from itertools import compress
from typing import Any, TypeVar

from cuneigh import _backends, _device
from cuneigh._backends import NoBackendError, choose, serving
from cuneigh._device import current
from cuneigh._frameworks.contract import SEEN, Adapter, Layout, NoMemoryError
from cuneigh._gpu.program import Program
from cuneigh._gpu.records import start_words
from cuneigh._messages import shown
from cuneigh._problem import ARRAYS, TANGENTS, Problem, Spec
from cuneigh._programs import compile_gradient, known_backends, perform, program_for

KEPT = 4096
"""Calls that are kept, and programs of each."""

WITH_KEY_GRADIENTS: ContextVar[Callable[[Sequence[Any]], None] | None] = ContextVar(
    "WITH_KEY_GRADIENTS", default=None
)
"""Called by a backward, with all its results, once what fills the gradients of keys and values is
launched and before the rest is. Not called where these come with the rest or are computed at once,
on the CPU."""

Examine = Callable[[tuple[Any, ...], Sequence[Any]], tuple["Call", Sequence[Any]]]
"""From the parameters and the array arguments of a public function, None for those not given, to
its call and the arrays that this takes."""


_calls: dict[Any, Call] = {}
"""By their signatures."""


def results_of(parameters: tuple[Any, ...], arrays: Sequence[Any], examine: Examine) -> list[Any]:
    """The results of a call of a public function, None for those that are not wanted.

    `examine` is asked about the call unless there was one like it. The last two parameters are
    where parts of a layout start: a call that differs in them alone is like another one, too.
    """
    signature = _signature(parameters, arrays)
    call = None if signature is None else _calls.get(signature)
    if call is not None:
        moved = call.at(parameters[-2:])
        if moved is not None:
            return moved.compute([array for array in arrays if array is not None])
    call, given = examine(parameters, arrays)
    call.starts = parameters[-2:]
    if signature is not None:
        if len(_calls) == KEPT:
            _calls.clear()
        _calls[signature] = call
    return call.compute(given)


def _signature(parameters: tuple[Any, ...], arrays: Sequence[Any]) -> tuple[Any, ...] | None:
    """What tells a call from all that are not served alike; None if only examining it can."""
    adapter = SEEN.get(type(arrays[0]))
    if adapter is None:
        return None
    of_arrays = adapter.signature(arrays)
    if of_arrays is None:
        return None
    # An int is equal to a float and to a bool, which are not legal in its place.
    types = tuple(map(type, parameters))
    if tuple in types:
        types += tuple([type(one) for many in parameters if type(many) is tuple for one in many])
    if not _EXACT.issuperset(types):
        return None
    return of_arrays, parameters[:-2], types, known_backends()


_EXACT = frozenset([bool, int, float, str, tuple, type(None)])
"""Types of parameters that are equal for ever if they are equal now."""


class Call:
    """A call of a public function apart from its arrays: it serves every call like it."""

    def __init__(
        self,
        name: str,
        adapter: Adapter,
        own_device: Any,
        arguments: tuple[str, ...],
        problem: Problem,
        backend: str | None,
        results: Sequence[Spec | None],
    ) -> None:
        if backend is not None and not isinstance(backend, str):
            kind = type(backend).__name__
            raise TypeError(f"{name}: backend={shown(backend)} is {kind}, not a str")
        if reason := _backends.unknown(backend):
            raise ValueError(f"{name}: {reason}")
        self.name = name
        """Of the public function."""
        self.adapter, self.own_device = adapter, own_device
        self.arguments = arguments
        """The names of the arrays that it takes, in their order."""
        self.problem = problem  # a call at other starts makes it when it is needed
        self.backend = backend
        self.results = tuple(results)
        """Of every result that the operation has; None where not wanted."""
        self.follows = False
        """Whether it is a backward whose `output` and `lse` are those of a forward of its operands,
        and change as these do."""
        self.is_differentiated = False
        """Whether a call for the gradients is expected to follow."""
        self.starts: tuple[Any, ...] = ()
        """`query_start` and `key_start` of the public function, if they are known."""
        self._programs: dict[tuple[Layout, ...], Program] = {}
        self._gradients: dict[tuple[bool, ...], Call] = {}
        self.derived: dict[Any, Call] = {}
        """Calls that derivatives of this one take, by what they are told."""

    def compute(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays of the caller's framework for the results, None where not wanted.

        A framework that watches the arguments, to differentiate or to trace the call, comes first.
        """
        if self.adapter.watches(arrays):
            try:
                return self.adapter.record(self, arrays)
            except NoBackendError as error:
                raise RuntimeError(f"{self.name}: {error}") from None
        return self.run(arrays)

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """`compute` without the framework watching: the chosen backend fills the results.

        A problem that is empty launches nothing: its results are those of no keys at all.
        """
        try:
            return self._run(arrays)
        except NoBackendError as error:
            raise RuntimeError(f"{self.name}: {error}") from None
        except NoMemoryError:
            for name, array in zip(self.arguments, arrays, strict=True):
                self.adapter.check(self.name, name, array, borrowed=True)
            raise

    def _run(self, arrays: Sequence[Any]) -> list[Any]:
        adapter, device = self.adapter, self._device
        if device is not None and (self._is_empty or adapter.launches):
            choose(self.problem, device, self.backend)  # raises what any other problem would
        if self._is_empty:
            names = ARRAYS[self.problem.operation].results
            return [
                None if spec is None else adapter.full(self.own_device, *spec, of_nothing(name))
                for name, spec in zip(names, self.results, strict=True)
            ]
        if adapter.launches:
            return adapter.launch(self, arrays)
        assert device is not None, "an adapter that does not launch knows where its arrays are"
        if device.kind == "cpu":
            return self._on_host(device, arrays)
        return self._on_gpu(device.index, arrays)

    def _on_gpu(self, device: int, arrays: Sequence[Any]) -> list[Any]:
        adapter, own_device = self.adapter, self.own_device
        with current(device):
            addresses, layouts, owners = adapter.memory(arrays)
            program = self._programs.get(layouts) or self._program(device, layouts)
            made = adapter.allocate(own_device, (*self.results, *program.workspace), addresses)
            addresses.extend(self._start_words)
            early = WITH_KEY_GRADIENTS.get()
            after_keys = None if early is None else partial(early, made[: len(self.results)])
            program.run(addresses, adapter.stream(own_device), after_keys)
        del owners  # whose memory goes only to what comes after these launches
        return made[: len(self.results)]

    def _program(self, device: int, layouts: tuple[Layout, ...]) -> Program:
        problem = self.problem.anywhere
        program = program_for(
            known_backends(),
            problem,
            device,
            self.backend,
            self.arguments,
            self.results,
            layouts,
        )
        program.compile()
        if self.is_differentiated:
            compile_gradient(problem, device, self.backend, self.arguments, layouts)
        if len(self._programs) == KEPT:
            self._programs.clear()
        self._programs[layouts] = program
        return program

    def _on_host(self, device: _device.Device, arrays: Sequence[Any]) -> list[Any]:
        adapter, own_device = self.adapter, self.own_device

        def allocate(shape: tuple[int, ...], dtype: str) -> Any:
            return adapter.borrow(adapter.empty(own_device, shape, dtype))

        chosen = choose(self.problem, device, self.backend)
        arguments = dict(zip(self.arguments, map(adapter.borrow, arrays), strict=True))
        made = [None if spec is None else adapter.empty(own_device, *spec) for spec in self.results]
        native = [None if array is None else adapter.borrow(array) for array in made]
        results = dict(zip(ARRAYS[self.problem.operation].results, native, strict=True))
        before = _device.HOST_THREADS.set(adapter.threads())
        try:
            perform(chosen, self.problem, arguments, results, allocate)
        finally:
            _device.HOST_THREADS.reset(before)
        return made

    @cached_property
    def _is_empty(self) -> bool:
        return self.problem.is_empty

    @cached_property
    def _start_words(self) -> tuple[int, ...]:
        return start_words(self.problem)

    @cached_property
    def _device(self) -> _device.Device | None:
        return self.adapter.device(self.own_device)

    # Parts of a layout

    def at(self, starts: tuple[Any, ...]) -> Call | None:
        """The call on parts that start elsewhere; None if only examining it can tell.

        It runs the programs of this one, so that nothing is planned.
        """
        if starts == self.starts:  # and of the same types, for these belong to the signature
            return self
        movable = self._movable
        if movable is None:
            return None
        query, key = starts
        if type(query) is not tuple:
            query = (query,) * len(movable)
        if type(key) is not tuple:
            key = (key,) * len(movable)
        if not len(query) == len(key) == len(movable):
            return None
        words: list[int] = []
        for (last_query, last_key, turns), i, j in zip(movable, query, key, strict=True):
            if not (type(i) is type(j) is int and 0 <= i <= last_query and 0 <= j <= last_key):
                return None
            words += (i | j << 32, turns)
        assert self._is_empty is not None  # the copy has what does not depend on the starts
        moved = Call.__new__(Call)  # `copy.copy` takes twice as long as all else here
        held = vars(moved)
        held.update(vars(self))
        held.pop("problem", None)
        held.pop("with_lse", None)
        held.pop("tangent", None)
        held.update(
            starts=starts,
            _parts=(self, query, key),
            _gradients={},
            derived={},
            _start_words=tuple(words),
        )
        return moved

    @cached_property
    def problem(self) -> Problem:
        origin, query, key = self._parts
        return origin.problem.at(query, key)

    _parts: tuple[Call, tuple[int, ...], tuple[int, ...]]
    """The call of which this is one on other parts, and where these start."""

    @cached_property
    def _movable(self) -> tuple[tuple[int, int, int], ...] | None:
        """For every axis the last legal starts, and the other word of `start_words`.

        None where another start may need another program.
        """
        axes = self.problem.axes
        if not all(axis.is_part_anywhere and axis.border != "wrap" for axis in axes):
            return None
        lasts = [(axis.layout - axis.length, axis.layout - axis.key_length) for axis in axes]
        turns = self._start_words[1::2]
        return tuple((*last, word) for last, word in zip(lasts, turns, strict=True))

    # For adapters that differentiate

    @cached_property
    def with_lse(self) -> Call:
        """The call to make, of a forward or a jvp, if its gradient is to be called, too."""
        call = self._with_all_results(self.arguments, self.problem)
        call.is_differentiated = self.problem.operation == "forward"
        return call

    @cached_property
    def tangent(self) -> Call:
        """The call for the results of a forward, those that are wanted here, and their tangents.

        Its own arguments are those of this one, and then the tangents of all that can have some.
        """
        problem = self.problem.but("jvp")
        return Call(
            self.name,
            self.adapter,
            self.own_device,
            (*self.arguments, *filter(problem.has, TANGENTS)),
            problem,
            serving(self.backend, problem),
            (*self.results, *self.results),
        )

    def gradient(self, given: tuple[bool, ...]) -> Call:
        """The call for the gradients of the arguments, in the order of the arguments.

        Its own arguments are those of this one, its results if the operation is ``forward``, and
        then the gradients of its results, as far as they are `given`.
        """
        call = self._gradients.get(given)
        if call is None:
            arrays = ARRAYS[self.problem.operation]
            results = arrays.results if self.problem.operation == "forward" else ()
            names = (*self.arguments, *results, *compress(arrays.incoming, given))
            call = self._gradients[given] = self._with_all_results(names, self.problem.gradient)
            call.follows = self.problem.operation == "forward"
        return call

    def _with_all_results(self, arguments: tuple[str, ...], problem: Problem) -> Call:
        return Call(
            self.name,
            self.adapter,
            self.own_device,
            arguments,
            problem,
            self.backend,
            problem.results,
        )


def of_nothing(result: str) -> float:
    """What the result called `result` holds where there are no keys at all."""
    return -math.inf if result in ("lse", "logits") else 0.0


def forget() -> None:
    """Have every call choose its backend and record its program anew."""
    _calls.clear()
    program_for.cache_clear()
    _backends._choose.cache_clear()


# For torch.compile

F = TypeVar("F", bound=Callable[..., Any])

OPAQUE: list[Callable[..., Any]] = []
"""Functions that torch.compile is to call with the tensors of its trace, and not to look into."""


def opaque(function: F) -> F:
    """`function`, which becomes one of `OPAQUE`."""
    OPAQUE.append(function)
    return function
