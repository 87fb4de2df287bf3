"""NumPy arrays on the GPU and back, without a change of their memory layout."""

from __future__ import annotations

from typing import Any

import numpy as np


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
    from strategies import numpy_dtype

    array = cupy.empty(shape, numpy_dtype(dtype))
    array.data.memset(0xFF, array.nbytes)
    return array
