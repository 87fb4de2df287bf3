"""The calls of the fused backend, and the launches of its kernels for windows of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from cuneigh import _jit
from cuneigh._backends.fused import plan as fused_plan
from cuneigh._backends.fused.choice import NAME, Plan, choose_plan, plans_to_try
from cuneigh._backends.fused.passes import parts, passes
from cuneigh._backends.fused.plan import Area, FusedPlan
from cuneigh._backends.fused.small import launch as small
from cuneigh._backends.fused.small.plan import SmallPlan
from cuneigh._backends.fused.small.whole import WholePlan
from cuneigh._backends.fused.split import launch as split
from cuneigh._backends.fused.split.plan import SplitPlan
from cuneigh._device import Device
from cuneigh._gpu import sums, tuned
from cuneigh._gpu.announce import announce
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.boxes import count_walk
from cuneigh._gpu.passes import DKV, DQ, DV, FORWARD, HVP_DKV, HVP_DV, JVP, Pass
from cuneigh._gpu.program import Program
from cuneigh._gpu.records import PARTS, axis_type, fill_axes, has_parts, with_starts
from cuneigh._gpu.views import Views, load_width, readable
from cuneigh._problem import DTYPES, Operands, Problem


def forward(problem: Problem, operands: Operands, output: Any, lse: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    vectors = (*operands[:3], output)
    plan = plan_of(program, problem, FORWARD, vectors, operands.key_mask)
    if isinstance(plan, SplitPlan):
        split.launch(program, problem, plan, vectors, lse)
        return
    if isinstance(plan, SmallPlan):
        arrays = [*mask_of(problem, operands), *((array, "vectors") for array in vectors)]
        small.launch(program, problem, FORWARD, plan, [*arrays, (lse, "scalars")])
        return
    assert isinstance(plan, FusedPlan), "there is no other kernel for it"
    key_bytes = load_width((operands.query, operands.key, operands.additional_keys))
    value_bytes = load_width((operands.value, operands.additional_values, output))
    views = Views(problem.rank)  # `ForwardArguments` of cuda/fused/forward.cu
    views.mask(operands.key_mask)
    views.vectors(*operands[:3])
    views.additional(operands.additional_keys, operands.additional_values)
    views.bias(operands.rpb)
    views.vectors(output)
    views.scalars(lse)
    launch_pass(program, problem, FORWARD, plan, key_bytes, value_bytes, views)


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
    operands = Operands(*(readable(array, program) for array in operands))
    grad_output, output = readable(grad_output, program), readable(output, program)
    query, key, value = operands[:3]
    key_bytes = load_width((query, key, operands.additional_keys, gradients.query, gradients.key))
    value_bytes = load_width(
        (value, operands.additional_values, grad_output, output, gradients.value)
    )

    # In the words of cuda/fused/backward.cu: both vectors of the rows and of the columns, and the
    # gradients of the rows
    of_queries, of_keys = (query, grad_output), (key, value)
    planned: dict[Pass, tuple[Plan, tuple[Any, ...]]] = {}
    for pass_ in passes(problem):
        if pass_.rows_are_keys:
            vectors = (*of_keys, *of_queries, gradients.key, gradients.value, None)
        else:
            vectors = (*of_queries, *of_keys, gradients.query, None, output)
        plan = plan_of(program, problem, pass_, vectors, operands.key_mask, gradients)
        if isinstance(plan, WholePlan):
            about = operands, grad_output, output, lse, grad_lse, gradients
            small.launch_whole(program, problem, plan, *about)
            return
        planned[pass_] = plan, vectors
    statistics = program.allocate((*lse.shape, 2), "float32")
    # The kernel for small windows computes the statistics itself
    query_first = isinstance(planned[DQ][0], SmallPlan)
    if not query_first:
        sums.delta(problem, grad_output, output, lse, grad_lse, statistics, program)
    for pass_ in sorted(planned, key=lambda pass_: pass_.rows_are_keys == query_first):
        by_keys = pass_.rows_are_keys
        if not by_keys and not query_first:
            program.keys_are_complete()
        plan, vectors = planned[pass_]
        if isinstance(plan, SmallPlan):
            # `BackwardArguments` of cuda/fused/small/backward.cu
            arrays: list[Viewed] = [(array, "vectors") for array in vectors]
            arrays.insert(4, (statistics, "pairs"))
            for array in (lse, grad_lse):
                given = None if by_keys else small.readable_numbers(array, program)
                arrays.append((given, "scalars"))
            small.launch(program, problem, pass_, plan, [*mask_of(problem, operands), *arrays])
            continue
        assert isinstance(plan, FusedPlan), "there is no other kernel for it"
        views = Views(problem.rank)  # `BackwardArguments` of cuda/fused/backward.cu
        views.mask(operands.key_mask)
        views.vectors(*vectors[:4])
        if by_keys:  # additional keys are rows of no box
            views.additional(None, None)
        else:
            views.additional(operands.additional_keys, operands.additional_values)
        views.bias(operands.rpb)
        views.pairs(statistics)
        views.vectors(*vectors[4:6])
        launch_pass(program, problem, pass_, plan, key_bytes, value_bytes, views)

    if problem.additional or operands.rpb is not None:
        # Sums over all queries, which need no tensor cores
        sums.attention_gradients(
            problem, operands, grad_output, lse, statistics.component(1), gradients, program
        )


def kernels(problem: Problem, device: Device) -> list[_jit.Kernel]:
    """The kernels of a supported problem with contiguous arrays, whatever its windows."""
    size = DTYPES[problem.dtype]
    widths = [min(16, size * (dim & -dim)) for dim in (problem.head_dim, problem.value_dim)]
    of = passes(problem)
    needed = [
        kernel(part, device.capability, pass_, area, many, *widths, grad_moves=moves)
        for pass_ in of
        for _, part in parts(problem)
        for area in fused_plan.areas(part, device, pass_)
        for many in {fused_plan.many_batch_heads(part, pass_, count) for count in (1, 2)}
        for moves in ((False, True) if problem.operation == "hvp" else (False,))
    ]
    for pass_ in of:
        needed += small.kernels(problem, device, pass_) + split.kernels(problem, device, pass_)
    if problem.operation == "backward":
        needed += [sums.delta_kernel(problem), *sums.kernels(problem)]
    if problem.operation == "hvp":
        needed += kernels(problem.but("jvp"), device)
        needed += [sums.delta_kernel(problem), *sums.kernels(problem)]
    return needed


Viewed = tuple[Array | None, Literal["vectors", "scalars", "pairs"]]
"""An array that `small.launch` takes."""


def mask_of(problem: Problem, operands: Operands) -> list[Viewed]:
    """The key mask as `small.launch` takes it; nothing without one."""
    mask = operands.key_mask
    return [] if mask is None else [(small.of_heads(mask, problem.kv_heads), "scalars")]


def plan_of(
    program: Program,
    problem: Problem,
    pass_: Pass,
    vectors: Sequence[Array | None],
    key_mask: Array | None = None,
    gradients: Operands | None = None,
) -> Plan:
    """The plan of a pass over these arrays, which is announced.

    `gradients` are all that the passes of an operation write.
    """
    arrays = [array for array in vectors if array is not None]
    written = [array for array in gradients or () if array is not None]
    whole = gradients is not None and small.can_read_whole(arrays, written)
    readable_by = small.can_read(arrays, key_mask), split.can_read(arrays), whole
    device = program.device

    def by_planner() -> Plan:
        return choose_plan(problem, device, pass_, *readable_by)

    def to_try() -> tuple[Plan, ...]:
        return plans_to_try(problem, device, pass_)

    plan = tuned.plan(NAME, pass_.name, problem, device, to_try, by_planner)
    for kind, is_readable in zip((SmallPlan, SplitPlan, WholePlan), readable_by, strict=True):
        if isinstance(plan, kind) and not is_readable:
            plan = by_planner()
    announce(NAME, pass_.name, problem, plan)
    return plan


def launch_pass(
    program: Program,
    problem: Problem,
    pass_: Pass,
    plan: FusedPlan,
    key_bytes: int,
    value_bytes: int,
    views: Views,
    grad_moves: bool = False,
) -> None:
    """Launch the kernel of a pass, which takes `views`; `grad_moves` as in `kernel`."""
    many = fused_plan.many_batch_heads(problem, pass_, plan.batch_heads)
    capability = program.device.capability
    shares = math.ceil(problem.batch * pass_.heads(problem) / plan.batch_heads)
    blocks = fused_plan.count(problem, plan, pass_).blocks * shares
    program.launch(
        kernel(problem, capability, pass_, plan.area, many, key_bytes, value_bytes, grad_moves),
        (blocks, 1),
        plan.area.warps * 32,
        with_starts(_record(problem, plan, pass_)),
        views.words,
        shared_bytes=fused_plan.shared_bytes(problem, plan.area, pass_),
    )


@lru_cache(maxsize=1024)
def kernel(
    problem: Problem,
    capability: tuple[int, int],
    pass_: Pass,
    area: Area,
    many_batch_heads: bool,
    key_bytes: int,
    value_bytes: int,
    grad_moves: bool = False,
) -> _jit.Kernel:
    """The kernel of a pass, with the plan that cuda/fused/forward.cu describes.

    `grad_moves` says whether an hvp is given a tangent of the gradient of the output.
    """
    head_dim = fused_plan.padded(problem.head_dim)
    value_dim = fused_plan.padded(problem.value_dim)
    constants = {
        "kRank": problem.rank,
        "kWarps": area.warps,
        "kRowTiles": area.row_tiles,
        "kBlocks": fused_plan.blocks_per_multiprocessor(problem, capability, area, pass_),
        "kColumns": area.columns,
        "kHeadDim": head_dim,
        "kValueDim": value_dim,
        "kKeyBytes": key_bytes,
        "kValueBytes": value_bytes,
        "kSharedBytes": fused_plan.shared_bytes(problem, area, pass_),
    }
    flags = {
        "kKeyExact": head_dim == problem.head_dim,
        "kValueExact": value_dim == problem.value_dim,
        "kRowsAreKeys": pass_.rows_are_keys,
        "kAdditional": fused_plan.has_additional(problem, pass_),
        "kKeyMask": problem.has_key_mask,
    }
    if pass_ == FORWARD:
        flags["kManyBatchHeads"] = many_batch_heads
    elif pass_ != JVP:
        flags["kGradQk"] = pass_ not in (DV, HVP_DV)
        flags["kGradV"] = pass_ in (DV, DKV, HVP_DV, HVP_DKV)
        if pass_.moves:
            flags["kGradMoves"] = grad_moves
    types = {"Element": problem.dtype, "Bias": problem.rpb_dtype}
    gradient = "fused/hvp" if pass_.moves else "fused/backward"
    name = {FORWARD: "fused/forward", JVP: "fused/jvp"}.get(pass_, gradient)
    macros = (PARTS,) if has_parts(problem) else ()
    return _jit.Kernel(name, _jit.plan_source(constants, flags, types), macros=macros)


@lru_cache(maxsize=1024)
def _record(problem: Problem, plan: FusedPlan, pass_: Pass) -> np.ndarray[Any, Any]:
    """`FusedProblem` of cuda/fused/problem.cuh."""
    rank = problem.rank
    record = np.zeros(
        1,
        np.dtype(
            [
                ("axes", axis_type(has_parts(problem)), (rank,)),
                *((name, "i4", (rank,)) for name in ("warp_box", "warps", "column_box", "boxes")),
                *((name, "i4") for name in ("batch", "heads", "group_size", "batch_heads")),
                *((name, "i4") for name in ("head_dim", "value_dim", "additional", "sign")),
                ("scale", "f4"),
                ("gradient_scale", "f4"),
            ],
            align=True,
        ),
    )
    fill_axes(record, problem)
    record["warp_box"], record["warps"] = plan.warp_box, plan.warps
    record["column_box"] = plan.column_box
    record["boxes"] = [
        count_walk(axis, *sizes, pass_).blocks
        for axis, *sizes in zip(
            problem.axes, plan.warp_box, plan.warps, plan.column_box, strict=True
        )
    ]
    for name in ("batch", "heads", "group_size", "head_dim", "value_dim"):
        record[name] = getattr(problem, name)
    record["batch_heads"] = plan.batch_heads
    record["additional"] = 0 if pass_.rows_are_keys else problem.additional or 0
    record["sign"] = np.sign(problem.scale)
    record["scale"] = (abs(problem.scale) or 1.0) * math.log2(math.e)
    record["gradient_scale"] = problem.scale
    return record
