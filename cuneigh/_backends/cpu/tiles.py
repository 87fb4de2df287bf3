"""How a problem is cut up: boxes of tiles, each a tile of queries and the halo of keys it sees.

Everything is separable over the token axes. A `Tile` is what the products of some strips, one for
each axis, look like (`strips`), and a `Box` is a block of such products for some batches and key
heads. All tiles of a box being alike, one batch of matrix products computes them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh import _settings
from cuneigh._backends.cpu.strips import Booleans, Strip, strips
from cuneigh._backends.cpu.tokens import Integers, Tokens
from cuneigh._problem import DTYPES, Problem
from cuneigh._window import Axis


def combined(combine: Callable[[Any, Any], Any], matrices: Iterable[npt.NDArray[Any]]) -> Any:
    """``[a_1 * .. * a_R, b_1 * .. * b_R]`` from a matrix ``[a_r, b_r]`` for each axis."""

    def pair(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[Any]:
        both = combine(x[:, None, :, None], y[:, None, :])
        shape = len(x) * len(y), x.shape[1] * y.shape[1]
        return both.reshape(shape)  # type: ignore[no-any-return]

    return reduce(pair, matrices)


Bound = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Tile:
    """What the tiles that are products of `strips` have in common."""

    strips: tuple[Strip, ...]
    group_size: int
    additional: int

    @cached_property
    def queries(self) -> int:
        return math.prod(strip.queries for strip in self.strips)

    @cached_property
    def width(self) -> int:
        """Queries times the query heads of a key head."""
        return self.queries * self.group_size

    @cached_property
    def halo(self) -> int:
        """Keys that are tokens."""
        return math.prod(strip.keys for strip in self.strips)

    @cached_property
    def keys(self) -> int:
        """Keys of the halo and additional keys."""
        return self.halo + self.additional

    @property
    def logits(self) -> int:
        """Logits of one tile and one key head."""
        return self.keys * self.width

    @property
    def count(self) -> int:
        """Tiles of one batch."""
        return math.prod(strip.tiles for strip in self.strips)

    def visible(self) -> Booleans:
        """``[keys of the halo, queries]``: who sees whom."""
        visible: Booleans = combined(np.logical_and, (strip.visible() for strip in self.strips))
        return visible

    @cached_property
    def bounds(self) -> list[tuple[slice, Bound]]:
        """Pieces of ``[keys of the halo, queries]``: inf for who sees whom, -inf for who does not.

        The longest run of keys that all queries see is left out.
        """
        visible = self.visible()
        edges = np.flatnonzero(np.diff(np.pad(visible.all(1), 1)))
        starts, ends = (edges[::2], edges[1::2]) if edges.size else (np.zeros(1, int),) * 2
        longest = (ends - starts).argmax()
        pieces = slice(0, int(starts[longest])), slice(int(ends[longest]), len(visible))
        bound = np.where(visible, np.float32(np.inf), np.float32(-np.inf))
        return [(keys, bound[keys].copy()) for keys in pieces if keys.start < keys.stop]

    @cached_property
    def bias_index(self) -> Integers:
        """``[keys of the halo, queries]``: index of each pair's bias in a head's flattened rpb."""
        sizes = [2 * strip.axis.kernel_size - 1 for strip in self.strips]
        strides = [math.prod(sizes[r + 1 :]) for r in range(len(sizes))]
        pairs = zip(self.strips, strides, strict=True)
        index: Integers = combined(np.add, (strip.bias_index() * stride for strip, stride in pairs))
        return index


@dataclass(frozen=True, eq=False)
class Box:
    """Tiles that one batch of matrix products computes."""

    tile: Tile
    batch: range
    kv_heads: range
    first_query: tuple[Integers, ...]
    """``[tiles_r]`` for each axis: tokens."""
    first_key: tuple[Integers, ...]

    @cached_property
    def lead(self) -> tuple[int, ...]:
        """The leading axes of all that is computed: batch, tiles_1, .., tiles_R, kv_heads."""
        return len(self.batch), *map(len, self.first_query), len(self.kv_heads)

    @cached_property
    def heads(self) -> range:
        """The query heads that read `kv_heads`."""
        size = self.tile.group_size
        return range(self.kv_heads.start * size, self.kv_heads.stop * size)

    @cached_property
    def query_tokens(self) -> Tokens:
        offsets = (np.arange(strip.queries) * strip.axis.dilation for strip in self.tile.strips)
        return Tokens(self.batch, self.heads, self.first_query, tuple(offsets))

    @cached_property
    def key_tokens(self) -> Tokens:
        offsets = tuple(strip.offsets for strip in self.tile.strips)
        return Tokens(self.batch, self.kv_heads, self.first_key, offsets)

    @cached_property
    def keys_are_disjoint(self) -> bool:
        """Whether no key is in two halos, and these follow each other evenly."""
        tokens = self.key_tokens
        return None not in (*tokens.across, *tokens.along) and all(
            len(np.unique(np.add.outer(first, offsets))) == len(first) * len(offsets)
            for first, offsets in zip(tokens.first, tokens.offsets, strict=True)
        )

    @cached_property
    def key_region(self) -> tuple[Tokens, int] | None:
        """The keys of all tiles along the first axis as one tile, and the rows from tile to tile.

        None unless halos that follow each other overlap, all by the same number of keys.
        """
        across, strip = self.key_tokens.across[0], self.tile.strips[0]
        if not across or across % strip.axis.dilation or len(strip.runs) > 1:
            return None
        keys = across // strip.axis.dilation
        if not 0 < keys < strip.keys:
            return None
        size = keys * (len(self.first_key[0]) - 1) + strip.keys
        first = self.first_key[0][:1], *self.first_key[1:]
        offsets = np.arange(size) * strip.axis.dilation, *self.key_tokens.offsets[1:]
        return Tokens(
            self.batch, self.kv_heads, first, offsets
        ), keys * self.tile.halo // strip.keys

    @cached_property
    def additional_tokens(self) -> Tokens:
        """The additional keys, as one tile."""
        keys = np.arange(self.tile.additional)
        return Tokens(self.batch, self.kv_heads, (np.zeros(1, int),), (keys,))


# The shape of the tiles

LARGEST_TILE = 256
"""Queries of a tile, times query heads of a key head, that are worth trying."""

LARGEST_TILE_ELEMENTS = 1 << 22
"""Logits of a tile and one key head, or elements of its vectors, beyond which it counts as slow, to
save memory."""

SMALL_PRODUCT = 1_000_000
"""Multiplications up to which OpenBLAS multiplies without packing its operands first."""

Cut = tuple[tuple[Strip, ...], ...]
"""The strips of every axis."""


@lru_cache(maxsize=256)
def cut(axes: tuple[Axis, ...], placed: bool, *sizes: int) -> Cut:
    """The strips of every axis, in the tile shape that is chosen for such axes `anywhere`."""
    shape, _ = shape_of_tiles(tuple(axis.anywhere() for axis in axes), placed, *sizes)
    return tuple(strips(axis, queries, placed) for axis, queries in zip(axes, shape, strict=True))


@lru_cache(maxsize=256)
def shape_of_tiles(
    axes: tuple[Axis, ...],
    placed: bool,
    dims: int,
    kv_heads: int,
    group_size: int,
    additional: int,
) -> tuple[tuple[int, ...], float]:
    """The queries of a tile along each axis, in the shape that is predicted to be the fastest.

    Also returns the prediction.

    Large tiles keep the BLAS busy, small ones have less of their halo hidden from each query. The
    prediction, in ns for one of `kv_heads`, is linear in the numbers of logits, of halo
    elements, of queries and of boxes; its coefficients were measured on a core with AVX-512.
    """

    def predict(strips: Cut) -> float:
        queries = math.prod(max(strip.queries for strip in along) for along in strips)
        halo = math.prod(max(strip.keys for strip in along) for along in strips)
        tiles = math.prod(sum(strip.tiles for strip in along) for along in strips)
        along_keys = [sum(strip.tiles * strip.keys for strip in along) for along in strips]
        keys = math.prod(along_keys)
        # What overlaps along the first axis is copied once.
        copied = sum(strip.tiles * strip.queries + strip.keys for strip in strips[0])
        copied = min(copied, along_keys[0]) * math.prod(along_keys[1:])
        boxes = math.prod(map(len, strips))
        width = queries * group_size
        columns = -(-width // 16) * 16
        flop_ns = 1 / 130 if columns * halo * dims <= 2 * SMALL_PRODUCT else 1 / 100
        logit_ns = (2 * dims * flop_ns + 1.2) * (1 + 8 / columns)
        too_large = math.prod(
            max(elements / LARGEST_TILE_ELEMENTS, 1)
            for elements in (width * halo, (3 * width + halo) * dims)
        )
        logits = (keys + tiles * additional) * columns * logit_ns * too_large
        return logits + copied * dims * 0.5 + tiles * width * dims * 1.5 + boxes * 1e5 / kv_heads

    def sizes(axis: Axis) -> set[int]:
        """Even cuts of the axis, also of whole stride groups."""
        length = -(-axis.length // axis.dilation)
        even = {-(-length // -(-length // (1 << bit))) for bit in range(9)}
        whole = {-(-size // axis.stride) * axis.stride for size in even}
        return {size for size in even | whole if size <= LARGEST_TILE}

    choices = [
        [(size, strips(axis, size, placed)) for size in sorted(sizes(axis))] for axis in axes
    ]
    shapes = (
        shape
        for shape in itertools.product(*choices)
        if math.prod(along[0].queries for _, along in shape) <= max(LARGEST_TILE // group_size, 1)
    )
    predicted = ((predict(tuple(along for _, along in shape)), shape) for shape in shapes)
    least, best = min(predicted, key=lambda each: each[0])
    return tuple(size for size, _ in best), least


def predicted_ns(problem: Problem) -> float:
    """What a forward or backward is predicted to take on one thread."""
    axes = tuple(axis.anywhere() for axis in problem.axes)
    dims, placed = problem.head_dim + problem.value_dim, problem.rpb_dtype is not None
    sizes = dims, problem.kv_heads, problem.group_size, problem.additional or 0
    _, of_head = shape_of_tiles(axes, placed, *sizes)
    return problem.batch * problem.kv_heads * of_head * (1 if problem.operation == "forward" else 3)


# Boxes

MOST_LOGITS, FEWEST_LOGITS = 1 << 19, 1 << 17
"""Logits of a box: so few that they stay in the cache, and enough that
threads seldom wait for each other, which they do to run Python."""

MOST_IN_ROW = 512
"""Elements of a token that a box reads, of several heads: enough for fast copies."""

BOXES = 4
"""Boxes that a problem is cut into when that keeps them within those sizes."""

WORKSPACE_BYTES = 256 << 20
"""What a call may take besides its results unless CUNEIGH_WORKSPACE_BYTES says otherwise."""

PARALLEL_BOXES = 16
"""Boxes that fit in the workspace together."""

COPIES = 64
"""A call's arguments are copied, if they must be, where that takes this part of the workspace."""

