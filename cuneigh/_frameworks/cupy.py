"""The adapter of CuPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cupy

from cuneigh import _device
from cuneigh._frameworks.contract import (
    Adapter,
    Memory,
    dtype_name,
    numpy_dtype,
    refuse,
)
from cuneigh._problem import Spec


class CuPyAdapter(Adapter):
    """CuPy arrays. The own device is the number of a CUDA device."""

    computes = True

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        if type(array) is not cupy.ndarray:
            refuse(call, name, array, f"a plain cupy.ndarray is needed: pass cupy.asarray({name})")
        if array.data.ptr % array.itemsize:
            # A kernel that reads across the boundary takes the whole CUDA context down.
            raise ValueError(
                f"{call}: {name} starts at {array.data.ptr:#x}, which is not a multiple of its "
                f"item size {array.itemsize}"
            )
        if _is_between_elements(array):
            raise ValueError(
                f"{call}: {name} has strides {array.strides} in bytes, not all of which are "
                f"multiples of its item size {array.itemsize}"
            )

    def spec(self, array: Any) -> Spec:
        return Spec(array.shape, dtype_name(array.dtype))

    def own_device(self, array: Any) -> int:
        index: int = array.data.device_id
        return index

    def device(self, own: int) -> _device.Device:
        return _device.cuda(own)

    def full(self, own: int, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        with _device.current(own):
            return cupy.full(shape, value, numpy_dtype(dtype))

    @contextmanager
    def operations(self, own: int) -> Iterator[Any]:
        with _device.current(own):
            yield cupy

    def cast(self, array: Any, dtype: str) -> Any:
        return array.astype(numpy_dtype(dtype), copy=False)

    def memory(self, arrays: Sequence[Any]) -> Memory:
        addresses, layouts = [], []
        for array in arrays:
            address, size = array.data.ptr, array.itemsize
            addresses.append(address)
            layouts.append((tuple([stride // size for stride in array.strides]), address % 16))
        return addresses, tuple(layouts), list(arrays)

    def allocate(self, own: int, specs: Sequence[Spec | None], addresses: list[int]) -> list[Any]:
        made = []
        for spec in specs:
            array = None
            if spec is not None:
                array = cupy.ndarray(spec.shape, numpy_dtype(spec.dtype))
                addresses.append(array.data.ptr)
            made.append(array)
        return made

    def stream(self, own: int) -> int:
        stream: int = cupy.cuda.get_current_stream().ptr
        return stream

    def signature(self, arrays: Sequence[Any]) -> tuple[Any, ...] | None:
        found: list[Any] = []
        for array in arrays:
            if array is None:
                found.append(None)
                continue
            if type(array) is not cupy.ndarray:
                return None
            data = array.data
            if data.ptr % array.itemsize or _is_between_elements(array):
                return None
            found += array.shape, array.dtype, data.device_id
        return tuple(found)


def _is_between_elements(array: cupy.ndarray) -> bool:
    """Whether an element begins elsewhere than after a whole number of elements from the first."""
    if array.flags.c_contiguous:
        return False
    return any(stride % array.itemsize for stride in array.strides)


ADAPTER = CuPyAdapter()
