"""Tensor maps: how the TMA unit of sm_90 and later finds boxes of an array in memory.

A kernel takes one as `const __grid_constant__ TensorMap`. The driver encodes it for one address, so
a launch encodes it when an address is new and keeps the last few that it has encoded.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

from cuneigh._device import driver_library
from cuneigh._gpu.arrays import Pointer

BYTES, ALIGNMENT = 128, 64
"""The size of an encoded tensor map, and what its address must be a multiple of."""

KEPT = 64
"""Addresses for which a launch keeps the encoded map."""

DTYPE_CODES = {"float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}
"""CUtensorMapDataType."""

SWIZZLE_CODES = {0: 0, 32: 1, 64: 2, 128: 3}
"""CUtensorMapSwizzle, by the bytes within which 16-byte chunks change places."""

NO_INTERLEAVE, L2_PROMOTION_128B, ZEROS_OUT_OF_BOUNDS = 0, 2, 0


@dataclass(frozen=True)
class TensorMap:
    """A parameter of a kernel: an array of up to five axes, of which boxes are moved.

    Axes are listed from the innermost one, whose elements are contiguous, to the outermost one. The
    address and all strides must be multiples of 16.
    """

    pointer: Pointer
    dtype: str
    dims: tuple[int, ...]
    """Elements along each axis. What a box holds beyond them is read as zeros, never written."""
    strides: tuple[int, ...]
    """Bytes from one index to the next along each axis but the innermost."""
    box: tuple[int, ...]
    """Elements that a box spans along each axis."""
    element_strides: tuple[int, ...] = ()
    """Along each axis, every how many-th element of the box is moved; every one if empty."""
    swizzle: Literal[0, 32, 64, 128] = 0
    """The bytes within which 16-byte chunks change places in shared memory."""


class Encoded(NamedTuple):
    """A tensor map in memory."""

    address: int
    memory: object
    """What keeps that memory."""


def encoder(tensor_map: TensorMap) -> Callable[[int], Encoded]:
    """A function that encodes `tensor_map` for an address and keeps the results of the last few.

    Any number of threads may call it. The caller holds what it returns until the kernel is
    launched: by then the driver has copied it.
    """
    count = len(tensor_map.dims)
    sizes, indices = ctypes.c_uint64 * count, ctypes.c_uint32 * count
    dims, strides = sizes(*tensor_map.dims), sizes(*tensor_map.strides)
    box = indices(*tensor_map.box)
    element_strides = indices(*(tensor_map.element_strides or (1,) * count))
    dtype, swizzle = DTYPE_CODES[tensor_map.dtype], SWIZZLE_CODES[tensor_map.swizzle]
    encode_tiled = driver_function()

    @lru_cache(maxsize=KEPT)
    def encode(address: int) -> Encoded:
        memory = array("Q", bytes(BYTES + ALIGNMENT))
        start, _ = memory.buffer_info()
        start += -start % ALIGNMENT
        status = encode_tiled(
            start, dtype, count, address, dims, strides, box, element_strides,
            NO_INTERLEAVE, swizzle, L2_PROMOTION_128B, ZEROS_OUT_OF_BOUNDS,
        )  # fmt: skip
        if status:
            raise RuntimeError(
                f"cuTensorMapEncodeTiled failed with status {status} for address {address:#x} "
                f"of {tensor_map}"
            )
        return Encoded(start, memory)

    return encode


@cache
def driver_function() -> Any:
    """`cuTensorMapEncodeTiled` of the driver."""
    library = driver_library()
    if library is None:
        raise RuntimeError("tensor maps are encoded by the CUDA driver, and there is none")
    function = library.cuTensorMapEncodeTiled
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    function.argtypes = [
        pointer, number, number, pointer, pointer, pointer, pointer, pointer, *[number] * 4
    ]  # fmt: skip
    function.restype = number
    return function
