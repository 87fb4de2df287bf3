"""What is compiled into the kernels for small windows beside dtype and rank, and their tables."""

from __future__ import annotations

import math
from typing import NamedTuple

from cuneigh._backends.fused.small import tma
from cuneigh._gpu.passes import DQ, FORWARD, HVP_DKV, HVP_DQ, JVP, Pass
from cuneigh._problem import Problem

ROWS = 16
"""Rows of a warp: those of one tensor core instruction."""
TILE_EXTENTS = 48
"""Length of the table that has one element more along each axis than a tile has columns."""
DIMS = (32, 64, 128)
"""Head dimensions that the kernels are made for."""
MOST_KEPT = 80
"""`kMostKept` of cuda/fused/small/hvp.cu."""


class Form(NamedTuple):
    """What is compiled into a kernel beside dtype, dimensions and the slots of a tile."""

    warps: int
    buffers: int
    """Stages in shared memory; of two, one arrives while the other is worked on.

    Of the two of a jvp or an hvp, one is for the tangents.
    """
    blocks: int
    """Blocks of a multiprocessor that registers are left for."""


def forms(
    problem: Problem, capability: tuple[int, int], pass_: Pass, one_stage: bool
) -> dict[Form, tuple[int, ...]]:
    """The forms that were fast, and the slots that a tile can have in each.

    The compiler reports what registers allow, of which its code needs more from sm_100 on, and with
    a key mask. Where there is more than `one_stage`, running sums need registers.
    """
    longest = max(problem.head_dim, problem.value_dim)
    newer = capability[0] > 9
    largest_fits = not (newer and problem.has_key_mask)
    if pass_ == HVP_DQ:
        return _forms_of_hvp_dq(longest) if one_stage else {}
    if pass_ == HVP_DKV:
        blocks = 3 if longest <= 32 else 2
        return dict.fromkeys((Form(4, 2, blocks), Form(8, 2, 1)), (64, 80, 112, 128))
    if pass_ == JVP:
        has_room = capability[0] == 9 and not problem.has_key_mask
        return _forms_of_jvp(longest, has_room, largest_fits) if one_stage else {}
    if pass_ != FORWARD:
        beside = {32: (4,), 64: (3,) if pass_ == DQ else (2, 3), 128: (2,)}[longest]
        return {Form(4, 1, blocks): (64, 80, 112, 128) for blocks in beside}
    if longest <= 32:
        if not one_stage:
            return {Form(4, 2, 3): (64,)}
        if not largest_fits:
            return {Form(4, 2, 4): (48, 64, 80), Form(4, 1, 3): (112, 144)}
        return {Form(4, 2, 4): (48, 64, 80, 112), Form(4, 1, 3): (144,)}
    if longest <= 64:
        if not one_stage:
            larger: dict[Form, tuple[int, ...]] = {Form(4, 1, 3): (64, 80)}
            return larger if newer else {Form(4, 1, 4): (64,), **larger}
        fits = problem.head_dim == problem.value_dim and not newer
        fits &= capability[0] == 9 or not problem.has_key_mask
        of_eight = (48, 64, 80, 112) if fits else (48, 64, 80) if largest_fits else (48, 64)
        of_four = (48, 64, 80, 112, 144) if largest_fits else (48, 64, 80, 112)
        return {Form(8, 1, 2): of_eight, Form(4, 1, 3): of_four}
    if one_stage:
        return {Form(4, 1, 3): (48, 64, 80, 112) if largest_fits else (48, 64, 80)}
    return {Form(4, 1, 2): (64, 80)} if newer else {Form(4, 1, 3): (64,), Form(4, 1, 2): (80,)}


def _forms_of_jvp(longest: int, has_room: bool, largest_fits: bool) -> dict[Form, tuple[int, ...]]:
    """Those of a jvp, whose logits take twice the registers."""
    if longest <= 32:
        if has_room:
            return {Form(4, 2, 3): (48, 64, 80, 112), Form(4, 2, 2): (144,)}
        return {Form(4, 2, 3): (48, 64, 80), Form(4, 2, 2): (112, 144)}
    slots = (48, 64, 80, 112) if longest <= 64 or largest_fits else (48, 64, 80)
    return {Form(4, 2, 2): slots, Form(8, 2, 1): slots} if longest <= 64 else {Form(4, 2, 2): slots}


def _forms_of_hvp_dq(longest: int) -> dict[Form, tuple[int, ...]]:
    """Those of an hvp's queries, of which registers keep `MOST_KEPT` columns at most."""
    kept = (64, MOST_KEPT)
    if longest > 32:
        return dict.fromkeys((Form(4, 2, 2), Form(8, 2, 1)), (*kept, 112))
    return {Form(4, 2, 2): kept, Form(4, 2, 3): (112, 144), Form(8, 2, 1): (*kept, 112, 144)}


def has_tma(
    problem: Problem, capability: tuple[int, int], pass_: Pass, form: Form, columns: int
) -> bool:
    """Whether there is a kernel of a form that has TMA bring stages."""
    spills = problem.rank == 3 and form.warps == 8 and columns > 80
    return tma.takes(problem, capability, pass_) and not spills


def tile_extents(rank: int) -> int:
    """Length of `prefix_mask` of `SmallTables`. The first axis needs none of it."""
    return 1 if rank == 1 else TILE_EXTENTS


def bit_bytes(columns: int) -> int:
    """Bytes of `LaneBits`, a bit for each fourth of a tile's columns."""
    return 4 if columns <= 128 else 8


def table_bytes(problem: Problem, columns: int, warps: int) -> int:
    """Bytes of `SmallTables` of cuda/fused/small/smem.cuh."""
    rank, rows = problem.rank, ROWS * warps
    size = bit_bytes(columns) * 4 * tile_extents(rank) + 4 * columns  # prefix_mask, tile_offset
    size += 8 * rank * (1 + warps + rows) + rows  # block_union, warp_union, window, exists
    size += 8 + 8 * rank + 12  # rows, the sizes and the number of stages
    return math.ceil(size / 8) * 8 + 3 * 24  # qk, vo, statistics


def column_bytes(problem: Problem) -> int:
    """Bytes of `kColumnBytes` of cuda/fused/small/smem.cuh."""
    return math.ceil((problem.head_dim + problem.value_dim) / 64) * 128
