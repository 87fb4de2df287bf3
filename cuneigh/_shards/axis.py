"""The shards along one token axis, and the keys that the queries of each see.

Shard r has the queries and the keys of tokens ``starts[r] .. starts[r] + sizes[r]`` of the layout.
A query always sees its own token. So the keys that the queries of a shard see together, filled up
to one range without gaps, are its own ones with a *halo* before and one after them; `Shards.seen`
is that range. It follows from the windows of the first and last queries alone, since begin and end
of a window never decrease from one query of a dilation group to the next.

Ranges here are in tokens of the layout. On a ring they are *unrolled*: token t means token
``t % layout``, and the range around shard r may begin before token 0 or end after the last. None is
longer than the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh._window import Axis

Integers = npt.NDArray[np.int64]


class Range(NamedTuple):
    """The tokens ``start <= t < stop``."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def within(self, other: Range) -> bool:
        return other.start <= self.start and self.stop <= other.stop

    def meet(self, other: Range) -> Range:
        """What is in both; empty ranges have length 0."""
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.stop, other.stop)))

    def moved(self, by: int) -> Range:
        return Range(self.start + by, self.stop + by)


NOTHING = Range(0, 0)


@dataclass(frozen=True)
class Shards:
    """A layout that is cut in shards along one token axis."""

    axis: Axis
    """That of the whole layout."""
    sizes: tuple[int, ...]
    """Tokens of every shard, which may be none."""

    @cached_property
    def starts(self) -> tuple[int, ...]:
        return (*accumulate(self.sizes[:-1], initial=0),)

    @property
    def layout(self) -> int:
        return self.axis.layout

    @property
    def is_ring(self) -> bool:
        return self.axis.border == "wrap"

    def own(self, shard: int) -> Range:
        """The tokens of a shard."""
        return Range(self.starts[shard], self.starts[shard] + self.sizes[shard])

    def seen(self, shard: int) -> Range:
        """The keys that the queries of a shard see, among them those between: its own and halos."""
        return seen_by(self.axis, self.own(shard))

    def parts(self, owner: int, tokens: Range) -> Iterator[Range]:
        """What of `tokens`, which may be unrolled, belongs to a shard: at most two ranges."""
        for lap in (-1, 0, 1) if self.is_ring else (0,):
            part = self.own(owner).moved(lap * self.layout).meet(tokens)
            if part.length:
                yield part

    def part(self, shard: int, key_start: int, key_length: int) -> Axis:
        """The axis of a shard's queries where these keys are given."""
        return replace(self.axis, length=self.sizes[shard], key_length=key_length).at(
            self.starts[shard], key_start
        )

    def inner(self, shard: int) -> Range:
        """The longest range of a shard's queries that see none but its own keys."""
        own, seen = self.own(shard), self.seen(shard)
        if seen == own:
            return own
        if self.is_ring and seen.length == self.layout:  # windows may meet behind the shard
            return NOTHING
        return _inner(self.axis, own)


def chunk(tokens: Range, count: int, shard: int) -> Range:
    """One of `count` shards as ``torch.chunk``, and so ``DTensor``, makes them; it may be empty."""
    size = -(-tokens.length // count)
    start = min(tokens.start + size * shard, tokens.stop)
    return Range(start, min(start + size, tokens.stop))


def chunks(length: int, counts: Sequence[int]) -> tuple[int, ...]:
    """The sizes of all shards, where each of the first is cut again, and so on."""
    ranges = [Range(0, length)]
    for count in counts:
        ranges = [chunk(one, count, shard) for one in ranges for shard in range(count)]
    return tuple(one.length for one in ranges)


@lru_cache(maxsize=65536)
def seen_by(axis: Axis, queries: Range) -> Range:
    """The keys that these queries of the layout see, among them those in between.

    On a ring the range lies around the queries.
    """
    if not queries.length:
        return NOTHING
    if queries.length == axis.layout:
        return queries
    group = np.arange(min(axis.dilation, queries.length))
    part = _part(axis, queries)
    last = part.group_length(group) - 1
    begin, _ = _tokens(part, np.zeros_like(group), group)
    _, end = _tokens(part, last, group)
    start, stop = int(begin.min()), int(end.max())
    if stop - start > axis.layout:  # on a ring only
        start = max(start, queries.stop - axis.layout)
        stop = start + axis.layout
    return Range(start, stop)


def _inner(axis: Axis, own: Range) -> Range:
    """The longest range of queries that see none but `own` keys."""
    part = _part(axis, own)
    token = np.arange(own.length)
    begin, end = _tokens(part, token // axis.dilation, token % axis.dilation)
    outer = np.flatnonzero((begin < own.start) | (end > own.stop))
    bounds = np.concatenate([[-1], outer, [own.length]])
    longest = int(np.argmax(np.diff(bounds)))
    return Range(int(bounds[longest]) + 1, int(bounds[longest + 1])).moved(own.start)


def _part(axis: Axis, queries: Range) -> Axis:
    """`axis` with these queries, and all keys of the layout."""
    return replace(
        axis,
        length=queries.length,
        key_length=axis.layout,
        query_start=queries.start,
        key_start=0,
    )


def _tokens(part: Axis, index: Integers, group: Integers) -> tuple[Integers, Integers]:
    """The first token of the windows of some queries, and that after the last."""
    d = part.dilation
    begin, end = part.unclipped(index, group)
    begin, end = begin * d + part.key_group(group), (end - 1) * d + part.key_group(group) + 1
    if part.border != "wrap":
        return begin, end
    # Windows on a ring may be any number of laps away from their queries.
    query = index * d + group + part.query_start
    laps = (query - begin) // part.layout * part.layout
    return begin + laps, end + laps
