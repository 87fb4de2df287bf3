"""Copies between an array of the whole layout and one of a box of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh._shards.axis import Range
from cuneigh._shards.plan import Box

Array = npt.NDArray[Any]
Pieces = list[tuple[slice, slice]]
"""Slices of an axis of the array of the layout, and the slices of the box that they are."""


def _laps(tokens: Range, layout: int) -> Pieces:
    """The pieces of a range, which may be unrolled on a ring."""
    pieces, start = [], tokens.start
    while start < tokens.stop:
        lap = start // layout * layout
        stop = min(tokens.stop, lap + layout)
        place = slice(start - tokens.start, stop - tokens.start)
        pieces.append((slice(start - lap, stop - lap), place))
        start = stop
    return pieces


def _pieces(batch: Range, box: Box, shape: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
    """Where the pieces of a box lie in an array [batch, tokens.., ...], and in one of the box."""
    along = [_laps(tokens, layout) for tokens, layout in zip(box.ranges, shape[1:], strict=False)]
    for pieces in product(*along):
        whole, of_box = ([piece[side] for piece in pieces] for side in (0, 1))
        yield (slice(*batch), *whole), (slice(None), *of_box)


def gather(layout: Array, batch: Range, box: Box, target: Array) -> None:
    """Copy a box of the layout to `target`."""
    for whole, of_box in _pieces(batch, box, layout.shape):
        np.copyto(target[of_box], layout[whole])


def scatter(source: Array, batch: Range, box: Box, layout: Array) -> None:
    """Copy `source` to a box of the layout."""
    for whole, of_box in _pieces(batch, box, layout.shape):
        np.copyto(layout[whole], source[of_box])
