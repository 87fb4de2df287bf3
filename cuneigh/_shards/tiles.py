"""A layout in tiles that are computed one after another, each in a bounded number of bytes.

A tile has some of the queries, a box of them in some elements of the batch, and the keys that these
see. All tiles have the same sizes but for those at ends. Keys that several tiles see are brought to
each of them; the cut is one with few of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from cuneigh._shards.axis import Range, Shards
from cuneigh._shards.plan import Box
from cuneigh._window import Axis


class Tile(NamedTuple):
    """A part of a call. The keys are unrolled on a ring (`cuneigh._shards.axis`)."""

    batch: Range
    queries: Box
    keys: Box


class Sizes(NamedTuple):
    """What a tile has at most."""

    batch: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]


class _Cut(NamedTuple):
    """The batch or a token axis in equal pieces, the last of which may be shorter."""

    axis: Axis | None
    """None for the batch, of whose elements each sees itself alone."""
    length: int
    pieces: int

    @property
    def size(self) -> int:
        return math.ceil(self.length / self.pieces)

    @property
    def own(self) -> list[Range]:
        starts = range(0, self.length, self.size)
        return [Range(start, min(start + self.size, self.length)) for start in starts]

    @property
    def seen(self) -> list[Range]:
        own = self.own
        if self.axis is None:
            return own
        shards = Shards(self.axis, tuple(one.length for one in own))
        return [shards.seen(shard) for shard in range(len(own))]

    def finer(self) -> _Cut | None:
        """The next one worth trying, with smaller pieces; None if these have one token each."""
        if self.size == 1:
            return None
        pieces = max(self.pieces * 5 // 4, math.ceil(self.length / (self.size - 1)))
        return self._replace(pieces=pieces)


class _Cuts(NamedTuple):
    """How the batch and all token axes are cut."""

    along: tuple[_Cut, ...]

    def sizes(self) -> Sizes:
        batch, *queries = (cut.size for cut in self.along)
        keys = (max(one.length for one in cut.seen) for cut in self.along[1:])
        return Sizes(batch, tuple(queries), tuple(keys))

    def brought(self) -> int:
        """Keys that are brought to all tiles together."""
        return math.prod(sum(one.length for one in cut.seen) for cut in self.along)

    def finer(self) -> Iterator[_Cuts]:
        """These with one axis cut finer."""
        for i, cut in enumerate(self.along):
            if (other := cut.finer()) is not None:
                yield _Cuts((*self.along[:i], other, *self.along[i + 1 :]))

    def tiles(self) -> list[Tile]:
        along = [list(zip(cut.own, cut.seen, strict=True)) for cut in self.along]
        return [
            Tile(batch, *(Box(tuple(pair[side] for pair in pairs)) for side in (0, 1)))
            for (batch, _), *pairs in product(*along)
        ]


class TooLargeError(Exception):
    """Not even the smallest tiles fit; its argument is the bytes that these take."""


def tiles_of(
    batch: int, axes: Sequence[Axis], most: int, bytes_of: Callable[[Sizes, bool], int]
) -> list[Tile]:
    """The tiles of a layout that is not empty, in raster order; it may be one.

    `bytes_of` says what tiles of a size take, which is never more than `most`, and is told whether
    there are more than one.
    """
    cuts = _Cuts((_Cut(None, batch, 1), *(_Cut(axis, axis.length, 1) for axis in axes)))
    if bytes_of(cuts.sizes(), False) <= most:
        return cuts.tiles()
    size = bytes_of(cuts.sizes(), True)
    while size > most:
        prices = []
        for finer in cuts.finer():
            other = bytes_of(finer.sizes(), True)
            # What more is brought, for what tiles become smaller
            price = math.log(finer.brought() / cuts.brought()) / math.log(max(size / other, 1.001))
            prices.append((price, other, finer))
        if not prices:
            raise TooLargeError(size)
        _, size, cuts = min(prices, key=lambda priced: priced[:2])
    return cuts.tiles()
