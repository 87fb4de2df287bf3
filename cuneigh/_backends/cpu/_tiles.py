"""How a problem is cut up: boxes of tiles, each a tile of queries and the halo of keys it sees.

Everything is separable over the token axes. A `Strip` holds the tiles of one axis, each with the
same number of queries of one dilation group and a halo of the same number of keys; a `Box` is a
block of the product of strips, for some batch entries and key heads. The tiles of a box have one
shape, so that one batch of matrix products computes them all.

A tile at the end of its group repeats the last query, and a halo that is longer than its group
repeats the last key: a `Strip` says which queries are valid, and nobody sees a repeated key.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh._problem import Problem
from cuneigh._window import Axis

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class Strip:
    """Tiles along one axis. Indices are group indices, tokens are those of the whole axis."""

    axis: Axis
    queries: int
    """Queries of a tile."""
    keys: int
    """Keys of a halo."""
    group: Integers
    """[tiles, 1] The dilation group of every tile."""
    first_query: Integers
    """[tiles, 1]"""
    first_key: Integers
    """[tiles, 1]"""

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, tiles: slice) -> Strip:
        group, first_query, first_key = self.group, self.first_query, self.first_key
        return Strip(
            self.axis, self.queries, self.keys, group[tiles], first_query[tiles], first_key[tiles]
        )

    def query_index(self) -> Integers:
        """[tiles, queries]"""
        index: Integers = self.first_query + np.arange(self.queries)
        return np.minimum(index, self.axis.group_length(self.group) - 1)

    def key_index(self) -> Integers:
        """[tiles, keys]"""
        index: Integers = self.first_key + np.arange(self.keys)
        return np.minimum(index, self.axis.key_group_length(self.group) - 1)

    def query_tokens(self) -> Integers:
        """[tiles, queries]"""
        return self.query_index() * self.axis.dilation + self.group

    def key_tokens(self) -> Integers:
        """[tiles, keys]"""
        return self.key_index() * self.axis.dilation + self.group

    def key_slices(self) -> list[slice]:
        """The tokens of every tile's halo, repeated keys left out."""
        end = np.minimum(self.first_key + self.keys, self.axis.key_group_length(self.group))
        d = self.axis.dilation
        bounds = np.concatenate([self.first_key * d, (end - 1) * d + 1], 1) + self.group
        return [slice(start, stop, d) for start, stop in bounds.tolist()]

    def valid(self) -> Booleans:
        """[tiles, queries] False for repeated queries."""
        index = self.first_query + np.arange(self.queries)
        valid: Booleans = index < self.axis.group_length(self.group)
        return valid

    def windows(self) -> tuple[Integers, Integers]:
        """[tiles, queries] Where in the halo every query's window starts and ends."""
        start, end = self.axis.window(self.query_index(), self.group)
        return start - self.first_key, end - self.first_key

    def visible(self) -> Booleans:
        """[tiles or 1, keys, queries] One entry stands for all tiles where they are alike."""
        start, end = (bound[:, None] for bound in alike(*self.windows()))
        key = np.arange(self.keys)[:, None]
        visible: Booleans = (start <= key) & (key < end)
        return visible

    def bias_index(self) -> Integers:
        """[tiles or 1, keys, queries] Index of each pair's relative positional bias.

        Pairs that do not see each other have any legal index.
        """
        (offset,) = alike(self.query_index() - self.first_key)
        k = self.axis.kernel_size
        index: Integers = np.arange(self.keys)[:, None] - offset[:, None] + k - 1
        return np.clip(index, 0, 2 * k - 2)


