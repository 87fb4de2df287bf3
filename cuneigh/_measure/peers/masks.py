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
    """Whether token `query` of an axis sees token `key`; integer tensors.

    In comparisons: with BACKEND="FLASH", PyTorch 2.11 compiles no minimum and no maximum. What is
    compared with the smaller of two numbers is compared with both.
    """
    d, s, k = axis.dilation, axis.stride, axis.kernel_size
    group, index, other = query % d, query // d, key // d
    length = (axis.length - group + d - 1) // d
    leader = index // s * s + (s - 1 if axis.is_causal else s // 2)  # or the last, if it is before

    def before_leader(token: Any) -> Any:
        return (token < leader) & (token < length - 1)

    def from_leader(token: Any) -> Any:
        return (token >= leader) | (token >= length - 1)

    in_group = key % d == group
    if axis.is_causal:
        return in_group & (other <= index) & from_leader(other + k - 1)
    # A window ends where another one begins that is k tokens further, but for the borders
    begins = from_leader(other + k // 2) | (other >= length - k)
    ends = before_leader(other + k // 2 - k) | (other < k)
    return in_group & begins & ends


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
