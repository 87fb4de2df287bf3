"""Which keys a query sees along one token axis, and which queries see a key.

Along an axis the queries and keys that are given are a part, often the whole, of a layout. In
indices of the whole layout:

1. Token ``x`` belongs to dilation group ``x % dilation`` and has index ``x // dilation`` in it.
   Attention never crosses groups; everything below is in group indices.
2. `stride` consecutive queries share one window, that of their leader: the middle one of them, or
   the last one on a causal axis, in either case at most the last query of the group.
3. The window of a leader holds `kernel_size` keys around it; an even window has one key more on the
   left than on the right. At the borders of the layout it is pushed inwards ("shift"), loses what
   lies outside ("cut"), or goes on at the other end ("wrap": the axis is a ring). On a causal axis
   it ends with the query itself and may be cut short by the left border.
4. A query sees a key when all of that holds on every axis, and the key is given.

`Axis` has its methods in *local* indices: local token t of the queries is token t + query_start of
the layout, and lies in local group ``t % dilation``; keys likewise. So the queries of one local
group see keys of another one, `Axis.key_group`, unless both parts begin at the same place.

The contract: what `Axis.window(i, group)` and `Axis.inverse(j, group)` promise of their (begin,
end), for every group and every i and j in it. `Promise` names its parts. A backend says in its
`RELIES_ON` which of them it relies on, and must refuse windows that break one of those.

- `ONE_RANGE`: what is seen is the one range begin <= index < end; it may be empty.
- `INSIDE`: the range lies inside the group: 0 <= begin <= end <= length of the group, that is the
  number of its tokens that are given.
- `INCREASING`: neither begin nor end ever decreases from one index to the next. So the union of the
  ranges of consecutive indices i .. j reaches from begin(i) to end(j), and what is common to all of
  them is begin(j) .. end(i), if that is not empty. (An empty range is placed so that this holds.)

`INSIDE` is broken on a ring only, and there only if some query's window holds given keys on both
sides of where these begin (`Axis.promises` says so, once for all queries). Then ranges are
*unrolled*: u of begin <= u < end, which is never negative, means index ``u % ring`` of the group,
and that is seen if it is less than the number of tokens given. No range is longer than the ring.

The arithmetic works alike on ints and on NumPy integer arrays. Its twin in C++ is
`cuda/cuneigh/window.cuh`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Flag, auto
from functools import lru_cache
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt

Index = TypeVar("Index", int, npt.NDArray[np.int64])

Border = Literal["shift", "cut", "wrap"]
"""What becomes of a window at the ends of the layout."""

BORDERS: tuple[Border, ...] = get_args(Border)


class Promise(Flag):
    """The parts of the contract that the docstring of this module states."""

    ONE_RANGE = auto()
    INSIDE = auto()
    INCREASING = auto()


CONTRACT = Promise.ONE_RANGE | Promise.INSIDE | Promise.INCREASING
"""What every window keeps that does not cross the seam of a ring."""

WHOLE = -1
"""The `Axis.layout` of an axis whose keys are the whole layout."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One token axis: the parts of its layout that are given, and the window that slides along it.

    All queries see all keys of the layout in cross attention, where `kernel_size` is `layout`;
    only there may be more queries than the layout has tokens.
    """

    length: int
    """Queries that are given."""
    key_length: int
    """Keys that are given."""
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    border: Border = "shift"
    layout: int = WHOLE
    """Tokens of the whole layout."""
    query_start: int = 0
    """The token of the layout that is the first query; on a ring it is taken modulo `layout`."""
    key_start: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.layout, int) and self.layout < 0:
            object.__setattr__(self, "layout", self.key_length)
        if self.border == "wrap":
            for name in ("query_start", "key_start"):
                if start := getattr(self, name):
                    object.__setattr__(self, name, start % self.layout)

    # What is given

    @property
    def is_part(self) -> bool:
        """Whether less than the whole layout is given, cross attention not counted."""
        if self.key_length != self.layout or self.query_start or self.key_start:
            return True
        sees_all = self.kernel_size == self.key_length and not self.is_causal
        return self.length != self.key_length and not sees_all

    @property
    def is_part_anywhere(self) -> bool:
        """Whether it is a part whatever the starts."""
        return self.is_part and (self.key_length != self.layout or self.at(0, 0).is_part)

    @property
    def is_ordinary(self) -> bool:
        """Whether the whole layout is given, and windows are pushed inwards at its borders."""
        return self.border == "shift" and not self.is_part

    @property
    def promises(self) -> Promise:
        """What of the contract the windows of this axis keep, and its inverse."""
        crosses = self.border == "wrap" and turn_of(self).crosses
        return CONTRACT & ~Promise.INSIDE if crosses else CONTRACT

    @property
    def ring(self) -> int:
        """Length of every dilation group of the layout of a ring."""
        return self.layout // self.dilation

    def at(self, query_start: int, key_start: int) -> Axis:
        """The axis with other parts of the same sizes given."""
        return replace(self, query_start=query_start, key_start=key_start)

    def anywhere(self) -> Axis:
        """The same axis for all starts between which promises do not change, or nearly all.

        Its parts lie in the middle of the layout, and end together on a causal axis, as queries do
        with a cache of keys; or, if a seam is crossed, at the seam.
        """
        if not self.is_part:
            return self
        keys = (self.layout - self.key_length) // 2
        # Not the first of them: if these see all keys, that would be taken for cross attention
        queries = (self.layout - self.length + 1) // 2
        if self.is_causal:
            queries = max(keys + self.key_length - self.length, 0)
        there = self.at(queries, keys)
        if there.promises != self.promises:
            there = self.at((self.key_length + self.layout - self.length) // 2, 0)
        return there if there.promises == self.promises else self

    # Groups, all local

    def group_length(self, group: Index) -> Index:
        """Number of given queries in dilation group `group`."""
        return (self.length - group + self.dilation - 1) // self.dilation

    def key_group_length(self, group: Index) -> Index:
        """Number of given keys in dilation group `group`."""
        return (self.key_length - group + self.dilation - 1) // self.dilation

    def key_group(self, group: Index) -> Index:
        """The group of the keys that queries of `group` may see."""
        return (group + self.query_start - self.key_start) % self.dilation

    def query_group(self, group: Index) -> Index:
        """The group of the queries that may see keys of `group`."""
        return (group + self.key_start - self.query_start) % self.dilation

    # Windows

    def window(self, index: Index, group: Index) -> tuple[Index, Index]:
        """Half-open range of given keys of `key_group(group)` that query `index` of `group` sees.

        It is unrolled where the seam of a ring is crossed.
        """
        begin, end = self.unclipped(index, group)
        if self.is_ordinary or Promise.INSIDE not in self.promises:
            return begin, end
        given = self.key_group_length(self.key_group(group))
        return clipped(begin, given), clipped(end, given)

    def unclipped(self, index: Index, group: Index) -> tuple[Index, Index]:
        """`window` as if all keys of the layout were given, in the same indices.

        Slot a of the logits of a query belongs to the key at begin + a, if that is before end and
        given.
        """
        k, s = self.kernel_size, self.stride
        index = index + (group + self.query_start) // self.dilation
        to_local = (self.key_group(group) + self.key_start) // self.dilation
        if self.border == "wrap":
            begin, end = self._window_on_ring(index + turn_of(self).keys * self.ring)
            return begin - to_local, end - to_local
        length = self._layout_group_length((group + self.query_start) % self.dilation)
        offset = s - 1 if self.is_causal else s // 2
        leader = minimum(index // s * s + offset, length - 1)
        if self.is_causal:
            return maximum(leader - k + 1, 0) - to_local, index + 1 - to_local
        begin = leader - k // 2
        if self.border == "cut":
            return maximum(begin, 0) - to_local, minimum(begin + k, length) - to_local
        begin = minimum(maximum(begin, 0), length - k) - to_local
        return begin, begin + k

    def inverse(self, index: Index, group: Index) -> tuple[Index, Index]:
        """Half-open range of given queries of `query_group(group)` that see key `index` of `group`.

        It is unrolled where the seam of a ring is crossed.
        """
        own = self.query_group(group)
        to_local, given = (own + self.query_start) // self.dilation, self.group_length(own)
        index = index + (group + self.key_start) // self.dilation
        if self.border == "wrap":
            turn = turn_of(self)
            begin, end = self._inverse_on_ring(index - turn.keys * self.ring)
            if turn.crosses:
                to_local = to_local - turn.queries * self.ring
                return begin - to_local, end - to_local
        else:
            length = self._layout_group_length((group + self.key_start) % self.dilation)
            begin, end = self._inverse_on_line(index, length, to_local + given)
        return clipped(begin - to_local, given), clipped(end - to_local, given)

    def _inverse_on_line(self, index: Index, length: Index, last: Index) -> tuple[Index, Index]:
        """The queries of the layout that see its key `index`; those after `last` do not matter."""
        k, s = self.kernel_size, self.stride
        if self.is_causal:
            past_end = index + k >= length
            return index, minimum(s * ((index + k) // s + past_end), last)
        left, right = k // 2, k - 1 - k // 2
        begin = s * ((index - right + s - s // 2 - 1) // s)
        end = s * ((index + left + s - s // 2) // s)
        if self.border == "cut":
            begin = minimum(begin, s * ((length - 1) // s))
            return begin, where(index + left >= length - 1, last, end)
        return where(index >= k, begin, 0), where(index >= length - k, last, end)

    def _window_on_ring(self, index: Index) -> tuple[Index, Index]:
        """The keys that query `index` sees, all in unrolled indices of the layout."""
        s, ring = self.stride, self.ring
        leader = minimum(index % ring // s * s + s // 2, ring - 1) + index // ring * ring
        begin = leader - self.kernel_size // 2
        return begin, begin + self.kernel_size

    def _inverse_on_ring(self, index: Index) -> tuple[Index, Index]:
        """The queries that see key `index`, all in unrolled indices of the layout."""
        k, s, ring = self.kernel_size, self.stride, self.ring

        def first(leader: Index) -> Index:
            """The first query whose leader is not before this one."""
            of_lap = minimum(s * ((leader % ring + s - 1 - s // 2) // s), ring)
            return leader // ring * ring + of_lap

        return first(index - (k - 1 - k // 2)), first(index + k // 2 + 1)

    def relative(self, index: Index, key: Index, group: Index) -> Index:
        """Index into rpb for query `index` of `group` and a key that `unclipped` gives it."""
        place = (group + self.query_start) // self.dilation
        key_place = (self.key_group(group) + self.key_start) // self.dilation
        if self.border == "wrap":
            key_place = key_place - turn_of(self).keys * self.ring
        return key + key_place - (index + place) + self.kernel_size - 1

    def windows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """`window` of every given query, in token order."""
        token = np.arange(self.length, dtype=np.int64)
        return self.window(token // self.dilation, token % self.dilation)

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs along this axis in which the query sees the key."""
        begin, end = self.windows()
        if Promise.INSIDE not in self.promises:
            given = self.key_group_length(self.key_group(np.arange(self.length) % self.dilation))
            begin, end = (
                u // self.ring * given + minimum(u % self.ring, given) for u in (begin, end)
            )
        return int((end - begin).sum())

    def _layout_group_length(self, group: Index) -> Index:
        return (self.layout - group + self.dilation - 1) // self.dilation


