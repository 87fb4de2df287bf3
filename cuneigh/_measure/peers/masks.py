"""The window rules for PyTorch's masks: whether a query sees a key, from their token numbers.

Written in operations that FlexAttention can compile. `cuneigh._window` states the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cuneigh._problem import Problem
from cuneigh._window import Axis

Box = tuple[int, ...]


def sees(axis: Axis, query: Any, key: Any) -> Any:
    """Whether token `query` of an axis sees token `key`; integer tensors."""
    import torch

    d, s, k = axis.dilation, axis.stride, axis.kernel_size
    group, index = query % d, query // d
    length = (axis.length - group + d - 1) // d
    offset = s - 1 if axis.is_causal else s // 2
    leader = torch.minimum(index // s * s + offset, length - 1)
    if axis.is_causal:
        start, end = leader - k + 1, index + 1
    else:
        start = torch.minimum(torch.clamp(leader - k // 2, min=0), length - k)
        end = start + k
    other = key // d
    return (key % d == group) & (other >= start) & (other < end)


def mask_mod(problem: Problem, tile: Box | None = None) -> Callable[..., Any]:
    """FlexAttention's `mask_mod` for tokens in C order, or in the order of tiles."""
    axes, layout = problem.axes, problem.tokens
    place = coordinates if tile is None else coordinates_in_tiles

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        queries, keys = place(query, layout, tile), place(key, layout, tile)
        result = sees(axes[0], queries[0], keys[0])
        for axis, x, y in zip(axes[1:], queries[1:], keys[1:], strict=True):
            result = result & sees(axis, x, y)
        return result

    return visible


def coordinates(number: Any, layout: Box, tile: Box | None = None) -> list[Any]:
    """Of a token that is counted in C order."""
    found = []
    for length in reversed(layout):
        found.append(number % length)
        number = number // length
    return found[::-1]


def coordinates_in_tiles(number: Any, layout: Box, tile: Box | None) -> list[Any]:
    """Of a token that is counted tile by tile, both in C order."""
    assert tile is not None, "tokens in tiles have a tile"
    area = math.prod(tile)
    tiles = tuple(length // size for length, size in zip(layout, tile, strict=True))
    outer, inner = coordinates(number // area, tiles), coordinates(number % area, tile)
    return [a * size + b for a, size, b in zip(outer, tile, inner, strict=True)]


def dense_mask(problem: Problem, device: Any) -> Any:
    """[queries, keys] bool, tokens in C order."""
    import torch

    token = torch.arange(math.prod(problem.tokens), device=device)
    return mask_mod(problem)(None, None, token[:, None], token[None, :])


def tile_of(layout: Sequence[int], area: int = 128) -> Box | None:
    """The box of `area` tokens, of powers of two, nearest to a cube that divides the layout."""
    from cuneigh._gpu.boxes import powers_of_two

    fitting = [
        box
        for box in powers_of_two(len(layout), area)
        if all(length % size == 0 for length, size in zip(layout, box, strict=True))
    ]
    return min(fitting, key=lambda box: (max(box), box), default=None)
