"""Where the tokens of a box are: in tables of rows, whatever the strides of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import mul
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Steps = tuple[int, ...]


class Grid(NamedTuple):
    """Rows of a table at even steps."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a box, which `Rows` reads and writes."""

    batch: range
    heads: range
    first: tuple[Integers, ...]
    """``[tiles_r]`` for each axis: the first token of every tile."""
    offsets: tuple[Integers, ...]
    """``[m_r]`` for each axis: the tokens of a tile, from its first."""
    _indices: dict[tuple[int, ...], Integers] = field(default_factory=dict)
    _grids: dict[tuple[int, ...], Grid | None] = field(default_factory=dict)

    def index(self, origin: int, *strides: int) -> Integers:
        """``[batch, tiles.., m, heads]``: the rows of a table, given the strides of its axes."""
        key = origin, *strides
        if key not in self._indices:
            batch_stride, *token_strides, head_stride = strides
            batch = np.arange(self.batch.start, self.batch.stop) * batch_stride + origin
            heads = np.arange(self.heads.start, self.heads.stop) * head_stride
            outer = [batch, *map(np.multiply, self.first, token_strides)]
            inner = reduce(np.add.outer, map(np.multiply, self.offsets, token_strides))
            self._indices[key] = reduce(np.add.outer, [*outer, inner.ravel(), heads])
        return self._indices[key]

    def grid(self, origin: int, *strides: int) -> Grid | None:
        """The rows ``[batch, tiles.., m_1, .., m_R, heads]`` of a table.

        None unless tiles, and the tokens of a tile, follow each other evenly along all axes.
        """
        key = origin, *strides
        if key not in self._grids:
            self._grids[key] = self._grid(*key)
        return self._grids[key]

    def _grid(self, origin: int, batch_stride: int, *strides: int) -> Grid | None:
        *of_tokens, head_stride = strides
        if None in self.across or None in self.along:
            return None
        across, along = cast(Steps, self.across), cast(Steps, self.along)
        start = origin + self.batch.start * batch_stride + self.heads.start * head_stride
        start += sum(int(at[0]) * stride for at, stride in zip(self.first, of_tokens, strict=True))
        tiles, m = map(len, self.first), map(len, self.offsets)
        return Grid(
            start,
            (len(self.batch), *tiles, *m, len(self.heads)),
            (batch_stride, *map(mul, across, of_tokens), *map(mul, along, of_tokens), head_stride),
        )

    @cached_property
    def across(self) -> tuple[int | None, ...]:
        """Tokens from tile to tile along each axis; None where that varies."""
        return tuple(map(_step, self.first))

    @cached_property
    def along(self) -> tuple[int | None, ...]:
        """Tokens from one to the next within a tile, along each axis; None where that varies."""
        return tuple(map(_step, self.offsets))


def _step(positions: Integers) -> int | None:
    if len(positions) < 2:
        return 0
    step = positions[1] - positions[0]
    return int(step) if (np.diff(positions) == step).all() else None
