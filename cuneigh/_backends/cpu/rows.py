"""Arrays as tables of rows: reading and writing the tokens of a box, whatever their strides."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from cuneigh._backends.cpu.tiles import Integers, Place

Array = npt.NDArray[Any]


class Rows:
    """An array ``[batch, tokens.., heads, dim]`` whose memory is seen as a table of rows of `dim`.

    Transposed, broadcast and reversed arrays are tables too, their rows in another order; only an
    array whose rows are not contiguous, or do not lie on a grid of row lengths, is copied.
    """

    def __init__(self, array: Array) -> None:
        *lengths, dim = array.shape
        unit = dim * array.itemsize
        strides = [
            stride if n > 1 else 0 for stride, n in zip(array.strides, lengths, strict=False)
        ]
        gaps = dim > 1 and array.strides[-1] != array.itemsize
        if gaps or any(stride % unit for stride in strides):
            array = np.ascontiguousarray(array)
            strides = list(array.strides[:-1])
        steps = [stride // unit for stride in strides]
        ends = [step * (n - 1) for step, n in zip(steps, lengths, strict=True)]
        self._origin = -sum(end for end in ends if end < 0)
        if array.flags.c_contiguous:
            self.table = array.reshape(-1, dim)
        else:
            lowest = array[tuple(-1 if step < 0 else 0 for step in steps)]
            shape = 1 + sum(map(abs, ends)), dim
            writeable = array.flags.writeable
            self.table = as_strided(lowest, shape, (unit, array.itemsize), writeable=writeable)
        self._batch_step, *self._token_steps, self._head_step = steps

    @property
    def dim(self) -> int:
        return int(self.table.shape[1])

    def read(self, place: Place, out: Array) -> Array:
        """Fill `out` with the rows ``[batch, tiles.., heads, m, dim]`` at `place`."""
        view = self.view(place)
        if view is not None:
            np.copyto(out, view)
        elif self.table.dtype == out.dtype:
            # With mode="raise", np.take copies once more.
            np.take(self.table, self._index(place), 0, out=out, mode="clip")
        else:
            out[...] = self.table[self._index(place)]
        return out

    def view(self, place: Place) -> Array | None:
        """What `read` gives, without a copy; None unless the tiles of one axis follow evenly."""
        if len(place.first) > 1 or place.across is None:
            return None
        (first,), (offsets,), (token_step,) = place.first, place.offsets, self._token_steps
        along = int(offsets[1]) if len(offsets) > 1 else 0
        steps = self._batch_step, place.across * token_step, self._head_step, along * token_step
        start = place.batch.start * steps[0] + place.heads.start * steps[2]
        start += self._origin + int(first[0]) * token_step
        unit, itemsize = self.table.strides
        return as_strided(
            self.table[start],
            (len(place.batch), len(first), len(place.heads), len(offsets), self.dim),
            (*(unit * step for step in steps), itemsize),
            writeable=self.table.flags.writeable,
        )

    def write(self, place: Place, rows: Array) -> None:
        """Store what `read` would read."""
        view = self.view(place)
        if view is None:
            self.table[self._index(place)] = rows
        else:
            view[...] = rows

    def _index(self, place: Place) -> Integers:
        return place.index(self._origin, self._batch_step, *self._token_steps, self._head_step)
