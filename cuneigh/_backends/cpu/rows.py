"""Arrays as tables of rows: reading and writing the tokens of a box, whatever their strides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from cuneigh._backends.cpu.tiles import COPIES, Integers, Tokens, workspace_limit

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
        self._batch_stride, *self._token_strides, self._head_stride = strides

    @property
    def dim(self) -> int:
        return int(self.table.shape[1])

    def read(self, tokens: Tokens, out: Array) -> Array:
        """Fill `out` with the rows ``[batch, tiles.., heads, m, dim]`` of these tokens."""
        view = self.view(tokens)
        if view is not None:
            np.copyto(out, view)
        elif self.table.dtype == out.dtype and self._is_grid:
            # With mode="raise", np.take copies once more.
            np.take(self.table, self._index(tokens), 0, out=out, mode="clip")
        else:
            out[...] = self.table[self._index(tokens)]
        return out

    def view(self, tokens: Tokens) -> Array | None:
        """What `read` gives, without a copy; None unless the tiles of one axis follow evenly."""
        if len(tokens.first) > 1 or tokens.across is None or tokens.along is None:
            return None
        (first,), (offsets,), (token_stride,) = tokens.first, tokens.offsets, self._token_strides
        tile_stride, query_stride = tokens.across * token_stride, tokens.along * token_stride
        strides = self._batch_stride, tile_stride, self._head_stride, query_stride
        start = tokens.batch.start * strides[0] + tokens.heads.start * strides[2]
        start += self._origin + int(first[0]) * token_stride
        unit, itemsize = self.table.strides
        return as_strided(
            self.table[start],
            (len(tokens.batch), len(first), len(tokens.heads), len(offsets), self.dim),
            (*(unit * stride for stride in strides), itemsize),
            writeable=self.table.flags.writeable,
        )

    def write(self, tokens: Tokens, rows: Array) -> None:
        """Store what `read` would read."""
        view = self.view(tokens)
        if view is None:
            self.table[self._index(tokens)] = rows
        else:
            view[...] = rows

    def _index(self, tokens: Tokens) -> Integers:
        strides = self._batch_stride, *self._token_strides, self._head_stride
        return tokens.index(self._origin, *strides)


def _byte_strides(array: Array) -> list[int]:
    """Of all axes but the last; 0 along an axis of one element, whose stride means nothing."""
    strides = zip(array.strides, array.shape[:-1], strict=False)
    return [stride if n > 1 else 0 for stride, n in strides]
