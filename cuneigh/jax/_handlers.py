"""What XLA runs for a custom call: the chosen backend, on XLA's memory and XLA's stream."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh import _device
from cuneigh._arrays import import_cupy, numpy_dtype
from cuneigh._backends import choose
from cuneigh._ops.call import launch
from cuneigh._problem import Spec
from cuneigh.jax import _arithmetic, _xla
from cuneigh.jax._calls import RESULTS, TARGET, Call


class Request(NamedTuple):
    """A call and the specs of its arrays, in XLA's order."""

    call: Call
    arguments: tuple[Spec, ...]
    results: tuple[Spec, ...]

    def native(self, arguments: list[Any], results: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        """What `launch` takes, from the native arrays in XLA's order."""
        made = dict(zip(self.call.results, results, strict=True))
        given = dict(zip(self.call.arguments, arguments, strict=True))
        return given, [made.get(name) for name in RESULTS[self.call.problem.operation]]


@lru_cache(maxsize=4096)
def _request(text: bytes) -> Request:
    call = Call.decoded(text)
    return Request(call, tuple(map(call.spec, call.arguments)), tuple(map(call.spec, call.results)))


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
        launch(chosen, problem, *request.native(arguments, results), _allocate_on_host)


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


class Stream(NamedTuple):
    """A CUDA stream in the form that CuPy takes."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def serve_cuda(asked: _xla.Call) -> None:
    """Launch a call on arrays on a GPU; XLA's stream orders it and nothing waits for it here."""
    request = _request(asked.text)
    problem, backend = request.call.problem, request.call.backend
    if problem.is_empty:
        return
    cuda, index = import_cupy().cuda, asked.device()

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        size = prod(shape) * numpy_dtype(dtype).itemsize
        return _on_device(asked.allocate(size) if size else 0, Spec(shape, dtype), index)

    # XLA has made the device current by pushing its context. To make it current once more would
    # outlast that, and leave the caller's thread on it.
    is_current = cuda.runtime.getDevice() == index
    device = nullcontext() if is_current else cuda.Device(index)
    with device, cuda.Stream.from_external(Stream(asked.stream())):
        arguments, results = (
            [_on_device(*pair, index) for pair in zip(addresses, specs, strict=True)]
            for addresses, specs in (
                (asked.arguments, request.arguments),
                (asked.results, request.results),
            )
        )
        chosen = choose(problem, _device.cuda(index), backend)
        launch(chosen, problem, *request.native(arguments, results), allocate)


def _on_device(address: int, spec: Spec, index: int) -> Any:
    """The CuPy array at an address."""
    cupy = import_cupy()
    dtype = numpy_dtype(spec.dtype)
    memory = cupy.cuda.UnownedMemory(address, prod(spec.shape) * dtype.itemsize, None, index)
    return cupy.ndarray(spec.shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def register() -> None:
    """Make the handlers known to XLA."""
    _xla.register(TARGET, "cpu", serve_cpu)
    _xla.register(TARGET, "CUDA", serve_cuda)
