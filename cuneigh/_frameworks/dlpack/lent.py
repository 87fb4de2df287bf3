"""Arrays that another framework lends: NumPy and CuPy arrays on their memory."""

from __future__ import annotations

import ctypes
from math import prod
from typing import Any, NamedTuple

import numpy as np

from cuneigh import _device
from cuneigh._frameworks.contract import dtype_name, host_array, import_cupy, numpy_dtype
from cuneigh._frameworks.dlpack.capsule import Tensor, tensor_in
from cuneigh._gpu.arrays import contiguous
from cuneigh._problem import DTYPES

KINDS = {1: "cpu", 3: "cpu", 2: "cuda", 13: "cuda"}
"""DLPack's kinds of devices: the CPU and its pinned memory, CUDA and its managed memory."""

CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
"""DLPack's kinds of numbers."""


class Place(NamedTuple):
    """The device of an array."""

    kind: str
    """``"cpu"`` or ``"cuda"``."""
    number: int
    """Of the CUDA device."""

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.number}"


def speaks_dlpack(kind: type) -> bool:
    """Whether arrays of this type have what DLPack asks for."""
    return hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__")


def place_of(array: Any) -> Place:
    """The device of `array`; ValueError for one that is not known here."""
    if not speaks_dlpack(type(array)):
        import_cupy()
        return Place("cuda", _device_of(array.__cuda_array_interface__["data"][0]))
    kind, index = array.__dlpack_device__()
    return _place(int(kind), index or 0)  # some CPUs have the number None


def _place(kind: int, index: int) -> Place:
    if kind not in KINDS:
        raise ValueError(
            f"it is on a device of DLPack's kind {kind}; the CPU (kinds 1 and 3) or a CUDA device "
            f"(2 and 13) is needed"
        )
    return Place(KINDS[kind], 0 if KINDS[kind] == "cpu" else index)


def _device_of(address: int) -> int:
    """The number of the CUDA device that the memory at `address` is on."""
    from cupy.cuda import runtime

    if not address:  # of an array without elements
        return int(runtime.getDevice())
    return int(runtime.pointerGetAttributes(address).device)


def borrow(array: Any, place: Place) -> Any:
    """`array`, which is at `place`, as a NumPy array, or a CuPy array where that is a GPU.

    It keeps the memory. On a GPU its numbers are there for CuPy's current stream.
    """
    if not speaks_dlpack(type(array)):
        return _by_interface(array, place.number)
    if place.kind == "cpu":
        capsule = _ask(array)
    else:
        import_cupy()
        import cupy

        with _device.current(place.number):
            # The protocol calls CUDA's default stream 1.
            capsule = _ask(array, stream=cupy.cuda.get_current_stream().ptr or 1)
    tensor = tensor_in(capsule)
    found = _place(tensor.device.kind, tensor.device.index)
    if found != place:
        raise BufferError(f"it is on device {place}, but gave memory on device {found}")
    dtype = numpy_dtype(_supported(_dtype_name(tensor)))
    shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
    strides = _strides(tensor, dtype.itemsize) if tensor.strides else contiguous(shape)
    address = (tensor.data or 0) + tensor.byte_offset
    if place.kind == "cpu":
        return host_array(capsule, address, shape, strides, dtype, writeable=False)
    return _on_gpu(capsule, address, shape, strides, dtype, place.number)


def _strides(tensor: Tensor, itemsize: int) -> tuple[int, ...]:
    """Elements from one index to the next along each axis.

    CuPy, up to 14.2 at least, divides bytes as unsigned numbers: of a reversed axis comes a stride
    of nearly 2^62 for -1, which is right in multiples of 2^64 bytes.
    """
    return tuple(
        ctypes.c_int64(stride * itemsize).value // itemsize
        for stride in tensor.strides[: tensor.ndim]
    )


def _ask(array: Any, **stream: int) -> Any:
    """A capsule, of the newest kind that the framework knows."""
    try:
        return array.__dlpack__(**stream, max_version=(1, 0))
    except (TypeError, ValueError):  # what those raise that know the older kind only
        return array.__dlpack__(**stream)


def _dtype_name(tensor: Tensor) -> str:
    code, bits, lanes = tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes
    name = f"{CODES[code]}{bits}" if code in CODES else f"number {code} of DLPack ({bits} bits)"
    if (code, bits) == (6, 8):
        name = "bool"
    return name if lanes == 1 else f"{name} in vectors of {lanes}"


def _supported(dtype: str) -> str:
    if dtype not in DTYPES and dtype != "bool":
        raise TypeError(f"it has dtype {dtype}, which is not one of {', '.join(DTYPES)}")
    return dtype


def _on_gpu(
    capsule: Any,
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
    index: int,
) -> Any:
    import cupy

    with _device.current(index):
        if not prod(shape):
            return cupy.empty(shape, dtype)
        strides = tuple(stride * dtype.itemsize for stride in strides)
        offsets = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
        first = sum(offset for offset in offsets if offset < 0)
        size = sum(map(abs, offsets)) + dtype.itemsize
        memory = cupy.cuda.UnownedMemory(address + first, size, capsule, index)
        pointer = cupy.cuda.MemoryPointer(memory, -first)
        return cupy.ndarray(shape, dtype, pointer, strides)


def _by_interface(array: Any, index: int) -> Any:
    """`array` by ``__cuda_array_interface__``, by which CuPy's current stream waits for its own."""
    import cupy

    described = array.__cuda_array_interface__
    if described.get("mask") is not None:
        raise TypeError("it has a mask, which cannot be taken into account")
    _supported(dtype_name(np.dtype(described["typestr"])))
    with _device.current(index):
        return cupy.asarray(array)
