"""Arrays as tables of rows: reading and writing the tokens of a box, whatever their strides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from cuneigh._backends.cpu.halves import assign
from cuneigh._backends.cpu.tiles import COPIES, workspace_limit
from cuneigh._backends.cpu.tokens import Integers, Tokens

Array = npt.NDArray[Any]


class Rows:
    """An array ``[batch, tokens.., heads, dim]`` whose memory is seen as a table of rows of `dim`.

    Transposed, broadcast and reversed arrays are tables too, their rows in another order. An array
    whose rows are not contiguous, or do not lie on a grid of row lengths, is copied if that takes
    little memory; if not, it is a table of rows that overlap, which is slower to read.
    """

    def __init__(self, array: Array) -> None:
        *lengths, dim = array.shape
        unit = dim * array.itemsize
        byte_strides = _byte_strides(array)
        gaps = dim > 1 and array.strides[-1] != array.itemsize
        self._is_grid = not gaps and not any(stride % unit for stride in byte_strides)
        if not self._is_grid:
            if array.nbytes <= workspace_limit() // COPIES:
                array, self._is_grid = np.ascontiguousarray(array), True
                byte_strides = _byte_strides(array)
            else:
                unit = math.gcd(*byte_strides) or array.itemsize
        strides = [stride // unit for stride in byte_strides]  # in rows of the table
        ends = [stride * (n - 1) for stride, n in zip(strides, lengths, strict=True)]
        self._origin = -sum(end for end in ends if end < 0)
        if array.flags.c_contiguous:
            self.table = array.reshape(-1, dim)
        else:
            lowest = array[tuple(-1 if stride < 0 else 0 for stride in strides)]
            shape = 1 + sum(map(abs, ends)), dim
            writeable = array.flags.writeable
            step = array.strides[-1] if dim > 1 else array.itemsize
            self.table = as_strided(lowest, shape, (unit, step), writeable=writeable)
        self._strides = strides
        # A view of contiguous memory is made faster, though not of every dtype.
        is_contiguous = self.table.flags.c_contiguous
        self._bits = self.table.view(f"u{array.itemsize}") if is_contiguous else None

    @property
    def dim(self) -> int:
        return int(self.table.shape[1])

    def read(self, tokens: Tokens, out: Array) -> Array:
        """Fill `out` with the rows ``[batch, tiles.., m, heads, dim]`` of these tokens."""
        view = self._grid(tokens)
        if view is not None:
            assign(out.reshape(view.shape), view)
        elif self.table.dtype == out.dtype and self._is_grid and out.flags.c_contiguous:
            # With mode="raise", np.take copies once more.
            np.take(self.table, self._index(tokens), 0, out=out, mode="clip")
        else:
            assign(out, self.table[self._index(tokens)])
        return out

    def view(self, tokens: Tokens) -> Array | None:
        """What `read` gives, without a copy; None unless the rows of each tile follow evenly."""
        if sum(len(offsets) > 1 for offsets in tokens.offsets) > 1:
            return None
        grid = self._grid(tokens)
        if grid is None:
            return None
        lead = 1 + len(tokens.offsets)
        return grid.reshape(*grid.shape[:lead], -1, *grid.shape[-2:])

    def write(self, tokens: Tokens, rows: Array) -> None:
        """Store what `read` would read."""
        grid = self._grid(tokens)
        if grid is None:
            self.table[self._index(tokens)] = rows
        else:
            grid[...] = rows.reshape(grid.shape)

    def _grid(self, tokens: Tokens) -> Array | None:
        """A view ``[batch, tiles.., m_1, .., m_R, heads, dim]``; None where steps are uneven."""
        grid = tokens.grid(self._origin, *self._strides)
        if grid is None:
            return None
        start, shape, strides = grid
        unit, itemsize = self.table.strides
        whole = *shape, self.dim
        in_bytes = *(unit * stride for stride in strides), itemsize
        if self._bits is not None:
            view = np.ndarray(whole, self._bits.dtype, self._bits, start * unit, in_bytes)
            return view.view(self.table.dtype)
        writeable = self.table.flags.writeable
        return as_strided(self.table[start], whole, in_bytes, writeable=writeable)

    def _index(self, tokens: Tokens) -> Integers:
        return tokens.index(self._origin, *self._strides)


def _byte_strides(array: Array) -> list[int]:
    """Of all axes but the last; 0 along an axis of one element, whose stride means nothing."""
    strides = zip(array.strides, array.shape[:-1], strict=False)
    return [stride if n > 1 else 0 for stride, n in strides]
