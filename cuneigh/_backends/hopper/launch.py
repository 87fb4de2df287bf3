"""The calls of the Hopper backend, and the launches of its kernels."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuneigh import _jit
from cuneigh._backends.hopper.choice import NAME, make_plan, passes
from cuneigh._backends.hopper.forms import forms_of
from cuneigh._backends.hopper.plan import (
    ROWS,
    Division,
    Form,
    HopperPlan,
    count_seen_boxes,
    division,
    granule_sums,
    has_masked_columns,
    is_dilated,
    multiplies_ahead,
    padded,
    pieces,
    shared_bytes,
    sum_granules,
    takes_first_axis_first,
    ways,
    width,
)
from cuneigh._backends.hopper.tensor_maps import Folding, map_of_additional, map_of_tokens
from cuneigh._device import Device
from cuneigh._gpu import sums
from cuneigh._gpu.announce import announce
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.boxes import Box, count_walk, granule_lead
from cuneigh._gpu.passes import BACKWARD, DKV, DQ, FORWARD, JVP, Pass
from cuneigh._gpu.program import Program
from cuneigh._gpu.records import (
    CLUSTERS,
    PARTS,
    axis_type,
    fill_axes,
    has_parts,
    with_starts,
)
from cuneigh._gpu.tensor_map import TensorMap
from cuneigh._gpu.views import Views, readable
from cuneigh._problem import JvpResults, Operands, Problem


def forward(problem: Problem, operands: Operands, output: Any, lse: Any, program: Program) -> None:
    # `ForwardArguments` of cuda/hopper/forward.cu, or `ChunkArguments` of chunk.cu
    views = Views(problem.rank)
    _look_at_boxes(program, problem, FORWARD, operands.key_mask, views)
    views.vectors(output)
    views.scalars(lse)
    rows, columns = (operands.query,), (operands.key, operands.value)
    _launch(program, problem, FORWARD, rows, columns, _additional(problem, operands), views)


def jvp(
    problem: Problem, operands: Operands, tangents: Operands, results: JvpResults, program: Program
) -> None:
    views = Views(problem.rank)  # `JvpArguments` of cuda/hopper/jvp.cu
    _look_at_boxes(program, problem, JVP, operands.key_mask, views)
    views.vectors(results.output, results.tangent_output)
    views.scalars(results.lse, results.tangent_lse)
    rows, columns = (operands.query,), (operands.key, operands.value)
    additional = _additional(problem, operands)
    _launch(program, problem, JVP, rows, columns, additional, views, tangents=tangents)


def backward(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    output: Any,
    lse: Any,
    grad_lse: Any,
    gradients: Operands,
    program: Program,
) -> None:
    of_queries, of_keys = (operands.query, grad_output), (operands.key, operands.value)
    statistics = program.allocate((*lse.shape, 2), "float32")
    has_sums = BACKWARD in passes(problem, program.device)
    of_sums = _prepare(program, problem, operands) if has_sums else None
    units = None if of_sums is None else of_sums.units
    output = readable(output, program)
    sums.delta(problem, grad_output, output, lse, grad_lse, statistics, program, units)
    # `BackwardArguments` of cuda/hopper/backward.cu, or `DkvArguments` of gradients.cuh
    views = Views(problem.rank)
    views.mask(operands.key_mask)
    views.pairs(statistics)
    if of_sums is not None:
        views.scalars(of_sums.units.units)
        views.vectors(gradients.key, gradients.value, gradients.query)
        _launch_backward(program, problem, of_keys, of_queries, views, of_sums)
        return
    views.vectors(gradients.key, gradients.value)
    _launch(program, problem, DKV, of_keys, of_queries, None, views)
    program.keys_are_complete()
    views = Views(problem.rank)  # `DqArguments` of cuda/hopper/dq.cu
    _look_at_boxes(program, problem, DQ, operands.key_mask, views)
    views.pairs(statistics)
    views.vectors(gradients.query)
    _launch(program, problem, DQ, of_queries, of_keys, _additional(problem, operands), views)
    if problem.additional:
        sums.attention_gradients(
            problem, operands, grad_output, lse, statistics.component(1), gradients, program
        )


def kernels(problem: Problem, device: Device) -> list[_jit.Kernel]:
    """The kernels of a supported problem, of all the ways to compute it."""
    needed = []
    for pass_ in itertools.chain(*ways(problem)):
        for form in forms_of(problem, device, pass_):
            needed.append(kernel(problem, form, pass_))
            if has_masked_columns(problem, pass_):
                needed.append(kernel(problem, form, pass_, "seen"))
    if problem.operation == "backward":
        needed += [sums.delta_kernel(problem), *sums.kernels(problem)]
        if any(BACKWARD in way for way in ways(problem)):
            (form,) = forms_of(problem, device, BACKWARD)
            needed.append(kernel(problem, form, BACKWARD, "prepare"))
            needed.append(sums.delta_kernel(problem, with_units=True))
    return needed


def _additional(problem: Problem, operands: Operands) -> tuple[Any, Any] | None:
    """The additional keys and values, if there are any."""
    if not problem.additional:
        return None
    return operands.additional_keys, operands.additional_values


def _look_at_boxes(
    program: Program, problem: Problem, pass_: Pass, key_mask: Array | None, views: Views
) -> None:
    """Launch the kernel that looks which keys are seen, if some are hidden.

    `pass_` is one in which columns are keys; `SeenBoxes` of cuda/hopper/seen.cuh is appended to
    `views`.
    """
    if key_mask is None:
        return
    plan = make_plan(problem, program.device, pass_)
    places, most = count_seen_boxes(problem, plan, pass_)
    boxes = program.allocate((places, most, BYTES_OF_SEEN // 4), COUNTER)
    views.addresses(boxes)
    views.numbers(most)
    own = Views(problem.rank)  # `SeenArguments` of cuda/hopper/seen.cu
    own.mask(key_mask)
    own.addresses(boxes)
    own.numbers(most)
    work = division(problem, plan, program.device, pass_)
    record = _record(problem, plan, pass_, work, [Folding(0, 0, 0)] * 4)
    program.launch(
        kernel(problem, plan.form, pass_, "seen"), (places, 1), 256, with_starts(record), own.words
    )


# Sums of dQ in fixed point (cuda/hopper/sums.cuh)

GRANULES_AT_A_TIME = 96
"""`kAtATime` of cuda/hopper/rounding.cuh, with two warpgroups of consumers."""
SHIFTS = {1: (6, 9), 2: (3, 5), 3: (2, 3)}
"""The least and the most that cells are long along each axis, as powers of two, by rank."""


def shifts_of(problem: Problem) -> Box:
    """How long cells are of which the largest keys and values are found, as powers of two.

    Half a window, if that may be: a query then counts with few more keys than it sees.
    """
    least, most = SHIFTS[problem.rank]
    halves = ((axis.kernel_size // 2).bit_length() for axis in problem.axes)
    return tuple(max(least, min(most, bits - 1)) for bits in halves)


def _cells(tokens: Box, shifts: Box) -> int:
    return math.prod(((n - 1) >> shift) + 1 for n, shift in zip(tokens, shifts, strict=True))


class _Sums(NamedTuple):
    """`Sums` of cuda/hopper/sums.cuh, and the units of dQ."""

    plan: HopperPlan
    array: Array
    granules: int
    counters: Array
    """[key heads + 3] Tiles finished of each head; blocks; granules and tiles that they took."""
    units: sums.Units


def _prepare(program: Program, problem: Problem, operands: Operands) -> _Sums:
    """Launch the kernel that clears the sums of dQ, and looks for the largest keys and values.

    It takes the problem and the plan of `backward.cu`.
    """
    plan = make_plan(problem, program.device, BACKWARD)
    shifts, heads = shifts_of(problem), problem.batch * problem.kv_heads
    granules = sum_granules(problem, _lead(problem, plan))
    of_dq = program.allocate((granules * granule_sums(problem),), "float32")
    size = 2 * heads * _cells(problem.tokens, shifts)
    zeros = program.zeros((size + heads + 3,), COUNTER)
    units = sums.Units(program.allocate(problem.lse.shape, "float32"), zeros, shifts)
    views = Views(problem.rank)  # `PrepareArguments` of cuda/hopper/prepare.cu
    views.mask(operands.key_mask)
    views.vectors(operands.key, operands.value)
    views.addresses(units.magnitudes)
    cells = heads * _cells(problem.key_tokens, shifts)
    views.numbers(*shifts, cells)
    views.addresses(of_dq)
    views.numbers(of_dq.size // 4)
    work = division(problem, plan, program.device, BACKWARD)
    record = _record(problem, plan, BACKWARD, work, [Folding(0, 0, 0)] * 4)
    blocks = max(cells, 4 * program.device.sm_count)
    launched = kernel(problem, plan.form, BACKWARD, "prepare")
    program.launch(launched, (blocks, 1), 256, with_starts(record), views.words)
    return _Sums(plan, of_dq, granules, zeros.part(size, zeros.size), units)


def _launch_backward(
    program: Program,
    problem: Problem,
    of_keys: tuple[Any, Any],
    of_queries: tuple[Any, Any],
    views: Views,
    of_sums: _Sums,
) -> None:
    """Launch the kernel that computes all gradients.

    `views` are `BackwardArguments` of cuda/hopper/backward.cu up to the gradients.
    """
    finished, heads = of_sums.counters, problem.batch * problem.kv_heads
    begun, rounded, taken = (finished.component(heads + i) for i in range(3))
    rounders = min(program.device.sm_count, math.ceil(of_sums.granules / GRANULES_AT_A_TIME))
    views.addresses(of_sums.array, finished, begun, rounded)
    views.numbers(of_sums.granules, rounders)
    sizes = of_sums.plan, taken, rounders
    _launch(program, problem, BACKWARD, of_keys, of_queries, None, views, *sizes)


def _lead(problem: Problem, plan: HopperPlan) -> int:
    return granule_lead(problem.axes[-1], plan.tile_box[-1], BACKWARD)


def _launch(
    program: Program,
    problem: Problem,
    pass_: Pass,
    rows: tuple[Any, ...],
    columns: tuple[Any, Any],
    additional: tuple[Any, Any] | None,
    views: Views,
    plan: HopperPlan | None = None,
    taken: Array | None = None,
    more_blocks: int = 0,
    tangents: Operands | None = None,
) -> None:
    """Launch the kernel of a pass over `rows` and `columns`, the arrays of qk and then of vo.

    `views` are the arguments of the pass but for the last one, the counter of the tiles that blocks
    have taken: `taken`, or one of its own if a block takes more than one. `additional` is None
    where no column is an additional key. `tangents` are those of all arrays, for a pass that takes
    them. `more_blocks` are launched beside those that take tiles. `plan` is the one for the device
    unless another kernel had it first.
    """
    plan = plan or make_plan(problem, program.device, pass_)
    form = plan.form
    announce(NAME, pass_.name, problem, plan)
    maps, foldings = _maps(problem, plan, pass_, rows, columns, additional)
    if tangents is not None:
        rows, columns = (tangents.query,), (tangents.key, tangents.value)
        additional = _additional(problem, tangents)
        maps += _maps(problem, plan, pass_, rows, columns, additional)[0]
    if len(rows) == 1:  # rows of the forward pass have no vo
        foldings.insert(1, foldings[0])

    work = division(problem, plan, program.device, pass_)
    record = _record(problem, plan, pass_, work, foldings)
    blocks = min(work.blocks, program.device.sm_count)
    if form.cluster:  # blocks take one tile, or share
        blocks, maps = work.blocks, maps[:3]
    else:
        if taken is None and work.blocks > blocks:
            taken = program.zeros((1,), COUNTER)
        views.addresses(taken)
    program.launch(
        kernel(problem, form, pass_),
        (blocks + more_blocks, 1),
        128 * (form.consumers + 1),
        with_starts(record),
        views.words,
        *maps,
        shared_bytes=shared_bytes(problem, form, pass_),
    )


def _maps(
    problem: Problem,
    plan: HopperPlan,
    pass_: Pass,
    rows: tuple[Any, ...],
    columns: tuple[Any, Any],
    additional: tuple[Any, Any] | None,
) -> tuple[list[TensorMap], list[Folding]]:
    """How TMA sees these arrays, in their order, and how heads are folded in rows and columns."""
    described = [
        *(map_of_tokens(problem, array, _piece(problem, plan.row_box)) for array in rows),
        *(map_of_tokens(problem, array, _piece(problem, plan.column_box)) for array in columns),
    ]
    maps = [tensor_map for tensor_map, _ in described]
    if additional is not None:
        maps += [map_of_additional(array, plan.form.columns) for array in additional]
    elif not pass_.rows_are_keys:
        maps += maps[-1:] * 2  # for parameters that the kernel does not touch
    return maps, [folding for _, folding in described]


@lru_cache(maxsize=1024)
def kernel(problem: Problem, form: Form, pass_: Pass, name: str = "") -> _jit.Kernel:
    """The kernel `name` of a pass; without a name it is the one for this form.

    shared.cuh and chunk.cuh of cuda/hopper describe the plan.
    """
    constants = {
        "kRank": problem.rank,
        "kWarpgroups": form.warpgroups,
        "kColumns": form.columns,
        "kStages": form.stages,
        "kRowSlots": form.row_slots,
        "kHeadDim": padded(problem.head_dim),
        "kValueDim": padded(problem.value_dim),
        "kHeadColumns": width(problem.head_dim),
        "kValueColumns": width(problem.value_dim),
        "kSharedBytes": shared_bytes(problem, form, pass_),
    }
    if form.cluster:
        constants["kCluster"] = form.cluster
    flags = {
        "kBackward": problem.operation == "backward",
        "kTangents": pass_.moves,
        "kRowsAreKeys": pass_.rows_are_keys,
        "kDilated": is_dilated(problem),
        "kAdditional": bool(problem.additional) and not pass_.rows_are_keys,
        "kSigned": problem.scale <= 0,
        "kSums": pass_.adds,
        "kKeyMask": problem.has_key_mask,
        "kPairs": form.pairs,
        "kAhead": multiplies_ahead(problem, form, pass_),
    }
    source = _jit.plan_source(constants, flags, {"Element": problem.dtype})
    macros = ((PARTS,) if has_parts(problem) else ()) + ((CLUSTERS,) if form.cluster > 1 else ())
    of_form = "chunk" if form.cluster else "dkv_long" if form.pairs else pass_.name
    name = name or of_form
    return _jit.Kernel(f"hopper/{name}", source, arch_specific=True, macros=macros)


def _piece(problem: Problem, box: Box) -> Box:
    """What one load brings of a box."""
    return (box[0] // pieces(problem, box), *box[1:])


# Constants and structs of cuda/hopper/tile.cuh
MOST_WARPGROUPS = 3
COUNTER = "float32"
"""Of the size of a counter, an unsigned integer; frameworks need not have those."""
BYTES_OF_SEEN = 16
"""`QuadWords` of cuda/hopper/seen.cuh."""
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
    problem: Problem, plan: HopperPlan, pass_: Pass, work: Division, foldings: list[Folding]
) -> npt.NDArray[Any]:
    """`HopperProblem` of cuda/hopper/tile.cuh."""
    rank, axes = problem.rank, problem.axes
    boxes = ("row_box", "tile_box", "column_box")
    record = np.zeros(
        1,
        np.dtype(
            [
                ("axes", axis_type(has_parts(problem)), (rank,)),
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
                ("row_pieces", PIECES),
                ("column_pieces", PIECES),
                *((name, "i4") for name in ("additional", "head_dim", "value_dim", "longest_last")),
                ("granule_lead", "i4"),
                ("first_axis_first", "i4"),
                ("foldings", FOLDING, (4,)),  # of rows and of columns, qk and vo of either
                *((name, "f4") for name in ("scale", "sign", "gradient_scale")),
            ],
            align=True,
        ),
    )
    fill_axes(record, problem)
    for name in boxes:
        record[name] = getattr(plan, name)
    record["tiles"] = [
        divisor(count_walk(axis, *sizes, pass_).blocks)
        for axis, *sizes in zip(axes, plan.row_box, plan.warpgroups, plan.column_box, strict=True)
    ]
    record["head_groups"] = divisor(pass_.heads(problem) // plan.heads)
    record["group_size"] = divisor(problem.group_size)
    for w in range(plan.form.warpgroups):
        head, *place = np.unravel_index(w, (plan.heads, *plan.warpgroups))
        starts = (int(n) * extent for n, extent in zip(place, plan.row_box, strict=True))
        record["warpgroup"][0, w] = (int(head), *starts)
    record["tile_count"], record["whole_tiles"] = work.tiles, work.whole
    record["parts"], record["block_tiles"] = divisor(work.parts), work.blocks
    for part in range(work.parts):  # the first part has more, if they are not equal
        last = plan.form.warpgroups - work.parts + part
        record["active"][0, part] = 1 << last if part else (2 << last) - 1
    record["heads_per_tile"] = plan.heads
    record["coordinates"] = sum(plan.row_box)
    for name, box, rows in (
        ("row_pieces", plan.row_box, ROWS),
        ("column_pieces", plan.column_box, plan.form.columns),
    ):
        number = pieces(problem, box)
        record[name] = (number, rows // number, box[0] // number * axes[0].dilation)
    record["additional"] = problem.additional or 0
    record["head_dim"], record["value_dim"] = problem.head_dim, problem.value_dim
    # Late queries see many keys, early keys are seen by many queries. In a chunk all are of a tile.
    is_causal = any(axis.is_causal for axis in axes)
    record["longest_last"] = is_causal and not pass_.rows_are_keys and not plan.form.cluster
    if pass_.adds:
        record["granule_lead"] = _lead(problem, plan)
        record["first_axis_first"] = takes_first_axis_first(problem, plan)
    record["foldings"] = foldings
    record["gradient_scale"] = problem.scale
    record["scale"] = (abs(problem.scale) or 1.0) * math.log2(math.e)
    record["sign"] = np.sign(problem.scale)
    return record
