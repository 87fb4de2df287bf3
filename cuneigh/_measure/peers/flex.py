"""FlexAttention with the exact window, compiled: its Triton kernels, and FlashAttention-4's.

With BACKEND="FLASH" it calls FlashAttention-4's block-sparse kernels. `in_tiles` sorts the tokens
so that a block of 128 is a box of the layout, without which nearly every block is visited in two
dimensions: the time without the permutations of all arrays, and the time with them.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, Literal

from cuneigh._measure.peers.contract import (
    Calls,
    Given,
    Peer,
    UnfitError,
    differentiated,
    heads_first,
    heads_last,
    refuse_extras,
)
from cuneigh._measure.peers.masks import Box, mask_mod, tile_of

Kernels = Literal["TRITON", "FLASH"]


def raster(kernels: Kernels) -> Peer:
    """FlexAttention on tokens in C order."""

    def prepare(given: Given) -> Calls:
        attention = _attention(given, kernels, None)

        def forward(query: Any, key: Any, value: Any) -> Any:
            output = attention(heads_first(query), heads_first(key), heads_first(value))
            return heads_last(output, given.problem.tokens)

        return _calls(given, forward)

    return prepare


def in_tiles(kernels: Kernels, whole: bool) -> Peer:
    """FlexAttention on tokens in the order of tiles; with `whole` they are brought into it."""

    def prepare(given: Given) -> Calls:
        problem = given.problem
        tile = tile_of(problem.tokens)
        if problem.rank == 1:
            raise UnfitError("tokens of one axis are in the order of tiles as they are")
        if tile is None:
            raise UnfitError("no box of 128 tokens divides the layout")
        attention = _attention(given, kernels, tile)
        note = f"tiles of {'x'.join(map(str, tile))}"
        if whole:

            def forward(query: Any, key: Any, value: Any) -> Any:
                sorted_ = (heads_first(_sort(each, tile)) for each in (query, key, value))
                output = attention(*sorted_).transpose(1, 2)
                return _unsort(output, problem.tokens, tile)

            return _calls(given, forward, note)
        arrays = given.query, given.key, given.value, given.grad_output
        query, key, value, gradient = (_sort(each, tile).contiguous() for each in arrays)
        kernel_only = Given(problem, query, key, value, gradient)

        def on_sorted(query: Any, key: Any, value: Any) -> Any:
            heads = (heads_first(each) for each in (query, key, value))
            return attention(*heads).transpose(1, 2)[:, :, None]

        made = _calls(kernel_only, on_sorted, f"{note}, already sorted")

        def raster_again(tensor: Any) -> Any:
            return _unsort(tensor[:, :, 0], problem.tokens, tile)

        return Calls(made.forward, made.step, made.note, restore=raster_again)

    return prepare


def _sort(tensor: Any, tile: Box) -> Any:
    """[batch, tokens.., heads, dim] as [batch, tokens, 1, heads, dim], tile by tile."""
    rank = len(tile)
    for axis, size in enumerate(tile):
        tensor = tensor.unflatten(1 + 2 * axis, (-1, size))
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1, 2 * rank + 2]
    return tensor.permute(order).flatten(1, 2 * rank)[:, :, None]


def _unsort(tensor: Any, layout: Box, tile: Box) -> Any:
    """The opposite, of [batch, tokens, heads, dim]."""
    rank = len(tile)
    tiles = [length // size for length, size in zip(layout, tile, strict=True)]
    tensor = tensor.unflatten(1, (*tiles, *tile))
    pairs = [each for axis in range(rank) for each in (1 + axis, 1 + rank + axis)]
    tensor = tensor.permute([0, *pairs, 2 * rank + 1, 2 * rank + 2])
    return tensor.flatten(1, 2 * rank).unflatten(1, layout)


def _calls(given: Given, forward: Any, note: str = "") -> Calls:
    import torch

    def without_gradient() -> Any:
        with torch.no_grad():
            return forward(given.query, given.key, given.value)

    return Calls(without_gradient, differentiated(given, forward) if given.on_gpu else None, note)


BLOCK = 128
"""Queries, and keys, of the blocks that FlexAttention passes over where a mask hides them whole."""


def has_flash() -> bool:
    """Whether FlashAttention-4 is there, which FlashAttention-2 has a folder in common with."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


def flash_blocks(capability: tuple[int, int], given: Given) -> tuple[int, int]:
    """The blocks that FlashAttention-4's forward and backward take, of queries and keys.

    On Hopper those of keys are the tiles of its kernels, which are shorter for long vectors; on
    Blackwell the forward takes two tiles of queries at a time (`flash_attn/cute/interface.py`).
    """
    problem = given.problem
    longest = max(problem.head_dim, problem.value_dim)
    if capability[0] == 9:
        return BLOCK, BLOCK if longest <= 128 else 96 if longest <= 192 else 64
    return (2 * BLOCK if capability[0] in (10, 11) else BLOCK), BLOCK


def _attention(given: Given, kernels: Kernels, tile: Box | None) -> Any:
    """The compiled function of query, key and value, heads-first."""
    refuse_extras(given)
    if kernels == "FLASH" and not given.on_gpu:
        raise UnfitError("FlashAttention-4 needs a GPU")
    if kernels == "FLASH" and not has_flash():
        raise UnfitError("flash-attn-4 is not installed")
    try:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        raise UnfitError("the installed PyTorch has no FlexAttention") from None
    problem = given.problem
    torch._dynamo.reset()  # each problem is compiled for its own sizes
    tokens = math.prod(problem.tokens)
    make = torch.compile(create_block_mask) if given.on_gpu else create_block_mask
    blocks = (BLOCK, BLOCK)
    if kernels == "FLASH":
        blocks = flash_blocks(torch.cuda.get_device_capability(given.query.device), given)
    about = mask_mod(problem, tile), None, None, tokens, tokens
    mask = make(*about, device=str(given.query.device), BLOCK_SIZE=blocks)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    options: dict[str, Any] = {"block_mask": mask, "scale": problem.scale}
    if problem.group_size > 1:
        options["enable_gqa"] = True
    if kernels == "FLASH":
        options["kernel_options"] = {"BACKEND": "FLASH"}
    return lambda query, key, value: compiled(query, key, value, **options)
