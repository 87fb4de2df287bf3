"""What XLA runs for a custom call: the chosen backend, on XLA's memory and XLA's stream."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jax._src.export import _export

from cuneigh import _device
from cuneigh._backends import choose
from cuneigh._frameworks.contract import numpy_dtype
from cuneigh._frameworks.jax import arithmetic, xla
from cuneigh._frameworks.jax.calls import TARGET, CustomCall
from cuneigh._gpu.arrays import contiguous
from cuneigh._gpu.records import start_words
from cuneigh._parameters import check_part
from cuneigh._problem import ARRAYS, STARTS, Spec, size_of
from cuneigh._programs import compile_gradient, known_backends, perform, program_for


class Request(NamedTuple):
    """A call, and what is the same whenever it is served. XLA's arrays are contiguous."""

    call: CustomCall
    arguments: tuple[Spec, ...]
    """Without the starts, which come after them if they are known only now."""
    starts: Spec | None
    results: tuple[Spec, ...]
    wanted: tuple[Spec | None, ...]
    """Of every result that the operation has; None where not wanted."""
    strides: tuple[tuple[int, ...], ...]
    """Of every argument, in elements."""


Read = Callable[[int, Spec], npt.NDArray[Any]]
"""Gives the numbers of the array at an address."""


def request_of(asked: xla.Call, read: Read) -> Request:
    """What is asked for, with the starts of this time."""
    request = _request(asked.text) or _request(asked.text, asked.shapes())
    assert request is not None, "whatever is a symbol, the shapes tell"
    if request.starts is None:
        return request
    query_start, key_start = read(asked.arguments[-1], request.starts).tolist()
    return _at(request, tuple(query_start), tuple(key_start))


LIMITS = -(2**31), 2**31 - 1
"""The first and last int32. A start that is either of them has been beyond."""


@lru_cache(maxsize=4096)
def _at(request: Request, query_start: tuple[int, ...], key_start: tuple[int, ...]) -> Request:
    """A request with these starts."""
    problem = request.call.problem
    call = f"na{problem.rank}d"
    if problem.operation != "forward":
        call += f"_{problem.operation}"
    for number, axis in enumerate(problem.axes):
        where, starts = f"on axis {number}", (query_start[number], key_start[number])
        check_part(call, where, axis, False, *starts)
        for name, start in zip(("query_start", "key_start"), starts, strict=True):
            if start in LIMITS:
                raise ValueError(f"{call}: {name} {where} is {start} or beyond")
    moved = replace(request.call, problem=problem.at(query_start, key_start))
    return request._replace(call=moved)


@lru_cache(maxsize=4096)
def _request(text: bytes, shapes: tuple[tuple[int, ...], ...] = ()) -> Request | None:
    """What `text` asks for; None if that depends on the shapes of arguments, and none are given."""
    call = CustomCall.decoded(text, shapes)
    if call is None:
        return None
    spec = call.problem.spec
    given = tuple(name for name in call.arguments if name != STARTS)
    starts = spec(STARTS) if STARTS in call.arguments else None
    call = replace(call, arguments=given)
    arguments = tuple(map(spec, given))
    names = ARRAYS[call.problem.operation].results
    return Request(
        call,
        arguments,
        starts,
        tuple(map(spec, call.results)),
        tuple(spec(name) if name in call.results else None for name in names),
        tuple(contiguous(argument.shape) for argument in arguments),
    )


def serve_cpu(asked: xla.Call) -> None:
    """Run a call on arrays in host memory."""
    request = request_of(asked, _host)
    problem, backend = request.call.problem, request.call.backend
    arguments = map(_host, asked.arguments, request.arguments)  # without the starts
    given = dict(zip(request.call.arguments, arguments, strict=True))
    for argument in given.values():
        argument.flags.writeable = False
    results = dict(
        zip(request.call.results, map(_host, asked.results, request.results), strict=True)
    )
    chosen = choose(problem, _device.CPU, backend)
    with arithmetic.usual():
        perform(chosen, problem, given, results, _allocate_on_host)


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


def serve_cuda(asked: xla.Call) -> None:
    """Launch a call on arrays on a GPU; XLA's stream orders it and nothing waits for it here."""
    from cupy.cuda import runtime

    # Its own number may be another one: XLA counts the devices that JAX was told to use.
    index = int(runtime.pointerGetAttributes(asked.results[0]).device)
    stream = asked.stream()
    with _device.current(index):
        request = request_of(asked, partial(_from_device, stream))
    call = request.call
    addresses = asked.arguments[: len(request.arguments)]
    layouts = tuple(
        (strides, address % 16) for strides, address in zip(request.strides, addresses, strict=True)
    )
    # XLA may have a call write a slice of a larger array.
    off = tuple(address % 16 for address in asked.results)
    problem = call.problem.anywhere
    with _device.current(index):
        program = program_for(
            known_backends(),
            problem,
            index,
            call.backend,
            call.arguments,
            request.wanted,
            layouts,
            off if any(off) else (),
        )
        if not program.is_loaded:
            program.compile()
            if "lse" in call.results:  # as where the call is differentiated
                arguments = problem, index, call.backend, call.arguments
                compile_gradient(*arguments, layouts)
        workspace = [asked.allocate(size_of(spec)) for spec in program.workspace]
        addresses = [*addresses, *asked.results, *workspace, *start_words(call.problem)]
        program.run(addresses, stream)


def _from_device(stream: int, address: int, spec: Spec) -> npt.NDArray[Any]:
    """The numbers at an address, for which this waits.

    Launches have starts among their parameters, and the stream computes them.
    """
    from cupy.cuda import runtime

    numbers = np.empty(spec.shape, numpy_dtype(spec.dtype))
    to_host = runtime.memcpyDeviceToHost
    runtime.memcpyAsync(numbers.ctypes.data, address, numbers.nbytes, to_host, stream)
    runtime.streamSynchronize(stream)
    return numbers


def register() -> None:
    """Make the handlers known to XLA."""
    xla.register(TARGET, "cpu", serve_cpu)
    xla.register(TARGET, "CUDA", serve_cuda)
    # JAX exports programs with calls only of those it is told will mean the same for ever.
    stable: set[str] = getattr(_export, "_CUSTOM_CALL_TARGETS_GUARANTEED_STABLE", set())
    stable.add(TARGET)
