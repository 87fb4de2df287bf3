"""Tiles along one token axis: queries, the halo of keys that they see, and which of it each sees.

A `Strip` holds tiles that are translations of one another. Tiles at the borders, or cut short by
the end of their dilation group, are in strips of their own: nothing is padded.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh._backends.cpu.tokens import Integers
from cuneigh._window import Axis, Promise

Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Strip:
    """Tiles along one axis that are alike. Tokens count along the whole axis."""

    axis: Axis
    start: Integers
    """[queries] The key of the halo at which the window of each query of a tile starts."""
    end: Integers
    """[queries] Where the windows end."""
    first_query: Integers
    """[tiles] The token of each tile's first query."""
    first_key: Integers
    """[tiles] The token of the first key of each halo."""
    offsets: Integers
    """[keys] The tokens of a halo's keys, from its first one; on a ring they may go back."""

    @property
    def tiles(self) -> int:
        return len(self.first_query)

    @property
    def queries(self) -> int:
        return len(self.start)

    @property
    def keys(self) -> int:
        """Keys of a halo; the windows of a tile's queries never go back."""
        return len(self.offsets)

    @cached_property
    def runs(self) -> list[slice]:
        """Keys of a halo whose tokens follow evenly."""
        edges = [0, *(np.flatnonzero(np.diff(self.offsets) <= 0) + 1).tolist(), self.keys]
        return [slice(begin, end) for begin, end in itertools.pairwise(edges)]

    def visible(self) -> Booleans:
        """[keys, queries]"""
        key = np.arange(self.keys)[:, None]
        visible: Booleans = (self.start <= key) & (key < self.end)
        return visible

    def bias_index(self) -> Integers:
        """[keys, queries] Index of each pair's relative positional bias; any for hidden pairs."""
        axis, (index, group) = self.axis, self._first_tile
        seen = _Given(axis, group)
        first = seen.number(axis.window(index[:1], group)[0])
        key = seen.key(first + np.arange(self.keys))[:, None]
        relative: Integers = axis.relative(index, key, group)
        return relative.clip(0, 2 * axis.kernel_size - 2)

    def slot_keys(self) -> Integers:
        """[queries, slots] Which key of the halo is in each slot; negative if it is hidden."""
        axis, (index, group) = self.axis, self._first_tile
        seen = _Given(axis, group)
        first = seen.number(axis.window(index[:1], group)[0])
        begin, end = axis.unclipped(index[:, None], group)
        key = begin + np.arange(axis.kernel_size)
        return np.where((key < end) & seen.holds(key), seen.number(key) - first, -1)

    @property
    def _first_tile(self) -> tuple[Integers, Integers]:
        """The indices of its queries, and their dilation group."""
        first, dilation = self.first_query[:1], self.axis.dilation
        return first // dilation + np.arange(self.queries), first % dilation


class _Given:
    """The given keys that queries of some groups see, numbered without those not given.

    On a ring whose seam is crossed, windows hold keys that are not given in between.
    """

    def __init__(self, axis: Axis, group: Any) -> None:
        self._axis, self.group = axis, axis.key_group(group)
        self._length = axis.key_group_length(self.group)
        self._goes_round = Promise.INSIDE not in axis.promises

    def holds(self, key: Any) -> Any:
        """Whether `key`, as `Axis.unclipped` counts, is given."""
        if self._goes_round:
            return key % self._axis.ring < self._length
        return (key >= 0) & (key < self._length)

    def number(self, key: Any) -> Any:
        """That of `key`, or of the next one that is given."""
        if not self._goes_round:
            return key
        ring, given = self._axis.ring, self._length
        return key // ring * given + np.minimum(key % ring, given)

    def key(self, number: Any) -> Any:
        """The opposite of `number`."""
        if not self._goes_round:
            return number
        given = np.maximum(self._length, 1)
        return number // given * self._axis.ring + number % given

    def index(self, number: Any) -> Any:
        """The local index of a key."""
        return number % np.maximum(self._length, 1) if self._goes_round else number


def strips(axis: Axis, queries: int, placed: bool) -> tuple[Strip, ...]:
    """All of `axis` in tiles of at most `queries` queries of one dilation group.

    If they are to be `placed`, as for a relative positional bias, tiles are alike only if their
    halos start equally far back, and their windows at the same slots.
    """
    groups = np.arange(axis.dilation, dtype=np.int64)
    tiles = -(-axis.group_length(groups) // queries)
    group = np.repeat(groups, tiles)
    first = (np.arange(len(group)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * queries
    count = np.minimum(queries, axis.group_length(group) - first)
    index = first[:, None] + np.minimum(np.arange(queries), count[:, None] - 1)
    start, end = axis.window(index, group[:, None])
    of_tile, of_query = _Given(axis, group), _Given(axis, group[:, None])
    start, end = of_query.number(start), of_query.number(end)
    first_key, size = start[:, 0].copy(), end[:, -1] - start[:, 0]
    begins = of_tile.index(first_key)
    length = axis.key_group_length(of_tile.group)
    # Halos that go round are alike only if they do so at the same key.
    turn = np.where(begins + size > length, (begins, length), -1)
    traits = [start - first_key[:, None], end - first_key[:, None], count[:, None], turn.T]
    if placed:
        first_seen = of_tile.key(first_key)
        traits.append(axis.relative(first, first_seen, group)[:, None])
        if not axis.is_ordinary:
            traits.append(first_seen[:, None] - axis.unclipped(index, group[:, None])[0])
    signature = np.concatenate(traits, 1)  # equal for tiles that are alike

    alike: dict[bytes, list[range]] = {}
    changes = np.flatnonzero((signature[1:] != signature[:-1]).any(1)) + 1
    for begin, stop in itertools.pairwise([0, *changes.tolist(), len(signature)]):
        alike.setdefault(signature[begin].tobytes(), []).append(range(begin, stop))
    result: list[Strip] = []
    for tiles_alike in alike.values():
        of, own = np.concatenate(tiles_alike), int(count[tiles_alike[0].start])
        shared = signature[of[0]]
        start_of, end_of = shared[:own], shared[queries : queries + own]
        first_query = first[of] * axis.dilation + group[of]
        keys = np.arange(end_of[-1])
        first_keys = begins[of] * axis.dilation + of_tile.group[of]
        offsets = (
            _Given(axis, group[of[0]]).index(begins[of[0]] + keys) - begins[of[0]]
        ) * axis.dilation
        if not keys.size:
            first_keys[:] = 0
        # Even steps make copies fast, but groups of many tiles would make many strips.
        even = even_runs(first_query, first_keys) if axis.dilation == 1 else [slice(None)]
        result += (
            Strip(axis, start_of, end_of, first_query[run], first_keys[run], offsets)
            for run in even
        )
    return tuple(result)


def even_runs(*positions: Integers) -> list[slice]:
    """Slices that cut the arrays, all of one size, into pieces with equal steps in each of them."""
    steps = np.stack([np.diff(each) for each in positions], 1)
    runs, begin = [], 0
    while begin < len(positions[0]):
        changes = np.flatnonzero((steps[begin:] != steps[begin : begin + 1]).any(1))
        end = begin + 1 + int(changes[0] if changes.size else len(steps) - begin)
        runs.append(slice(begin, end))
        begin = end
    return runs