KEPT_BYTES = 1 << 22
"""What the boxes of a problem may take to be kept for its next call; 8 problems are."""


def workspace_limit() -> int:
    """In bytes. A single tile is computed all the same if it takes more."""
    given = _settings.WORKSPACE_BYTES.read()
    return WORKSPACE_BYTES if given is None else given


class Bounds(NamedTuple):
    """How large a box may be, and the bytes that its parts take."""

    most_logits: int
    most_bytes: int
    most_heads: int
    per_logit: int
    per_new_key: int
    """Of keys that the tile before does not see: what halos share is copied once."""
    per_key: int
    per_query: int

    def bytes(self, tile: Tile) -> int:
        """What the arrays of a tile and a key head take, roughly and at most."""
        first, new_keys = tile.strips[0], tile.keys
        if first.tiles > 1:
            new_keys = tile.keys * min(first.queries, first.keys) // max(first.keys, 1)
        of_keys = self.per_new_key * new_keys + self.per_key * tile.keys
        return self.per_logit * tile.logits + of_keys + self.per_query * tile.width

    def tiles(self, tile: Tile, logits: int) -> int:
        """Tiles of a box that aims at so many logits; one at least, however large it is."""
        return max(min(logits // max(tile.logits, 1), self.most_bytes // self.bytes(tile)), 1)


def bounds_of(problem: Problem) -> Bounds:
    itemsize = DTYPES[problem.accumulator]
    dims = problem.head_dim + problem.value_dim
    is_forward = problem.operation in ("forward", "qk", "av")
    is_hvp = problem.operation == "hvp"
    is_backward = is_hvp or problem.operation.endswith("backward")
    slots = 0 if problem.operation in ("forward", "backward", "jvp", "hvp") else problem.slots
    return Bounds(
        MOST_LOGITS,
        workspace_limit() // PARALLEL_BOXES,
        max(MOST_IN_ROW // max(problem.head_dim, problem.value_dim), 1),
        itemsize * (1 if is_forward else 5 if is_hvp else 3),
        itemsize * dims * (2 if problem.operation in ("jvp", "hvp") else 1),
        itemsize * dims * is_backward * (2 if is_hvp else 1),
        itemsize * dims * (2 if is_forward else 8 if is_hvp else 4) + (16 + 2 * itemsize) * slots,
    )


def boxes(problem: Problem) -> tuple[Iterable[Box], int]:
    """All of `problem`, always in the same order, and how many threads have room for theirs.

    Sums depend on how tokens are cut up. That does not depend on the number of threads, nor on that
    of batches, so that the results of an entry of a batch are those that it has alone.
    """
    sizes = problem.batch, problem.kv_heads, problem.group_size, problem.additional or 0
    dims, repeats = problem.head_dim + problem.value_dim, problem.batch * problem.kv_heads
    has_slots = problem.operation not in ("forward", "backward") and not problem.is_ordinary
    placed = has_slots or problem.rpb_dtype is not None
    strips = cut(problem.axes, placed, dims, *sizes[1:])
    keys = math.prod(sum(strip.tiles * strip.keys for strip in along) for along in strips)
    bounds = bounds_of(problem)
    threads = max(workspace_limit() * 7 // 8 // _largest(strips, bounds, *sizes), 1)
    if 8 * keys * repeats > KEPT_BYTES:  # for the indices of rows
        return _boxes(strips, bounds, *sizes), threads
    return _kept_boxes(strips, bounds, *sizes), threads


# Strips are the same if they are one object: `cut` returns the same ones for the same problem.
@lru_cache(maxsize=8)
def _kept_boxes(strips: Cut, bounds: Bounds, *sizes: int) -> list[Box]:
    return list(_boxes(strips, bounds, *sizes))


@lru_cache(maxsize=256)
def _largest(
    strips: Cut, bounds: Bounds, batch: int, kv_heads: int, group_size: int, additional: int
) -> int:
    """Bytes of the largest box."""
    kinds = [Tile(each, group_size, additional) for each in itertools.product(*strips)]
    return max(
        bounds.bytes(tile)
        * min(bounds.tiles(tile, bounds.most_logits), tile.count * batch * kv_heads)
        for tile in kinds
    )


def _boxes(
    strips: Cut, bounds: Bounds, batch: int, kv_heads: int, group_size: int, additional: int
) -> Iterator[Box]:
    kinds = [Tile(each, group_size, additional) for each in itertools.product(*strips)]
    kinds.sort(key=lambda tile: -tile.count * tile.logits)  # so that threads end at the same time
    total = sum(tile.count * tile.logits for tile in kinds) * kv_heads

    def most_tiles(tile: Tile, batches: int) -> int:
        budget = max(total * batches * 9 // (8 * BOXES), FEWEST_LOGITS)
        return bounds.tiles(tile, min(budget, bounds.most_logits))

    for tile in kinds:
        (heads,) = blocks([kv_heads], min(most_tiles(tile, 1), bounds.most_heads))
        first, *others = (strip.tiles for strip in tile.strips)
        # Many tiles along the first axis, for what their halos share is read and written once.
        *rest, of_first = blocks([*others, first], most_tiles(tile, 1) // len(heads[0]))
        along = of_first, *rest
        of_entry = math.prod(len(cuts[0]) for cuts in (heads, *along))
        (batches,) = blocks([batch], most_tiles(tile, batch) // of_entry)
        for block in itertools.product(*along):
            of = list(zip(tile.strips, block, strict=True))
            first_query = tuple(strip.first_query[tiles.start : tiles.stop] for strip, tiles in of)
            first_key = tuple(strip.first_key[tiles.start : tiles.stop] for strip, tiles in of)
            for some_batches, some_heads in itertools.product(batches, heads):
                yield Box(tile, some_batches, some_heads, first_query, first_key)


def blocks(counts: Sequence[int], most: int) -> list[list[range]]:
    """Cuts of ``range(count)`` for each count, into blocks of at most `most` if that can be.

    Whole axes are taken from the last to the first as long as they fit.
    """
    cuts = []
    room = max(most, 1)
    for count in reversed(counts):
        cut_into = -(-count // min(room, count))
        size = -(-count // cut_into)
        cuts.append([range(i, min(i + size, count)) for i in range(0, count, size)])
        room = max(room // size, 1)
    return cuts[::-1]
