"""What XLA runs for a custom call: the chosen backend, on XLA's memory and XLA's stream."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jax._src.export import _export

from cuneigh import _device
from cuneigh._backends import choose
from cuneigh._call import compile_gradient, known_backends, perform, program_for
from cuneigh._frameworks.contract import numpy_dtype
from cuneigh._frameworks.jax import arithmetic, xla
from cuneigh._frameworks.jax.calls import TARGET, CustomCall
from cuneigh._gpu.arrays import contiguous
from cuneigh._gpu.records import start_words
from cuneigh._problem import ARRAYS, Spec, size_of


class Request(NamedTuple):
    """A call, and what is the same whenever it is served. XLA's arrays are contiguous."""

    call: CustomCall
    arguments: tuple[Spec, ...]
    results: tuple[Spec, ...]
    wanted: tuple[Spec | None, ...]
    """Of every result that the operation has; None where not wanted."""
    strides: tuple[tuple[int, ...], ...]
    """Of every argument, in elements."""


def request_of(asked: xla.Call) -> Request:
    return _request(asked.text) or _request(asked.text, asked.shapes())  # type: ignore[return-value]


@lru_cache(maxsize=4096)
def _request(text: bytes, shapes: tuple[tuple[int, ...], ...] = ()) -> Request | None:
    """What `text` asks for; None if that depends on the shapes of arguments, and none are given."""
    call = CustomCall.decoded(text, shapes)
    if call is None:
        return None
    spec = call.problem.spec
    arguments = tuple(map(spec, call.arguments))
    names = ARRAYS[call.problem.operation].results
    return Request(
        call,
        arguments,
        tuple(map(spec, call.results)),
        tuple(spec(name) if name in call.results else None for name in names),
        tuple(contiguous(argument.shape) for argument in arguments),
    )


def serve_cpu(asked: xla.Call) -> None:
    """Run a call on arrays in host memory."""
    request = request_of(asked)
    problem, backend = request.call.problem, request.call.backend
    arguments = map(_host, asked.arguments, request.arguments)
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

    request = request_of(asked)
    call = request.call
    # Its own number may be another one: XLA counts the devices that JAX was told to use.
    index = int(runtime.pointerGetAttributes(asked.results[0]).device)
    layouts = tuple(
        (strides, address % 16)
        for strides, address in zip(request.strides, asked.arguments, strict=True)
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
        addresses = [*asked.arguments, *asked.results, *workspace, *start_words(call.problem)]
        program.run(addresses, asked.stream())


def register() -> None:
    """Make the handlers known to XLA."""
    xla.register(TARGET, "cpu", serve_cpu)
    xla.register(TARGET, "CUDA", serve_cuda)
    # JAX exports programs with calls only of those it is told will mean the same for ever.
    stable: set[str] = getattr(_export, "_CUSTOM_CALL_TARGETS_GUARANTEED_STABLE", set())
    stable.add(TARGET)
