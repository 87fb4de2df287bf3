"""Copies between an array of the whole layout and one of a box of its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh._settings import usable_cores
from cuneigh._shards.axis import Range
from cuneigh._shards.plan import Box

Array = npt.NDArray[Any]
Pieces = list[tuple[slice, slice]]
"""Slices of an axis of the array of the layout, and the slices of the box that they are."""

MOST_THREADS = 8
LEAST_BYTES = 1 << 20
"""That a thread copies: less takes it no longer than being asked."""


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


class Copies(AbstractContextManager["Copies"]):
    """Copies by several threads at a time: one is slower than what connects a GPU."""

    def __init__(self) -> None:
        self._count = min(usable_cores(), MOST_THREADS)
        self._threads = ThreadPoolExecutor(self._count)

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()

    def gather(self, layout: Array, batch: Range, box: Box, target: Array) -> None:
        """Copy a box of the layout to `target`."""
        self._copy((target[of_box], layout[at]) for at, of_box in _pieces(batch, box, layout.shape))

    def scatter(self, source: Array, batch: Range, box: Box, layout: Array) -> None:
        """Copy `source` to a box of the layout."""
        self._copy((layout[at], source[of_box]) for at, of_box in _pieces(batch, box, layout.shape))

    def _copy(self, pairs: Iterable[tuple[Array, Array]]) -> None:
        shares = [share for pair in pairs for share in self._shares(*pair)]
        for _ in self._threads.map(lambda pair: np.copyto(*pair), shares):
            pass

    def _shares(self, target: Array, source: Array) -> Iterator[tuple[Array, Array]]:
        """What each thread copies: a part of the longest axis, but for that of the elements."""
        count = min(self._count, target.nbytes // LEAST_BYTES)
        if count <= 1:
            yield target, source
            return
        axis = int(np.argmax(target.shape[:-1]))
        both = (np.array_split(np.moveaxis(array, axis, 0), count) for array in (target, source))
        yield from zip(*both, strict=True)
