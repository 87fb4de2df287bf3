"""Arrays as kernels take them: the address of a row, and the numbers from row to row."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh._backends.cpu.boxes import Workspace
from cuneigh._backends.cpu.halves import assign

Array = npt.NDArray[Any]

RANK = 3
"""Token axes that kernels loop over."""


class Numbers(NamedTuple):
    """Rows in memory: the address of the first, and the numbers from row to row along each axis."""

    address: int
    strides: tuple[int, ...]


ABSENT = Numbers(0, (0,) * (RANK + 1))


class Lent:
    """An array ``[batch, tokens.., heads, dim]``, parts of which kernels read and write.

    They do so where it is, in its own dtype if that is `stored`; otherwise in copies of the parts.
    """

    def __init__(self, array: Array, stored: str) -> None:
        self._array, step = array, array.itemsize
        self._dtype = array.dtype if array.dtype.name == stored else np.dtype(stored)
        whole_rows = array.shape[-1] == 1 or array.strides[-1] == step
        self._address, strides = array.ctypes.data, array.strides[:-1]
        aligned = not any(at % step for at in (self._address, *strides))
        self._as_it_is = array.dtype == self._dtype and whole_rows and aligned
        self._bytes = strides[0], strides[1], strides[-1]
        self._strides = _strides(array)

    def reading(
        self, entry: int, tokens: slice, heads: slice, space: Workspace, name: str
    ) -> Numbers:
        """Some tokens of the first axis and some heads of an entry of the batch."""
        if self._as_it_is:
            return self.numbers(entry, tokens, heads)
        part = self._array[entry, tokens, ..., heads, :]
        copy = self._like(part, space, name)
        assign(copy, part)
        return Numbers(copy.ctypes.data, _strides(copy[None]))

    def writing(
        self, entry: int, tokens: slice, heads: slice, space: Workspace, name: str
    ) -> tuple[Numbers, Array | None]:
        """The same to write to, and the array that is then to be handed to `store`, if any."""
        if self._as_it_is:
            return self.numbers(entry, tokens, heads), None
        copy = self._like(self._array[entry, tokens, ..., heads, :], space, name)
        return Numbers(copy.ctypes.data, _strides(copy[None])), copy

    def store(self, entry: int, tokens: slice, heads: slice, copy: Array | None) -> None:
        if copy is not None:
            self._array[entry, tokens, ..., heads, :] = copy

    def numbers(self, entry: int, tokens: slice, heads: slice) -> Numbers:
        """The part where it is."""
        starts = zip((entry, tokens.start, heads.start), self._bytes, strict=True)
        return Numbers(self._address + sum(at * step for at, step in starts), self._strides)

    def _like(self, part: Array, space: Workspace, name: str) -> Array:
        words = -(-part.size * self._dtype.itemsize // space.dtype.itemsize)
        return space(name, words).view(self._dtype)[: part.size].reshape(part.shape)


def _strides(array: Array) -> tuple[int, ...]:
    """Numbers from row to row along the token axes, three, and from head to head."""
    *of_tokens, of_heads = (stride // array.itemsize for stride in array.strides[1:-1])
    return *[0] * (RANK - len(of_tokens)), *of_tokens, of_heads
