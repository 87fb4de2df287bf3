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
from typing import Literal, NamedTuple

from cuneigh._device import driver_library
from cuneigh._gpu.arrays import Pointer

WORDS, ALIGNMENT = 16, 64
"""The 64-bit words of an encoded tensor map, and the bytes that its address is a multiple of."""

KEPT = 64
"""Addresses for which a launch keeps the encoded map."""

DTYPE_CODES = {"float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}
"""CUtensorMapDataType."""

SWIZZLE_CODES = {0: 0, 32: 1, 64: 2, 128: 3}
"""CUtensorMapSwizzle, by the bytes within which 16-byte chunks are permuted."""

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
    """The bytes within which 16-byte chunks are permuted in shared memory."""


Encoded = tuple[int, object]
"""The address of an encoded map, and what keeps its memory."""


class Encoder:
    """Encodes a tensor map for any address and keeps the results of the last few.

    Any number of threads may do so. They hold what `encode` returns until the kernel is launched:
    by then the driver has copied it.
    """

    def __init__(self, tensor_map: TensorMap) -> None:
        self._map = tensor_map
        self._driver = driver_functions()
        self._words: array[int] | None = None
        """The map for the first address that came."""
        self.encode = lru_cache(maxsize=KEPT)(self._encode)

    def _encode(self, address: int) -> Encoded:
        if self._words is None:
            self._words = self._encoded_by_driver(address)
        # Copying the map and replacing its address takes a quarter of the time of encoding it.
        memory, first = aligned_memory()
        memory[first : first + WORDS] = self._words
        start = memory.buffer_info()[0] + 8 * first
        self._check(self._driver.replace_address(start, address), address)
        return start, memory

    def _encoded_by_driver(self, address: int) -> array[int]:
        described, count = self._map, len(self._map.dims)
        sizes, indices = ctypes.c_uint64 * count, ctypes.c_uint32 * count
        memory, first = aligned_memory()
        status = self._driver.encode(
            memory.buffer_info()[0] + 8 * first,
            DTYPE_CODES[described.dtype],
            count,
            address,
            sizes(*described.dims),
            sizes(*described.strides),
            indices(*described.box),
            indices(*(described.element_strides or (1,) * count)),
            NO_INTERLEAVE,
            SWIZZLE_CODES[described.swizzle],
            L2_PROMOTION_128B,
            ZEROS_OUT_OF_BOUNDS,
        )
        self._check(status, address)
        return memory[first : first + WORDS]

    def _check(self, status: int, address: int) -> None:
        if status:
            raise RuntimeError(
                f"the driver fails with status {status} to encode {self._map} for {address:#x}"
            )


_ZEROS = array("Q", bytes(8 * WORDS + ALIGNMENT))


def aligned_memory() -> tuple[array[int], int]:
    """Zeros, and the index of the word at which a map can begin."""
    memory = _ZEROS[:]
    return memory, -memory.buffer_info()[0] % ALIGNMENT // 8


class DriverFunctions(NamedTuple):
    """What the driver does with tensor maps."""

    encode: Callable[..., int]
    """`cuTensorMapEncodeTiled`."""
    replace_address: Callable[[int, int], int]
    """`cuTensorMapReplaceAddress`."""


@cache
def driver_functions() -> DriverFunctions:
    """The functions of the driver of this machine."""
    library = driver_library()
    if library is None:
        raise RuntimeError("tensor maps are encoded by the CUDA driver, and there is none")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    encode, replace = library.cuTensorMapEncodeTiled, library.cuTensorMapReplaceAddress
    encode.argtypes = [pointer, number, number, *[pointer] * 5, *[number] * 4]
    replace.argtypes = [pointer, pointer]
    return DriverFunctions(encode, replace)