def alike(*arrays: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
    """The arrays, or their first entries alone where all entries are equal."""
    if all((array == array[:1]).all() for array in arrays):
        return tuple(array[:1] for array in arrays)
    return arrays


def strips(axis: Axis, queries: int) -> list[Strip]:
    """The tiles of `queries` queries along `axis`, those with halos of like length together.

    Away from the borders all halos have one length. On a causal axis those near the left border
    are shorter, and with a long window that may be most of them: a strip holds the tiles whose
    halo fills more than two thirds of its own.
    """
    groups = np.arange(axis.dilation, dtype=np.int64)
    tiles = -(-axis.group_length(groups) // queries)
    group = np.repeat(groups, tiles)[:, None]
    before = np.repeat(np.cumsum(tiles) - tiles, tiles)[:, None]
    first = (np.arange(len(group))[:, None] - before) * queries
    last = np.minimum(first + queries, axis.group_length(group)) - 1
    start, end = axis.window(first, group)[0], axis.window(last, group)[1]
    needed = end - start

    result = []
    while len(group):
        keys = int(needed.max())
        taken = (3 * needed > 2 * keys)[:, 0]
        latest = np.maximum(axis.key_group_length(group) - keys, 0)
        first_key = np.minimum(start, latest)
        result.append(Strip(axis, queries, keys, group[taken], first[taken], first_key[taken]))
        group, first, start, needed = (a[~taken] for a in (group, first, start, needed))
    return result


def mesh(combine: Callable[[Any, Any], Any], parts: Sequence[npt.NDArray[Any]]) -> Any:
    """`parts`, one an axis, of shapes ``[tiles_r, m_r, ..]``, combined into one array of shape
    ``[tiles_1, .., tiles_R, m_1 * .. * m_R, ..]``.
    """
    rank, kinds = len(parts), parts[0].ndim
    spread = []
    for r, part in enumerate(parts):
        shape = [1] * (rank * kinds)
        shape[r::rank] = part.shape
        spread.append(part.reshape(shape))
    full = reduce(combine, spread)
    inner = [math.prod(full.shape[rank * kind : rank * (kind + 1)]) for kind in range(1, kinds)]
    return full.reshape(*full.shape[:rank], *inner)


@dataclass(frozen=True, eq=False)
class Place:
    """Where the tokens of a box's tiles are, for `Rows` to read and write."""

    batch: range
    heads: range
    tokens: tuple[Integers, ...]
    """``[tiles_r, m_r]`` for each axis."""
    valid: Booleans | None = None
    """``[tiles.., m]``: the tokens to be written; None for all."""

    @cached_property
    def even(self) -> tuple[int, int, int] | None:
        """First token and steps from tile to tile and from token to token, where there are such."""
        if len(self.tokens) > 1:
            return None
        (token,) = self.tokens
        first = int(token[0, 0])
        across = int(token[1, 0]) - first if len(token) > 1 else 0
        along = int(token[0, 1]) - first if token.shape[1] > 1 else 0
        tile, m = (np.arange(size) for size in token.shape)
        if (token != first + across * tile[:, None] + along * m).any():
            return None
        return first, across, along

    _indices: dict[tuple[int, ...], Integers] = field(default_factory=dict)

    def index(self, origin: int, *steps: int) -> Integers:
        """``[batch, tiles.., heads, m]``: `origin`, and a step an entry, token and head."""
        key = origin, *steps
        if key not in self._indices:
            batch_step, *token_steps, head_step = steps
            parts = [token * step for token, step in zip(self.tokens, token_steps, strict=True)]
            token: Integers = mesh(operator.add, parts)[..., None, :]
            head = np.arange(self.heads.start, self.heads.stop)[:, None] * head_step
            entry = origin + np.arange(self.batch.start, self.batch.stop) * batch_step
            self._indices[key] = entry.reshape(-1, *[1] * token.ndim) + (token + head)
        return self._indices[key]


@dataclass(frozen=True, eq=False)
class Box:
    """Tiles that one batch of matrix products computes."""

    batch: range
    kv_heads: range
    strips: tuple[Strip, ...]
    group_size: int
    additional: int

    @cached_property
    def lead(self) -> tuple[int, ...]:
        """The leading axes of all that is computed: batch, tiles_1, .., tiles_R, kv_heads."""
        return len(self.batch), *map(len, self.strips), len(self.kv_heads)

    @cached_property
    def heads(self) -> range:
        """The query heads that read `kv_heads`."""
        size = self.group_size
        return range(self.kv_heads.start * size, self.kv_heads.stop * size)

    @cached_property
    def queries(self) -> int:
        """Queries of a tile."""
        return math.prod(strip.queries for strip in self.strips)

    @cached_property
    def width(self) -> int:
        """Queries of a tile times query heads of a key head."""
        return self.queries * self.group_size

    @cached_property
    def halo(self) -> int:
        """Keys of a halo, the additional keys not counted."""
        return math.prod(strip.keys for strip in self.strips)

    @cached_property
    def keys(self) -> int:
        """Keys of a halo and additional keys."""
        return self.halo + self.additional

    @cached_property
    def query_place(self) -> Place:
        valid = mesh(np.logical_and, [strip.valid() for strip in self.strips])
        tokens = tuple(strip.query_tokens() for strip in self.strips)
        return Place(self.batch, self.heads, tokens, None if valid.all() else valid)

    @cached_property
    def key_place(self) -> Place:
        return Place(self.batch, self.kv_heads, tuple(strip.key_tokens() for strip in self.strips))

    @cached_property
    def key_region(self) -> tuple[Place, int] | None:
        """The keys of all tiles along the first axis as one, and the step from tile to tile.

        None unless those tiles are several and follow each other evenly.
        """
        along, *others = self.strips
        steps = np.diff(along.first_key, axis=0)
        if len(along) == 1 or (steps != steps[0]).any() or (along.group != along.group[0]).any():
            return None
        step = int(steps[0, 0])
        whole = replace(along[:1], keys=step * len(steps) + along.keys)
        tokens = tuple(strip.key_tokens() for strip in (whole, *others))
        return Place(self.batch, self.kv_heads, tokens), step * self.halo // along.keys

    @cached_property
    def additional_place(self) -> Place:
        """The additional keys, as one tile."""
        return Place(self.batch, self.kv_heads, (np.arange(self.additional)[None],))

    @cached_property
    def bias_index(self) -> Integers:
        """``[tiles.., keys, queries]``: index of each pair's bias in one head's flattened rpb."""
        sizes = [2 * strip.axis.kernel_size - 1 for strip in self.strips]
        steps = [math.prod(sizes[r + 1 :]) for r in range(len(sizes))]
        parts = [strip.bias_index() * step for strip, step in zip(self.strips, steps, strict=True)]
        index: Integers = mesh(operator.add, parts)
        return index

    def visible(self) -> Booleans:
        """``[tiles.., keys, queries]``: who sees whom; a tile axis of length 1 stands for any."""
        visible: Booleans = mesh(operator.and_, [strip.visible() for strip in self.strips])
        return visible

    @cached_property
    def bounds(self) -> list[tuple[slice, npt.NDArray[np.float32]]]:
        """Pieces of ``[tiles.., keys, queries]``, inf for who sees whom and -inf for who does not.

        They leave out the longest run of keys that all queries see.
        """
        visible = self.visible()
        shown = np.logical_and.reduce(visible, axis=(*range(visible.ndim - 2), -1))
        edges = np.flatnonzero(np.diff(np.pad(shown, 1)))
        starts, ends = (edges[::2], edges[1::2]) if edges.size else (np.zeros(1, int),) * 2
        longest = (ends - starts).argmax()
        pieces = slice(0, int(starts[longest])), slice(int(ends[longest]), len(shown))
        bound = np.where(visible, np.float32(np.inf), np.float32(-np.inf))
        return [(keys, bound[..., keys, :].copy()) for keys in pieces if keys.start < keys.stop]


# The shape of the tiles

LARGEST_TILE = 256
"""Queries of a tile, times query heads of a key head, that are worth trying."""

LARGEST_TILE_LOGITS = 1 << 22
"""Logits of a tile and one key head beyond which it counts as slow, to save memory."""

SMALL_PRODUCT = 1_000_000
"""Multiplications up to which OpenBLAS multiplies without packing its operands first."""


@lru_cache(maxsize=256)
def tiling(
    axes: tuple[Axis, ...], group_size: int, dims: int, additional: int
) -> tuple[tuple[Strip, ...], ...]:
    """The strips of every axis, in the tile shape that is predicted to be the fastest.

    Large tiles keep the BLAS busy, small ones have less of their halo hidden from each query. The
    predicted time, in ns, is linear in the numbers of logits, of halo elements and of queries,
    which are counted exactly; its coefficients were measured on one core with AVX-512.
    """

    def predict(cut: tuple[tuple[Strip, ...], ...]) -> float:
        width = group_size * math.prod(along[0].queries for along in cut)
        tiles = math.prod(sum(map(len, along)) for along in cut)
        keys = math.prod(sum(len(strip) * strip.keys for strip in along) for along in cut)
        halo = math.prod(max(strip.keys for strip in along) for along in cut)
        columns = -(-width // 16) * 16
        flop_ns = 1 / 130 if columns * halo * dims <= 2 * SMALL_PRODUCT else 1 / 100
        logit_ns = (2 * dims * flop_ns + 1.2) * (1 + 12 / columns)
        too_large = max(width * halo / LARGEST_TILE_LOGITS, 1)
        logits = (keys + tiles * additional) * columns
        return logits * logit_ns * too_large + keys * dims * 0.5 + tiles * width * dims * 1.5

    shapes = (
        cut
        for cut in itertools.product(*(_cuts(axis) for axis in axes))
        if math.prod(along[0].queries for along in cut) <= max(LARGEST_TILE // group_size, 1)
    )
    return min(shapes, key=predict)


def _cuts(axis: Axis) -> list[tuple[Strip, ...]]:
    """Strips of many sizes of tiles: even parts of the axis, also in whole stride groups."""
    length = -(-axis.length // axis.dilation)
    even = {-(-length // tiles) for tiles in (-(-length // (1 << bit)) for bit in range(9))}
    sizes = even | {-(-size // axis.stride) * axis.stride for size in even}
    return [tuple(strips(axis, size)) for size in sorted(sizes) if size <= LARGEST_TILE]


MOST_LOGITS, FEWEST_LOGITS = 1 << 19, 1 << 17
"""Logits of a box: so many that calling NumPy costs little, so few that they stay in the cache."""

BOXES = 16
"""Boxes that a problem is cut into when that keeps them within those sizes."""

KEPT_BYTES = 1 << 23
"""What the boxes of a problem may take to be kept for its next call; 8 problems are."""


def boxes(problem: Problem) -> Iterable[Box]:
    """All of `problem`, always in the same order."""
    axes, additional = problem.axes, problem.additional or 0
    sizes = problem.batch, problem.kv_heads, problem.group_size, additional
    cut = tiling(axes, problem.group_size, problem.head_dim + problem.value_dim, additional)
    keys = math.prod(sum(len(strip) * strip.keys for strip in along) for along in cut)
    queries = math.prod(along[0].queries for along in cut)
    if 4 * keys * queries + 8 * keys * problem.batch * problem.kv_heads > KEPT_BYTES:
        return _boxes(cut, *sizes)
    return _kept_boxes(cut, *sizes)


@lru_cache(maxsize=8)
def _kept_boxes(cut: tuple[tuple[Strip, ...], ...], *sizes: int) -> list[Box]:
    return list(_boxes(cut, *sizes))


def _boxes(
    cut: tuple[tuple[Strip, ...], ...], batch: int, kv_heads: int, group_size: int, additional: int
) -> Iterator[Box]:
    def logits(strips: tuple[Strip, ...]) -> int:
        """Logits of one tile and one key head."""
        keys = math.prod(strip.keys for strip in strips) + additional
        return keys * math.prod(strip.queries for strip in strips) * group_size

    products = list(itertools.product(*cut))
    total = sum(math.prod(map(len, strips)) * logits(strips) for strips in products)
    budget = min(max(total * batch * kv_heads // BOXES, FEWEST_LOGITS), MOST_LOGITS)
    for strips in products:
        # Whole axes are taken from the last to the first as long as they fit.
        room = max(budget // logits(strips), 1)
        pieces = []
        for count in (kv_heads, *(len(strip) for strip in reversed(strips)), batch):
            parts = -(-count // min(room, count))
            size = -(-count // parts)
            pieces.append([range(i, min(i + size, count)) for i in range(0, count, size)])
            room = max(room // size, 1)
        for entries, *tiles, heads in itertools.product(*reversed(pieces)):
            taken = zip(strips, tiles, strict=True)
            part = tuple(strip[along.start : along.stop] for strip, along in taken)
            yield Box(entries, heads, part, group_size, additional)