class Turn(NamedTuple):
    """By how many laps indices on a ring are moved on to become local ones."""

    keys: int
    queries: int
    crosses: bool
    """Whether a window holds given keys on both sides of where these begin."""


@lru_cache(maxsize=1024)
def turn_of(axis: Axis) -> Turn:
    """That of a ring. Without a crossing, all windows are brought to where the given keys are."""
    ring = axis.ring
    reaches = list(_reaches(axis))
    met = [reach for reach in reaches if reach.given]
    if not met:
        return Turn(0, 0, False)
    least = max(-((ring - given + begin) // ring) for begin, _, given in met)
    most = min((ring - end) // ring for _, end, _ in met)
    if least <= most:
        return Turn(least, 0, False)
    keys = -(min(reach.begin for reach in reaches) // ring)
    first_key = 0 - keys * ring
    earliest = min(
        axis._inverse_on_ring((group + axis.key_start) // axis.dilation + first_key)[0]
        - (axis.query_group(group) + axis.query_start) // axis.dilation
        for group in _groups(
            axis.dilation, axis.key_length, axis.key_start, axis.length, axis.query_start
        )
    )
    return Turn(keys, -(earliest // ring), True)


class _Reach(NamedTuple):
    """What all queries of a group see together: one range, for their windows leave no gap."""

    begin: int
    end: int
    given: int
    """Keys of the group that are given."""


def _reaches(axis: Axis) -> Iterator[_Reach]:
    """That of a group of every kind, in the indices of the first lap."""
    d = axis.dilation
    for group in _groups(d, axis.length, axis.query_start, axis.key_length, axis.key_start):
        given = axis.key_group_length(axis.key_group(group))
        to_local = (axis.key_group(group) + axis.key_start) // d
        first = (group + axis.query_start) // d
        begin, _ = axis._window_on_ring(first)
        _, end = axis._window_on_ring(first + axis.group_length(group) - 1)
        yield _Reach(begin - to_local, end - to_local, given)


def _groups(
    dilation: int, length: int, start: int, other_length: int, other_start: int
) -> list[int]:
    """Local groups of one side, one of each kind: in between, indices and lengths are the same."""
    shift = other_start - start
    changes = {0, -start % dilation, shift % dilation, length % dilation}
    changes.add((other_length + shift) % dilation)
    return [group for group in sorted(changes) if group < length]


def clipped(index: Index, length: Index) -> Index:
    return minimum(maximum(index, 0), length)


def minimum(a: Index, b: Index | int) -> Index:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else np.minimum(a, b)


def maximum(a: Index, b: Index | int) -> Index:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else np.maximum(a, b)


def where(condition: object, a: Index | int, b: Index | int) -> Index:
    if isinstance(condition, bool):
        return a if condition else b  # type: ignore[return-value]
    return np.where(condition, a, b)  # type: ignore[call-overload,no-any-return]
