"""What one rank sends, receives and computes, of a layout in shards along several token axes.

Ranks stand in a grid, in row-major order, with an axis for every token axis. Every rank has the
box of queries and keys where the shards along all axes meet, and needs the box of keys that its
queries see. What of that belongs to another rank comes in one message, which may hold several
boxes: on a ring a rank can lie on both sides of another.

The queries are computed in *pieces*: those that see no keys but the rank's own need not wait for a
message. What remains of the box around them is cut off along one axis after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from cuneigh._shards.axis import NOTHING, Range, Shards, seen_by


class Box(NamedTuple):
    """A range along every token axis."""

    ranges: tuple[Range, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(one.length for one in self.ranges)

    @property
    def tokens(self) -> int:
        return math.prod(self.shape)

    def meet(self, other: Box) -> Box:
        return Box(tuple(a.meet(b) for a, b in zip(self.ranges, other.ranges, strict=True)))

    def within(self, other: Box) -> bool:
        return all(a.within(b) for a, b in zip(self.ranges, other.ranges, strict=True))

    def moved(self, by: Sequence[int]) -> Box:
        return Box(tuple(a.moved(b) for a, b in zip(self.ranges, by, strict=True)))

    def slices(self, origin: Box) -> tuple[slice, ...]:
        """Where the box lies in an array of the tokens of `origin`."""
        return tuple(
            slice(a.start - b.start, a.stop - b.start)
            for a, b in zip(self.ranges, origin.ranges, strict=True)
        )


class Work(NamedTuple):
    """Queries that are computed by one call, and the keys of that call."""

    queries: Box
    keys: Box


Boxes = tuple[Box, ...]


@dataclass(frozen=True)
class Plan:
    """The part of one rank in a layout in shards. Boxes are in tokens of the layout."""

    axes: tuple[Shards, ...]
    rank: int

    @property
    def grid(self) -> tuple[int, ...]:
        """Shards along every token axis."""
        return tuple(len(shards.sizes) for shards in self.axes)

    @property
    def ranks(self) -> int:
        return math.prod(self.grid)

    def place(self, rank: int) -> tuple[int, ...]:
        """A rank's place in the grid."""
        return tuple(int(i) for i in np.unravel_index(rank, self.grid))

    def own_of(self, rank: int) -> Box:
        pairs = zip(self.axes, self.place(rank), strict=True)
        return Box(tuple(shards.own(shard) for shards, shard in pairs))

    def seen_of(self, rank: int) -> Box:
        """The keys that a rank needs, its own among them; empty along all axes if along one."""
        pairs = zip(self.axes, self.place(rank), strict=True)
        box = Box(tuple(shards.seen(shard) for shards, shard in pairs))
        return box if box.tokens else Box((NOTHING,) * len(self.axes))

    @cached_property
    def own(self) -> Box:
        """The rank's queries and keys."""
        return self.own_of(self.rank)

    @cached_property
    def seen(self) -> Box:
        """The keys that its queries see."""
        return self.seen_of(self.rank)

    def message(self, sender: int, receiver: int) -> Boxes:
        """What of the sender's keys the receiver needs, where this lies in the receiver's box."""
        if sender == receiver:
            return ()
        seen = self.seen_of(receiver).ranges
        along = [
            list(shards.parts(shard, tokens))
            for shards, shard, tokens in zip(self.axes, self.place(sender), seen, strict=True)
        ]
        return tuple(Box(ranges) for ranges in product(*along))

    @cached_property
    def sent(self) -> tuple[Boxes, ...]:
        """The message to every rank, in places of the rank's own keys."""
        messages = [self.message(self.rank, other) for other in range(self.ranks)]
        return tuple(tuple(map(self._at_home, boxes)) for boxes in messages)

    def _at_home(self, box: Box) -> Box:
        """A box of own keys as it lies in `own`, and not around another rank's on a ring."""
        layouts = [max(shards.layout, 1) for shards in self.axes]
        from_own = [
            one.start - own.start for one, own in zip(box.ranges, self.own.ranges, strict=True)
        ]
        return box.moved([by % layout - by for by, layout in zip(from_own, layouts, strict=True)])

    @cached_property
    def received(self) -> tuple[Boxes, ...]:
        """The message from every rank, in places of `seen`."""
        return tuple(self.message(other, self.rank) for other in range(self.ranks))

    @cached_property
    def exchanges(self) -> bool:
        """Whether any rank needs keys of another: the same on all ranks."""
        ranks = range(self.ranks)
        return any(self.seen_of(rank).tokens > self.own_of(rank).tokens for rank in ranks)

    @property
    def receives(self) -> bool:
        """Whether the rank needs keys of another one."""
        return self.seen.tokens > self.own.tokens

    # What is computed

    @cached_property
    def whole(self) -> tuple[Work, ...]:
        """All of the rank's queries by one call."""
        return (Work(self.own, self.seen),) if self.own.tokens else ()

    @cached_property
    def pieces(self) -> tuple[Work, ...]:
        """All of the rank's queries by calls of which the first needs no message.

        If there are no such queries, it is one call.
        """
        if not self.own.tokens:
            return ()
        pairs = zip(self.axes, self.place(self.rank), strict=True)
        inner = Box(tuple(shards.inner(shard) for shards, shard in pairs))
        if not inner.tokens:
            return self.whole
        rest, found = list(self.own.ranges), [Work(inner, self.own)]
        for axis, (own, among) in enumerate(zip(self.own.ranges, inner.ranges, strict=True)):
            for side in (Range(own.start, among.start), Range(among.stop, own.stop)):
                if side.length:
                    found.append(self._work_of(Box((*rest[:axis], side, *rest[axis + 1 :]))))
            rest[axis] = among
        return tuple(found)

    def _work_of(self, queries: Box) -> Work:
        pairs = zip(self.axes, queries.ranges, strict=True)
        return Work(queries, Box(tuple(seen_by(shards.axis, one) for shards, one in pairs)))


@lru_cache(maxsize=1024)
def plan_of(axes: tuple[Shards, ...], rank: int) -> Plan:
    """The plan of a rank, kept for the calls to come."""
    return Plan(axes, rank)
