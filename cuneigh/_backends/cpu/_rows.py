"""Arrays as tables of rows: reading and writing the tokens of a box, whatever their strides."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from cuneigh._backends.cpu._tiles import Integers, Place

Array = npt.NDArray[Any]


class Rows:
    """An array ``[batch, tokens.., heads, dim]`` whose memory is seen as a table of rows of `dim`.

    Transposed, broadcast and reversed arrays are tables too, their rows in another order; only an
    array whose rows are not contiguous, or do not lie on a grid of row lengths, is copied.
    """

    def __init__(self, array: Array) -> None:
        dim, itemsize = array.shape[-1], array.itemsize
        unit = dim * itemsize
        if (dim > 1 and array.strides[-1] != itemsize) or any(s % unit for s in strides(array)):
            array = np.ascontiguousarray(array)
        steps = [stride // unit for stride in strides(array)]
        ends = [step * (n - 1) for step, n in zip(steps, array.shape, strict=False)]
        self._origin = -sum(end for end in ends if end < 0)
        lowest = array[tuple(-1 if step < 0 else 0 for step in steps)]
        count = 1 + sum(map(abs, ends))
        self.table = as_strided(
            lowest, (count, dim), (unit, itemsize), writeable=array.flags.writeable
        )
        self._batch_step, *self._token_steps, self._head_step = steps

    @property
    def dim(self) -> int:
        return int(self.table.shape[1])

    def read(self, place: Place, out: Array) -> Array:
        """Fill `out` with the rows ``[batch, tiles.., heads, m, dim]`` at `place`."""
        index = self._index(place).reshape(out.shape[:-1])
        if self.table.dtype == out.dtype:
            # With mode="raise", np.take copies once more.
            return np.take(self.table, index, 0, out=out, mode="clip")
        out[...] = self.table[index]
        return out

    def view(self, place: Place) -> Array | None:
        """What `read` gives, without a copy; None where that cannot be."""
        if place.even is None:
            return None
        (first, across, along), (token_step,) = place.even, self._token_steps
        steps = self._batch_step, across * token_step, self._head_step, along * token_step
        tiles, m = place.tokens[0].shape
        start = place.batch.start * steps[0] + place.heads.start * steps[2] + first * token_step
        unit, itemsize = self.table.strides
        return as_strided(
            self.table[self._origin + start],
            (len(place.batch), tiles, len(place.heads), m, self.dim),
            (*(unit * step for step in steps), itemsize),
            writeable=self.table.flags.writeable,
        )

    def write(self, place: Place, rows: Array) -> None:
        """Store what `read` would read, but for the tokens that are not valid."""
        if place.valid is not None:
            index = self._index(place)
            chosen = np.broadcast_to(place.valid[..., None, :], index.shape)
            self.table[index[chosen]] = rows[chosen]
        elif (view := self.view(place)) is not None:
            view[...] = rows
        else:
            self.table[self._index(place)] = rows

    def _index(self, place: Place) -> Integers:
        return place.index(self._origin, self._batch_step, *self._token_steps, self._head_step)


def strides(array: Array) -> list[int]:
    """The strides of all axes but the last; 0 for axes of length 1, where any stride is legal."""
    lengths = zip(array.strides[:-1], array.shape, strict=False)
    return [stride if n > 1 else 0 for stride, n in lengths]
