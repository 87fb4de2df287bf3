"""NumPy arrays on the GPU and back, without a change of their memory layout; backends on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from cuneigh import _device
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.program import Program, cupy_stream
from cuneigh._gpu.records import start_words
from cuneigh._problem import JvpResults, OfResults, Operands, Spec

OPERATIONS = ("forward", "backward", "jvp", "hvp", "qk", "qk_backward", "av", "av_backward")


def to_cupy(array: np.ndarray) -> Any:
    """A CuPy array with the elements and the strides of `array`."""
    import cupy

    low, high = np.lib.array_utils.byte_bounds(array)
    if low == high:
        return cupy.empty(array.shape, array.dtype)
    start = array.__array_interface__["data"][0]
    memory = np.frombuffer((np.ctypeslib.ctypes.c_char * (high - low)).from_address(low), np.uint8)
    copy = cupy.asarray(memory)
    return cupy.ndarray(array.shape, array.dtype, copy.data + (start - low), array.strides)


def to_numpy(array: Any) -> np.ndarray:
    """A contiguous NumPy copy; bytes are moved, so that every dtype works."""
    bits = array.view(f"u{array.itemsize}")
    return bits.get().view(array.dtype)


def allocate(shape: tuple[int, ...], dtype: str) -> Any:
    """An array on the current device, every byte of which is 0xff: NaN in all dtypes."""
    import cupy
    from helpers.strategies import numpy_dtype

    array = cupy.empty(shape, numpy_dtype(dtype))
    array.data.memset(0xFF, array.nbytes)
    return array


def on_arrays(backend: ModuleType) -> Any:
    """`backend`, which makes programs, as one that fills CuPy arrays at once like the CPU's."""
    functions = {name: _at_once(getattr(backend, name, None)) for name in OPERATIONS}
    return SimpleNamespace(NAME=backend.NAME, **functions)


def _at_once(function: Any) -> Callable[..., None]:
    def call(problem: Any, *arguments: Any) -> None:
        import cupy

        *arguments, workspace = arguments
        program, given = Program(_device.cuda(cupy.cuda.runtime.getDevice())), []

        def described(argument: Any) -> Any:
            if isinstance(argument, (Operands, JvpResults, OfResults)):
                return type(argument)(*map(described, argument))
            if argument is None:
                return None
            given.append(argument)
            spec = Spec(argument.shape, argument.dtype.name)
            steps = tuple(stride // argument.itemsize for stride in argument.strides)
            return program.array(spec, steps, argument.data.ptr % 16)

        function(problem, *map(described, arguments), program)
        given += [workspace(*spec) for spec in program.workspace]
        stream = cupy.cuda.get_current_stream().ptr
        words = start_words(problem)
        program.run([*(array.data.ptr for array in given), *words], stream)

    return call


NATIVE = {"to_native": to_cupy, "to_numpy": to_numpy, "allocate": allocate, "adapt": on_arrays}
"""What `run_backend` takes for a backend of the GPU."""


def at_launch(forward: Callable[..., None]) -> Callable[..., None]:
    """`forward`, which fills native arrays at once, for a GPU too: there when it is launched.

    Its last argument is workspace of shape (2, 3).
    """

    def either(problem: Any, operands: Any, output: Any, lse: Any, space: Any) -> None:
        if not isinstance(space, Program):
            forward(problem, operands, output, lse, space((2, 3), "float32"))
            return
        workspace = space.allocate((2, 3), "float32")

        def step(addresses: Any, stream: int) -> None:
            def native(array: Any) -> Any:
                return None if array is None else located(array, addresses)

            with cupy_stream(stream):
                given = Operands(*map(native, operands))
                forward(problem, given, native(output), native(lse), native(workspace))

        space.add(step)

    return either


def located(array: Array, addresses: Sequence[int]) -> Any:
    """The CuPy array that an array of a program is in one run."""
    import cupy
    from helpers.strategies import numpy_dtype

    address = addresses[array.pointer.slot] + array.pointer.offset
    device = cupy.cuda.runtime.getDevice()
    memory = cupy.cuda.UnownedMemory(address, array.size * array.itemsize, None, device)
    start = cupy.cuda.MemoryPointer(memory, 0)
    return cupy.ndarray(array.shape, numpy_dtype(array.dtype), start, array.byte_strides)
