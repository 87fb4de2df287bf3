"""What XLA runs for a custom call: the chosen backend, on XLA's memory and XLA's stream."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh import _device
from cuneigh._arrays import numpy_dtype
from cuneigh._backends import choose
from cuneigh._gpu.arrays import contiguous
from cuneigh._ops.launch import known_backends, perform, routine_for
from cuneigh._problem import RESULTS, Spec, size_of
from cuneigh.jax import _arithmetic, _xla
from cuneigh.jax._calls import TARGET, Call


class Request(NamedTuple):
    """A call, and what is the same whenever it is served. XLA's arrays are contiguous."""

    call: Call
    arguments: tuple[Spec, ...]
    results: tuple[Spec, ...]
    wanted: tuple[Spec | None, ...]
    """Those of all results that the operation has, None where not wanted."""
    steps: tuple[tuple[int, ...], ...]
    """Of every argument, the elements from entry to entry along each axis."""

    def native(self, arguments: list[Any], results: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        """What `perform` takes, from the native arrays in XLA's order."""
        made = dict(zip(self.call.results, results, strict=True))
        given = dict(zip(self.call.arguments, arguments, strict=True))
        return given, [made.get(name) for name in RESULTS[self.call.problem.operation]]


@lru_cache(maxsize=4096)
def _request(text: bytes) -> Request:
    call = Call.decoded(text)
    spec = call.problem.spec
    arguments = tuple(map(spec, call.arguments))
    names = RESULTS[call.problem.operation]
    return Request(
        call,
        arguments,
        tuple(map(spec, call.results)),
        tuple(spec(name) if name in call.results else None for name in names),
        tuple(contiguous(argument.shape) for argument in arguments),
    )


def serve_cpu(asked: _xla.Call) -> None:
    """Run a call on arrays in host memory."""
    request = _request(asked.text)
    problem, backend = request.call.problem, request.call.backend
    if problem.is_empty:  # as only a map over nothing is
        return
    arguments = [_host(*pair) for pair in zip(asked.arguments, request.arguments, strict=True)]
    for argument in arguments:
        argument.flags.writeable = False
    results = [_host(*pair) for pair in zip(asked.results, request.results, strict=True)]
    chosen = choose(problem, _device.CPU, backend)
    with _arithmetic.usual():
        perform(chosen, problem, *request.native(arguments, results), _allocate_on_host)


def _host(address: int, spec: Spec) -> npt.NDArray[Any]:
    """The NumPy array at an address."""
    dtype = numpy_dtype(spec.dtype)
    size = prod(spec.shape) * dtype.itemsize
    if not size:
        return np.empty(spec.shape, dtype)
    memory: Any = (ctypes.c_char * size).from_address(address)
    return np.ndarray(spec.shape, dtype, memory)


def _allocate_on_host(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    return np.empty(shape, numpy_dtype(dtype))


def serve_cuda(asked: _xla.Call) -> None:
    """Launch a call on arrays on a GPU; XLA's stream orders it and nothing waits for it here."""
    request = _request(asked.text)
    call = request.call
    if call.problem.is_empty:
        return
    index = asked.device()
    layouts = tuple(
        (steps, address % 16) for steps, address in zip(request.steps, asked.arguments, strict=True)
    )
    # XLA may have a call write a slice of a larger array.
    off = tuple(address % 16 for address in asked.results)
    with _device.current(index):
        known = known_backends()
        asked_for = call.problem, index, call.backend, call.arguments, request.wanted
        launches = routine_for(known, *asked_for).program(layouts, off if any(off) else ())
        workspace = [asked.allocate(size_of(spec)) for spec in launches.workspace]
        launches.run([*asked.arguments, *asked.results, *workspace], asked.stream())


def register() -> None:
    """Make the handlers known to XLA."""
    _xla.register(TARGET, "cpu", serve_cpu)
    _xla.register(TARGET, "CUDA", serve_cuda)
