"""From arrays and problems to what kernels receive: views, records of axes, widths of loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cuneigh._problem import DTYPES
from cuneigh._window import Axis

if TYPE_CHECKING:
    from cuneigh._backends import Allocate

AXIS_FIELDS = ("length", "key_length", "kernel_size", "stride", "dilation", "is_causal")
AXIS = np.dtype([(name, "i4") for name in AXIS_FIELDS[:-1]] + [("is_causal", "?")], align=True)
"""`Axis` of cuda/cuneigh/window.cuh."""


def axis_record(axis: Axis) -> tuple[int, ...]:
    """The numbers of one `AXIS`."""
    return tuple(getattr(axis, name) for name in AXIS_FIELDS)


class Views:
    """The `View`s of cuda/cuneigh/layout.cuh that a kernel takes, packed as 64-bit integers."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.words: list[int] = []

    def vectors(self, *arrays: Any) -> None:
        """Append arrays [batch, x1..xr, heads, inner], or None."""
        for array in arrays:
            if array is None:
                self._append()
            else:
                batch, *token, head, inner = self._steps(array)
                self._append(array.data.ptr, batch, token, head, inner)

    def scalars(self, *arrays: Any) -> None:
        """Append arrays [batch, x1..xr, heads], or None."""
        for array in arrays:
            if array is None:
                self._append()
            else:
                batch, *token, head = self._steps(array)
                self._append(array.data.ptr, batch, token, head)

    def pairs(self, array: Any) -> None:
        """Append an array [batch, x1..xr, heads, 2], counted in pairs."""
        batch, *token, head, _ = (step // 2 for step in self._steps(array))
        self._append(array.data.ptr, batch, token, head)

    def additional(self, *arrays: Any) -> None:
        """Append arrays [batch, n, heads, inner], or None; n takes the place of the first axis."""
        for array in arrays:
            if array is None:
                self._append()
            else:
                batch, n, head, inner = self._steps(array)
                self._append(array.data.ptr, batch, [n], head, inner)

    def bias(self, rpb: Any) -> None:
        """Append rpb [heads, 2*K1-1, ..], or None."""
        if rpb is None:
            self._append()
        else:
            head, *token = self._steps(rpb)
            self._append(rpb.data.ptr, 0, token, head)

    def pointers(self, *arrays: Any) -> None:
        """Append contiguous arrays that a kernel indexes by itself."""
        for array in arrays:
            self._append(array.data.ptr)

    def addresses(self, *arrays: Any) -> None:
        """Append bare pointers; None is null."""
        self.words += [0 if array is None else array.data.ptr for array in arrays]

    def numbers(self, *numbers: int) -> None:
        """Append 64-bit integers."""
        self.words += numbers

    def _steps(self, array: Any) -> list[int]:
        return [stride // array.itemsize for stride in array.strides]

    def _append(
        self,
        pointer: int = 0,
        batch: int = 0,
        token: Sequence[int] = (),
        head: int = 0,
        inner: int = 0,
    ) -> None:
        self.words += [pointer, batch, *token, *(0,) * (self.rank - len(token)), head, inner]

    def pack(self) -> np.ndarray[Any, Any]:
        """One value that CuPy passes by value."""
        return np.array(self.words, dtype=np.int64).view(f"V{8 * len(self.words)}")


def load_width(arrays: tuple[Any, ...]) -> int:
    """Bytes that one load can take of every head vector of `arrays`: a power of two up to 16."""
    bits = 16
    for array in arrays:
        if array is not None:
            bits |= array.data.ptr | array.shape[-1] * array.itemsize
            for stride in array.strides[:-1]:
                bits |= stride
    return bits & -bits


def readable(array: Any, allocate: Allocate) -> Any:
    """`array`, or a copy of it if its head vectors are not contiguous."""
    if array is None or array.shape[-1] <= 1 or array.strides[-1] == array.itemsize:
        return array
    copy = allocate(array.shape, array.dtype.name)
    bits = f"u{DTYPES[array.dtype.name]}"  # CuPy copies integers of any layout
    copy.view(bits)[...] = array.view(bits)
    return copy
