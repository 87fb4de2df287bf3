"""From arrays to what kernels receive of them: pointers with strides, and the widths of loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuneigh._gpu.arrays import Array, Pointer
from cuneigh._gpu.program import Program


class Views:
    """The `View`s of cuda/cuneigh/layout.cuh that a kernel takes, in 64-bit words."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.words: list[int | Pointer] = []

    def vectors(self, *arrays: Array | None) -> None:
        """Append arrays [batch, x1..xr, heads, inner], or None."""
        for array in arrays:
            if array is None:
                self._append()
            else:
                batch, *token, head, inner = array.strides
                self._append(array.pointer, batch, token, head, inner)

    def scalars(self, *arrays: Array | None) -> None:
        """Append arrays [batch, x1..xr, heads], or None."""
        for array in arrays:
            if array is None:
                self._append()
            else:
                batch, *token, head = array.strides
                self._append(array.pointer, batch, token, head)

    def pairs(self, array: Array) -> None:
        """Append an array [batch, x1..xr, heads, 2], whose pairs are its elements."""
        batch, *token, head, _ = (stride // 2 for stride in array.strides)
        self._append(array.pointer, batch, token, head)

    def additional(self, *arrays: Array | None) -> None:
        """Append arrays [batch, n, heads, inner], or None; n stands for the first token axis."""
        for array in arrays:
            if array is None:
                self._append()
            else:
                batch, n, head, inner = array.strides
                self._append(array.pointer, batch, [n], head, inner)

    def mask(self, mask: Array | None) -> None:
        """Append a key mask [batch, x1..xr]; nothing if it is None, for then kernels take none."""
        if mask is not None:
            batch, *token = mask.strides
            self._append(mask.pointer, batch, token)

    def bias(self, rpb: Array | None) -> None:
        """Append rpb [heads, 2*K1-1, ..], or None."""
        if rpb is None:
            self._append()
        else:
            head, *token = rpb.strides
            self._append(rpb.pointer, 0, token, head)

    def pointers(self, *arrays: Array) -> None:
        """Append contiguous arrays that a kernel indexes by itself."""
        for array in arrays:
            self._append(array.pointer)

    def addresses(self, *arrays: Array | None) -> None:
        """Append bare pointers; None is null."""
        self.words += [0 if array is None else array.pointer for array in arrays]

    def numbers(self, *numbers: int) -> None:
        """Append 64-bit integers."""
        self.words += numbers

    def _append(
        self,
        pointer: int | Pointer = 0,
        batch: int = 0,
        token: Sequence[int] = (),
        head: int = 0,
        inner: int = 0,
    ) -> None:
        self.words += [pointer, batch, *token, *(0,) * (self.rank - len(token)), head, inner]


def load_width(arrays: Sequence[Array | None]) -> int:
    """Bytes that one load can take of every head vector of `arrays`: a power of two up to 16."""
    bits = 16
    for array in arrays:
        if array is not None:
            bits |= array.misalignment | array.shape[-1] * array.itemsize
            for stride in array.byte_strides[:-1]:
                bits |= stride
    return bits & -bits


def readable(array: Array | None, program: Program) -> Any:
    """`array`, or a copy of it if its head vectors are not contiguous."""
    if array is None or array.shape[-1] <= 1 or array.strides[-1] == 1:
        return array
    return program.copied(array)
