"""Arrays as a backend sees them while it plans: all is known of them but their addresses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cuneigh._problem import DTYPES


class Pointer(NamedTuple):
    """An address that is known when a program runs."""

    slot: int
    """Its index among the addresses that the program is run with."""
    offset: int = 0
    """Bytes to add to that address."""


@dataclass(frozen=True)
class Array:
    """An array that a program reads or writes."""

    pointer: Pointer
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    """Elements from one index to the next along each axis."""
    misalignment: int
    """Its address modulo 16."""

    @property
    def itemsize(self) -> int:
        return 1 if self.dtype == "bool" else DTYPES[self.dtype]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def byte_strides(self) -> tuple[int, ...]:
        """Bytes from one index to the next along each axis."""
        return tuple(stride * self.itemsize for stride in self.strides)

    def part(self, begin: int, end: int) -> Array:
        """The array of the elements begin .. end along the last axis."""
        skipped = begin * self.strides[-1] * self.itemsize
        return Array(
            self.pointer._replace(offset=self.pointer.offset + skipped),
            (*self.shape[:-1], min(end, self.shape[-1]) - begin),
            self.dtype,
            self.strides,
            (self.misalignment + skipped) % 16,
        )

    def component(self, index: int) -> Array:
        """The array of the numbers at `index` of the last axis."""
        skipped = index * self.strides[-1] * self.itemsize
        return Array(
            self.pointer._replace(offset=self.pointer.offset + skipped),
            self.shape[:-1],
            self.dtype,
            self.strides[:-1],
            (self.misalignment + skipped) % 16,
        )


@lru_cache(maxsize=4096)
def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous array."""
    return tuple(math.prod(shape[axis:]) for axis in range(1, len(shape) + 1))
