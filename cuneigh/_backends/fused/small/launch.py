"""The launches of the kernels for small windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from cuneigh import _jit
from cuneigh._backends.fused.small import forms as small_forms
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._backends.fused.small import tma, whole
from cuneigh._backends.fused.small.forms import Form
from cuneigh._backends.fused.small.plan import SmallPlan
from cuneigh._backends.fused.small.whole import WholeForm, WholePlan
from cuneigh._device import Device
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.passes import DKV, DQ, FORWARD, HVP_DKV, HVP_DQ, JVP, Pass
from cuneigh._gpu.program import Program
from cuneigh._gpu.records import PARTS, axis_type, fill_axes, has_parts, with_starts
from cuneigh._gpu.tensor_map import TensorMap
from cuneigh._gpu.views import Views, load_width
from cuneigh._problem import Operands, Problem

UNIT = 16
"""Bytes of a load, in which kernels count offsets."""
TMA = "CUNEIGH_TMA"
"""The macro of kernels for which TMA brings stages."""
FAST_DIVMOD = np.dtype([("divisor", "i4"), ("inverse", "u4")])
"""`FastDivmod` of cuda/fused/small/problem.cuh."""


def can_read(arrays: Sequence[Array], key_mask: Array | None) -> bool:
    """Whether the kernels can read and write arrays of vectors, and a mask, with these strides."""
    if key_mask is not None and not _offsets_fit(of_heads(key_mask, 1), 1):
        return False
    return load_width(arrays) == UNIT and all(_offsets_fit(array, UNIT) for array in arrays)


def can_read_whole(arrays: Sequence[Array], written: Sequence[Array]) -> bool:
    """Whether the kernel for whole dilation groups can read `arrays` and write the gradients."""
    return can_read([*arrays, *written], None) and all(map(tma.can_read, arrays))


def readable_numbers(array: Array | None, program: Program) -> Any:
    """`array`, of a number for each query and head, or a copy of it that the kernels can read."""
    if array is None or _offsets_fit(of_heads(array, 1), array.itemsize):
        return array
    return program.copied(array)


def of_heads(key_mask: Array, heads: int) -> Array:
    """A key mask as an array [batch, x1..xr, heads]."""
    shape, strides = (*key_mask.shape, heads), (*key_mask.strides, 0)
    return replace(key_mask, shape=shape, strides=strides)


def launch(
    program: Program,
    problem: Problem,
    pass_: Pass,
    plan: SmallPlan,
    arrays: Sequence[tuple[Array | None, Literal["vectors", "scalars", "pairs"]]],
    grad_moves: bool = False,
) -> None:
    """Launch the kernel of a pass on `arrays`, each with the method of `Views` that takes it.

    `grad_moves` as in `kernel`.
    """
    vectors = [array for array, kind in arrays if kind == "vectors" and array is not None]
    if plan.by_tma and not all(tma.can_read(array) for array in vectors):
        plan = replace(plan, by_tma=False)  # `candidates` has seen that it fits
    views = Views(problem.rank)
    lse, _ = arrays[-1]
    flags = (plan.one_stage, lse is not None) if pass_ == FORWARD else _flags(pass_)[0]
    for array, kind in arrays:
        if array is not None and small_plan.inner(problem) == "heads":
            array = _heads_first(array, -1 if kind == "scalars" else -2)
        getattr(views, kind)(array)
    length, outer = small_plan.sizes(problem, pass_)
    record = _record(problem, plan, pass_)
    boxes = int(record["boxes"].prod())
    program.launch(
        kernel(problem, pass_, plan.form, plan.columns, *flags, plan.by_tma, grad_moves),
        (boxes * outer * math.ceil(length / plan.batch_heads), 1),
        plan.form.warps * 32,
        with_starts(record),
        views.words,
        *(_maps(problem, pass_, plan, vectors) if plan.by_tma else ()),
        shared_bytes=small_plan.shared_bytes(problem, plan, pass_),
    )


def launch_whole(
    program: Program,
    problem: Problem,
    plan: WholePlan,
    operands: Operands,
    grad_output: Array,
    output: Array,
    lse: Array,
    grad_lse: Array | None,
    gradients: Operands,
) -> None:
    """Launch the kernel for all gradients of whole dilation groups."""
    inner = small_plan.inner(problem)
    views = Views(problem.rank)  # `WholeArguments` of cuda/fused/small/whole.cu
    for array in gradients[:3]:
        views.vectors(_heads_first(array, -2) if inner == "heads" else array)
    for given in (lse, grad_lse):
        array = readable_numbers(given, program)
        views.scalars(_heads_first(array, -1) if array is not None and inner == "heads" else array)
    loaded = (operands.key, operands.value, operands.query, grad_output, output)
    length, outer = small_plan.sizes(problem, DQ)
    records = [_record(problem, plan.of_pass(pass_), pass_).copy() for pass_ in (DQ, DKV)]
    for record in records:
        record["vo_offset"] = whole.array_bytes(problem, plan)
    blocks = int(records[0]["boxes"].prod()) * outer * math.ceil(length / plan.batch_heads)
    program.launch(
        whole_kernel(problem, plan.form),
        (blocks, 1),
        plan.form.warps * 32,
        *map(with_starts, records),
        views.words,
        *(tma.map_of(problem, array, plan.stage, inner) for array in loaded),
        shared_bytes=whole.shared_bytes(problem, plan),
    )


@lru_cache(maxsize=1024)
def whole_kernel(problem: Problem, form: WholeForm) -> _jit.Kernel:
    """The kernel of all gradients of whole dilation groups."""
    constants = {
        "kRank": problem.rank,
        "kWarps": form.warps,
        "kBlocks": form.blocks,
        "kBuffers": form.buffers,
        "kBoxes": form.boxes,
        "kColumns": form.columns,
        "kHeadDim": problem.head_dim,
        "kValueDim": problem.value_dim,
        "kTileExtents": small_forms.tile_extents(problem.rank),
        "kTableBytes": whole.table_bytes(problem, form),
    }
    flags = {"kContiguous": form.contiguous}
    source = _jit.plan_source(constants, flags, {"Element": problem.dtype})
    return _jit.Kernel("fused/small/whole", source, macros=(TMA,))


def _maps(
    problem: Problem, pass_: Pass, plan: SmallPlan, vectors: Sequence[Array]
) -> list[TensorMap]:
    """What TMA is to know: of the columns' stages, and in gradients of a warp's rows."""
    columns = vectors[1:3] if pass_ == FORWARD else vectors[2:4]
    of = [(array, plan.stage) for array in columns]
    if pass_ != FORWARD:
        output = vectors[1 if pass_.rows_are_keys else -1]
        of += [(array, plan.warp_box) for array in (*vectors[:2], output)]
    inner = small_plan.inner(problem)
    return [tma.map_of(problem, array, box, inner) for array, box in of]


@lru_cache(maxsize=1024)
def kernel(
    problem: Problem,
    pass_: Pass,
    form: Form,
    columns: int,
    one_stage: bool = False,
    lse: bool = False,
    by_tma: bool = False,
    grad_moves: bool = False,
) -> _jit.Kernel:
    """The kernel of a pass, with the plan that cuda/fused/small/forward.cu describes.

    `grad_moves` says whether an hvp is given a tangent of the gradient of the output.
    """
    constants = {
        "kRank": problem.rank,
        "kWarps": form.warps,
        "kBlocks": form.blocks,
        "kColumns": columns,
        "kBuffers": form.buffers,
        "kHeadDim": problem.head_dim,
        "kValueDim": problem.value_dim,
        "kTileExtents": small_forms.tile_extents(problem.rank),
        "kTableBytes": small_forms.table_bytes(problem, columns, form.warps),
    }
    flags = {"kRowsAreKeys": pass_.rows_are_keys, "kOneStage": one_stage, "kLse": lse}
    flags["kKeyMask"] = problem.has_key_mask
    gradient = "fused/small/backward"
    if pass_ in (HVP_DQ, HVP_DKV):
        gradient, flags["kGradMoves"] = "fused/small/hvp", grad_moves
    name = {FORWARD: "fused/small/forward", JVP: "fused/small/jvp"}.get(pass_, gradient)
    source = _jit.plan_source(constants, flags, {"Element": problem.dtype})
    macros = ((PARTS,) if has_parts(problem) else ()) + ((TMA,) if by_tma else ())
    return _jit.Kernel(name, source, macros=macros)


def _flags(pass_: Pass) -> list[tuple[bool, bool]]:
    """`one_stage` and `lse` of the kernels that there are for a pass."""
    if pass_ == FORWARD:
        return [(one_stage, lse) for one_stage in (True, False) for lse in (True, False)]
    return [{JVP: (True, True), HVP_DQ: (True, False)}.get(pass_, (False, False))]


def kernels(problem: Problem, device: Device, pass_: Pass) -> list[_jit.Kernel]:
    """All that `problem` may need, whatever its windows."""
    if not small_plan.takes(problem, pass_) or device.capability < (8, 0):
        return []
    of_whole = []
    if pass_ == DQ and whole.takes(problem, device.capability):
        of_whole = [whole_kernel(problem, form) for form in whole.FORMS]
    return of_whole + [
        kernel(problem, pass_, form, columns, one_stage, lse, by_tma, grad_moves)
        for one_stage, lse in _flags(pass_)
        for form, slots in small_forms.forms(problem, device.capability, pass_, one_stage).items()
        for columns in slots
        for by_tma in (False, True)
        if not by_tma or small_forms.has_tma(problem, device.capability, pass_, form, columns)
        for grad_moves in ((False, True) if pass_ in (HVP_DQ, HVP_DKV) else (False,))
    ]


def _offsets_fit(array: Array, unit: int) -> bool:
    """Whether the offsets of all vectors, in `unit` bytes, are positive and fit into 32 bits."""
    axes = list(zip(array.shape, array.strides, strict=True))[:-1]
    span = sum((length - 1) * stride for length, stride in axes)
    return all(stride >= 0 for _, stride in axes) and span * array.itemsize < unit << 32


def _heads_first(array: Array, heads: int) -> Array:
    """The array with batch and heads exchanged; `heads` is the axis of the heads."""

    def swapped(values: tuple[int, ...]) -> tuple[int, ...]:
        changed = list(values)
        changed[0], changed[heads] = changed[heads], changed[0]
        return tuple(changed)

    return replace(array, shape=swapped(array.shape), strides=swapped(array.strides))


@lru_cache(maxsize=1024)
def _record(problem: Problem, plan: SmallPlan, pass_: Pass) -> np.ndarray[Any, Any]:
    """`SmallWindowProblem` of cuda/fused/small/problem.cuh."""
    rank = problem.rank
    divisors = ("warp_box", "warps", "stage", "tile")
    numbers = ("batch", "batch_heads", "heads", "group_size")
    record = np.zeros(
        1,
        np.dtype(
            [
                ("axes", axis_type(has_parts(problem)), (rank,)),
                *((name, FAST_DIVMOD, (rank,)) for name in divisors),
                ("boxes", "i4", (rank,)),
                *((name, "i4") for name in numbers),
                ("scale", "f4"),
                ("gradient_scale", "f4"),
                *((name, "i4") for name in ("vo_offset", "head_pitch", "batch_pitch")),
            ],
            align=True,
        ),
    )
    fill_axes(record, problem)
    for name in divisors:
        record[name] = [
            (divisor, small_plan.LARGEST_QUOTIENT // divisor + 1) for divisor in getattr(plan, name)
        ]
    record["boxes"] = [count.blocks for count in small_plan.count(problem, plan, pass_)]
    record["batch"], heads = small_plan.sizes(problem, pass_)
    record["heads"] = heads * problem.group_size if pass_.rows_are_keys else heads
    record["batch_heads"], record["group_size"] = plan.batch_heads, problem.group_size
    record["scale"] = problem.scale * math.log2(math.e)
    record["gradient_scale"] = problem.scale
    if plan.by_tma:
        record["vo_offset"] = tma.vo_offset(problem, plan.stage)
        record["head_pitch"], record["batch_pitch"] = tma.pitches(
            problem, small_plan.inner(problem)
        )
    return record
