"""What there is to draw: a query, the keys that it sees, and the boxes of its block.

Everything is separable over the axes. A block takes a box of queries of one dilation group, in
parts that its warps or warpgroups take, and goes over boxes of keys from where its window union
begins. Its part of the block passes over a box that none of its queries sees, and needs no mask for
one that all of them see whole (`cuneigh._gpu.boxes` counts by the same rules).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh._gpu.announce import Planned
from cuneigh._gpu.boxes import Box
from cuneigh._window import Axis

Tokens = npt.NDArray[np.int64]
Status = Literal["full", "partial", "skipped"]


class Cut(NamedTuple):
    """The sizes of the boxes of a plan, in tokens of a dilation group."""

    part: Box
    """Queries of a part."""
    parts: Box
    """Parts of a block."""
    columns: Box
    """Keys of a box."""


class KeyBox(NamedTuple):
    """A box of keys that the block of the query loads, as its part sees it."""

    tokens: tuple[Tokens, ...]
    """Along each axis; those outside of the layout are left out."""
    status: Status


class Blocks(NamedTuple):
    """How a plan cuts what lies around the query."""

    backend: str
    text: str
    """The plan in words."""
    cut: Cut
    part: tuple[Tokens, ...]
    """Along each axis, the queries of the part that the query belongs to."""
    block: tuple[Tokens, ...]
    keys: list[KeyBox]


@dataclass(frozen=True)
class Scene:
    """A query and what it sees."""

    axes: tuple[Axis, ...]
    query: tuple[int, ...]
    seen: tuple[Tokens, ...]
    """Along each axis, the tokens of its window."""
    blocks: Blocks | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)

    def marks(self, tokens: Sequence[Tokens]) -> npt.NDArray[np.bool_]:
        """The layout, with True where a token lies in the product of `tokens`."""
        marked = np.zeros(self.tokens, bool)
        marked[np.ix_(*tokens)] = True
        return marked

    def region(self, most: Sequence[int], margin: int = 2) -> tuple[slice, ...]:
        """The part of the layout to show: everything that matters, and all if that is small."""
        of_keys = [box.tokens for box in self.blocks.keys] if self.blocks else []
        of_queries = [self.blocks.block] if self.blocks else []
        shown = []
        for axis, length in enumerate(self.tokens):
            if length <= most[axis]:
                shown.append(slice(0, length))
                continue
            places = [each[axis] for each in (self.seen, *of_queries, *of_keys)]
            places = [each for each in places if len(each)]
            first = min(int(each.min()) for each in places)
            last = max(int(each.max()) for each in places)
            shown.append(slice(max(first - margin, 0), min(last + margin + 1, length)))
        return tuple(shown)


def scene_of(
    axes: tuple[Axis, ...], query: Sequence[int] | None, planned: Planned | None = None
) -> Scene:
    """The scene of a query, by default the middle one; ValueError if it is not in the layout."""
    lengths = [axis.length for axis in axes]
    token = tuple(query) if query is not None else tuple(length // 2 for length in lengths)
    if len(token) != len(axes):
        raise ValueError(
            f"show: query={token} has {len(token)} numbers, but the layout has {len(axes)}"
        )
    for r, (x, length) in enumerate(zip(token, lengths, strict=True)):
        if not 0 <= x < length:
            raise ValueError(f"show: query={x} on axis {r} is not a token of {length}")
    seen = tuple(_seen(axis, x) for axis, x in zip(axes, token, strict=True))
    blocks = None if planned is None else _blocks(axes, token, planned)
    return Scene(axes, token, seen, blocks)


def _seen(axis: Axis, x: int) -> Tokens:
    group = x % axis.dilation
    index = np.arange(*axis.window(x // axis.dilation, group))
    if axis.border == "wrap":
        index %= axis.ring
    return index * axis.dilation + group


def cut_of(plan: Any) -> Cut:
    """The boxes of a plan of any backend, by the names that plans have for them."""
    if hasattr(plan, "column_box"):
        warps = hasattr(plan, "warp_box")
        part, parts = (plan.warp_box, plan.warps) if warps else (plan.row_box, plan.warpgroups)
        return Cut(part, parts, plan.column_box)
    if hasattr(plan, "stage"):
        return Cut(plan.warp_box, plan.warps, plan.stage)
    return Cut(plan.box, (1,) * len(plan.box), plan.halo)


class _Along(NamedTuple):
    """`Blocks` along one axis."""

    part: Tokens
    block: Tokens
    keys: list[tuple[Tokens, bool, bool]]
    """Tokens of a box, whether some query of the part sees some of it, and whether all see all."""


def _blocks(axes: tuple[Axis, ...], query: tuple[int, ...], planned: Planned) -> Blocks:
    cut = cut_of(planned.plan)
    along = [
        _along(axis, x, *sizes)
        for axis, x, *sizes in zip(axes, query, cut.part, cut.parts, cut.columns, strict=True)
    ]
    keys = [
        KeyBox(
            tuple(tokens for tokens, _, _ in boxes),
            "skipped"
            if not all(some for _, some, _ in boxes)
            else "full"
            if all(whole for _, _, whole in boxes)
            else "partial",
        )
        for boxes in itertools.product(*(each.keys for each in along))
    ]
    return Blocks(
        planned.backend,
        str(planned.plan),
        cut,
        tuple(each.part for each in along),
        tuple(each.block for each in along),
        keys,
    )


def _along(axis: Axis, x: int, part: int, parts: int, columns: int) -> _Along:
    group, index = x % axis.dilation, x // axis.dilation
    length, key_length = axis.group_length(group), axis.key_group_length(group)

    def rows(size: int) -> Tokens:
        first = index // size * size
        return np.arange(first, min(first + size, length))

    def union(queries: Tokens) -> tuple[int, int]:
        """What some of the queries see."""
        return axis.window(int(queries[0]), group)[0], axis.window(int(queries[-1]), group)[1]

    of_part, of_block = rows(part), rows(part * parts)
    begin, end = union(of_block)
    some_begin, some_end = union(of_part)
    all_begin = axis.window(int(of_part[-1]), group)[0]
    all_end = axis.window(int(of_part[0]), group)[1]
    keys = []
    for low in range(begin, end, columns):
        high = low + columns
        inside = np.arange(low, min(high, key_length)) * axis.dilation + group
        some = low < some_end and high > some_begin
        keys.append((inside, some, all_begin <= low and high <= all_end))
    return _Along(
        of_part * axis.dilation + group,
        of_block * axis.dilation + group,
        keys,
    )
