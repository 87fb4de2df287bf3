"""The adapter of NumPy, whose arrays are what the CPU backend computes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh._device import CPU, Device
from cuneigh._frameworks.contract import Adapter, dtype_name, numpy_dtype, refuse
from cuneigh._problem import DTYPES, Spec

Array = npt.NDArray[Any]


class NumPyAdapter(Adapter):
    """NumPy arrays, memory maps among them. The own device is always ``"cpu"``."""

    computes = True

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        if type(array) not in (np.ndarray, np.memmap):
            refuse(
                call, name, array, f"a plain numpy.ndarray is needed: pass numpy.asarray({name})"
            )

    def spec(self, array: Array) -> Spec:
        return Spec(array.shape, dtype_name(array.dtype))

    def own_device(self, array: Array) -> str:
        return "cpu"

    def device(self, own: str) -> Device:
        return CPU

    def full(self, own: str, shape: tuple[int, ...], dtype: str, value: float) -> Array:
        return np.full(shape, value, numpy_dtype(dtype))

    @contextmanager
    def operations(self, own: str) -> Iterator[Any]:
        with np.errstate(all="ignore"):  # infinities are legal, and terms may be as small as 0
            yield np

    def cast(self, array: Array, dtype: str) -> Array:
        return array.astype(numpy_dtype(dtype), copy=False)

    def number(self, array: Array) -> float | None:
        return float(array) if array.dtype.kind in "fiu" or array.dtype.name in DTYPES else None

    def empty(self, own: str, shape: tuple[int, ...], dtype: str) -> Array:
        return np.empty(shape, numpy_dtype(dtype))

    def borrow(self, array: Array) -> Array:
        return array


ADAPTER = NumPyAdapter()
