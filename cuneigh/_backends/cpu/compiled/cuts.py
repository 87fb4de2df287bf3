"""Tiles: queries that are computed together, one in each number of a vector.

A token axis is cut into runs of queries of one dilation group; a tile is a product of such runs,
one along each axis. Neighbors see much the same keys, so that a tile's logits are dense: those of
all its queries and of the block of keys that any of them sees. Along an axis keys are laid out
group by group, so that those of a block follow each other.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh._window import Axis

Integers = npt.NDArray[np.int64]


class Queries(NamedTuple):
    """Of each run of an axis, ``[runs, most queries]``; what a run lacks is as its first query."""

    tokens: Integers
    begins: Integers
    """The first key that each query sees, after that of the run."""
    lengths: Integers
    """The keys that it sees."""
    counts: Integers
    """``[runs]``: how many queries it has."""


class Keys(NamedTuple):
    """Of each run of an axis: the keys that any of its queries sees."""

    first: Integers
    counts: Integers


class Cut(NamedTuple):
    """An axis in runs."""

    queries: Queries
    keys: Keys
    order: Integers
    """The token of every key, as keys are laid out."""

    @property
    def table(self) -> Integers:
        """``[runs, numbers]``: all of a run in a row, the counts last."""
        *of_query, counts = self.queries
        columns = (each[:, None] for each in (counts, *self.keys))
        return integers(np.concatenate([*of_query, *columns], 1))


_ZERO, _ONE = np.zeros(1, np.int64), np.ones(1, np.int64)
ALONE = Cut(
    Queries(_ZERO[None], _ZERO[None], _ONE[None], counts=_ONE),
    Keys(first=_ZERO, counts=_ONE),
    order=_ZERO,
)
"""An axis of one token."""


@lru_cache(maxsize=32)
def cut(axis: Axis, most: int) -> Cut:
    """`axis` in runs of `most` queries, the last one of each dilation group excepted."""
    dilation = axis.dilation
    group, first, counts = runs_of(axis, most)
    offset = np.arange(most)
    index = first[:, None] + np.where(offset < counts[:, None], offset, 0)
    begin, end = axis.window(index, group[:, None])
    sees = end > begin
    first_key = np.where(sees, begin, axis.key_length).min(1)
    key_counts = np.maximum(np.where(sees, end, 0).max(1) - first_key, 0)

    groups = np.arange(dilation)
    of_group = axis.key_group_length(groups)
    laid_out = np.cumsum(of_group) - of_group
    places = laid_out[axis.key_group(group)] + first_key
    order = [np.arange(each, axis.key_length, dilation) for each in groups]
    return Cut(
        Queries(
            integers(index * dilation + group[:, None]),
            integers(np.where(sees, begin - first_key[:, None], 0)),
            integers(np.where(sees, end - begin, 0)),
            integers(counts),
        ),
        Keys(integers(np.where(key_counts > 0, places, 0)), integers(key_counts)),
        integers(np.concatenate(order)),
    )


def runs_of(axis: Axis, most: int) -> tuple[Integers, Integers, Integers]:
    """The dilation group of each run, its first query in that, and its number of queries."""
    groups = np.arange(axis.dilation, dtype=np.int64)
    runs = -(-axis.group_length(groups) // most)
    group = np.repeat(groups, runs)
    first = (np.arange(len(group)) - np.repeat(np.cumsum(runs) - runs, runs)) * most
    return group, first, np.minimum(most, axis.group_length(group) - first)


def integers(array: Integers) -> Integers:
    """`array` as kernels take it."""
    return np.ascontiguousarray(array, np.int64)


@lru_cache(maxsize=256)
def tile_shape(axes: tuple[Axis, ...], lanes: int) -> tuple[int, ...]:
    """The queries of a tile along each axis, `lanes` at most, that need the fewest logits.

    Of parts of a layout, the shape is that of parts in its middle.
    """
    choices = []
    for axis in axes:
        longest = max(min(lanes, -(-axis.length // axis.dilation)), 1)
        there = axis.anywhere()
        choices.append([(most, keys_of(there, most)) for most in range(1, longest + 1)])
    shapes = [
        (math.prod(keys for _, keys in shape), tuple(most for most, _ in shape))
        for shape in itertools.product(*choices)
    ]
    fits = (each for each in shapes if math.prod(each[1]) <= lanes)
    _, best = min(fits, key=lambda each: (each[0], -each[1][-1]))  # long rows, of equals
    return best


@lru_cache(maxsize=256)
def keys_of(axis: Axis, most: int) -> int:
    """The keys of all runs together."""
    group, first, counts = runs_of(axis, most)
    begin, _ = axis.window(first, group)
    _, end = axis.window(first + counts - 1, group)
    return int(np.maximum(end - begin, 0).sum())


def logits(axes: tuple[Axis, ...], lanes: int) -> int:
    """Vectors of logits of all tiles of a head."""
    shape = tile_shape(axes, lanes)
    return math.prod(keys_of(axis, most) for axis, most in zip(axes, shape, strict=True))
