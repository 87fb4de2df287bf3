"""The launches of the Hopper kernel."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh import _jit
from cuneigh._backends.hopper.plan import (
    ROWS,
    Division,
    Form,
    HopperPlan,
    division,
    form_of,
    is_dilated,
    make_plan,
    padded_head_dim,
    padded_value_dim,
    pieces,
    shared_bytes,
)
from cuneigh._backends.hopper.tensor_maps import Folding, map_of_additional, map_of_tokens
from cuneigh._device import Device
from cuneigh._gpu.announce import announce
from cuneigh._gpu.boxes import Box, count_walk
from cuneigh._gpu.program import Program
from cuneigh._gpu.records import AXIS, axis_record
from cuneigh._gpu.views import Views
from cuneigh._problem import Operands, Problem

NAME = "hopper"


def forward(problem: Problem, operands: Operands, output: Any, lse: Any, program: Program) -> None:
    plan = make_plan(problem, program.device)
    form = plan.form
    announce(NAME, "forward", problem, plan)
    query, of_query = map_of_tokens(problem, operands.query, _piece(problem, plan.query_box))
    key_piece = _piece(problem, plan.key_box)
    key, of_key = map_of_tokens(problem, operands.key, key_piece)
    value, of_value = map_of_tokens(problem, operands.value, key_piece)
    additional_keys = additional_values = value  # which the kernel does not touch
    if problem.additional:
        additional_keys = map_of_additional(operands.additional_keys, form.keys)
        additional_values = map_of_additional(operands.additional_values, form.keys)

    views = Views(problem.rank)  # `ForwardArguments` of cuda/hopper/forward.cu
    views.vectors(output)
    views.scalars(lse)
    work = division(problem, plan, program.device)
    # Where no block gets a second tile there is nothing to count.
    one_round = work.blocks <= program.device.sm_count
    views.addresses(None if one_round else program.zeros((1,), "float32"))
    program.launch(
        kernel(problem, form),
        (min(work.blocks, program.device.sm_count), 1),
        128 * (form.warpgroups + 1),
        _record(problem, plan, work, (of_query, of_key, of_value)),
        views.words,
        query,
        key,
        value,
        additional_keys,
        additional_values,
        shared_bytes=shared_bytes(problem, form),
    )


def kernels(problem: Problem, device: Device) -> list[_jit.Kernel]:
    """The kernels of a supported problem."""
    return [kernel(problem, form_of(problem, device))]


@lru_cache(maxsize=1024)
def kernel(problem: Problem, form: Form) -> _jit.Kernel:
    """The kernel with the plan that cuda/hopper/forward.cu describes."""
    constants = {
        "kRank": problem.rank,
        "kWarpgroups": form.warpgroups,
        "kKeys": form.keys,
        "kStages": form.stages,
        "kQuerySlots": form.query_slots,
        "kHeadDim": padded_head_dim(problem),
        "kValueDim": padded_value_dim(problem),
        "kSharedBytes": shared_bytes(problem, form),
    }
    flags = {
        "kDilated": is_dilated(problem),
        "kAdditional": bool(problem.additional),
        "kSigned": problem.scale <= 0,
    }
    source = _jit.plan_source(constants, flags, {"Element": problem.dtype})
    return _jit.Kernel("hopper/forward", source, arch_specific=True)


def _piece(problem: Problem, box: Box) -> Box:
    """What one load brings of a box."""
    return (box[0] // pieces(problem, box), *box[1:])


MOST_WARPGROUPS = 3
DIVISOR = np.dtype([("divisor", "u4"), ("multiplier", "u4"), ("shift", "u4")])
PIECES = np.dtype([("count", "i4"), ("rows", "i4"), ("tokens", "i4")])
FOLDING = np.dtype([(name, "i4") for name in Folding._fields])


def divisor(value: int) -> tuple[int, int, int]:
    """`Divisor` of cuda/hopper/tile.cuh: n // value == n * multiplier >> 32 >> shift.

    For n below 2^31, by Granlund and Montgomery (1994); a multiplier of 0 stands for value 1.
    """
    if value == 1:
        return 1, 0, 0
    bits = (value - 1).bit_length()
    return value, -(-(1 << (31 + bits)) // value), bits - 1


def _record(
    problem: Problem, plan: HopperPlan, work: Division, foldings: tuple[Folding, Folding, Folding]
) -> npt.NDArray[Any]:
    """`HopperProblem` of cuda/hopper/tile.cuh."""
    rank, axes = problem.rank, problem.axes
    boxes = ("query_box", "tile_box", "key_box")
    record = np.zeros(
        1,
        np.dtype(
            [
                ("axes", AXIS, (rank,)),
                *((name, "i4", (rank,)) for name in boxes),
                ("tiles", DIVISOR, (rank,)),
                ("head_groups", DIVISOR),
                ("group_size", DIVISOR),
                ("warpgroup", "i4", (MOST_WARPGROUPS, 1 + rank)),
                ("tile_count", "i4"),
                ("whole_tiles", "i4"),
                ("parts", DIVISOR),
                ("block_tiles", "i4"),
                ("active", "i4", (MOST_WARPGROUPS,)),
                ("heads_per_tile", "i4"),
                ("coordinates", "i4"),
                ("query_pieces", PIECES),
                ("key_pieces", PIECES),
                *((name, "i4") for name in ("additional", "value_dim", "longest_last")),
                *((name, FOLDING) for name in ("query", "key", "value")),
                ("scale", "f4"),
                ("sign", "f4"),
            ],
            align=True,
        ),
    )
    record["axes"] = [axis_record(axis) for axis in axes]
    for name in boxes:
        record[name] = getattr(plan, name)
    record["tiles"] = [
        divisor(count_walk(axis, *sizes).blocks)
        for axis, *sizes in zip(axes, plan.query_box, plan.warpgroups, plan.key_box, strict=True)
    ]
    record["head_groups"] = divisor(problem.heads // plan.heads)
    record["group_size"] = divisor(problem.group_size)
    for w in range(plan.form.warpgroups):
        head, *place = np.unravel_index(w, (plan.heads, *plan.warpgroups))
        starts = (int(n) * extent for n, extent in zip(place, plan.query_box, strict=True))
        record["warpgroup"][0, w] = (int(head), *starts)
    record["tile_count"], record["whole_tiles"] = work.tiles, work.whole
    record["parts"], record["block_tiles"] = divisor(work.parts), work.blocks
    for part in range(work.parts):  # the first part has more, if they are not equal
        last = plan.form.warpgroups - work.parts + part
        record["active"][0, part] = 1 << last if part else (2 << last) - 1
    record["heads_per_tile"] = plan.heads
    record["coordinates"] = sum(plan.query_box)
    for name, box, rows in (
        ("query_pieces", plan.query_box, ROWS),
        ("key_pieces", plan.key_box, plan.form.keys),
    ):
        number = pieces(problem, box)
        record[name] = (number, rows // number, box[0] // number * axes[0].dilation)
    record["additional"], record["value_dim"] = problem.additional or 0, problem.value_dim
    record["longest_last"] = any(axis.is_causal for axis in axes)
    record["query"], record["key"], record["value"] = foldings
    record["scale"] = (abs(problem.scale) or 1.0) * math.log2(math.e)
    record["sign"] = np.sign(problem.scale)
    return record
