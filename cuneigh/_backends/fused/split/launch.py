"""The launches of the kernels for few queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from cuneigh import _jit
from cuneigh._backends.fused.split import plan as split_plan
from cuneigh._backends.fused.split.plan import Form, SplitPlan
from cuneigh._device import Device
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.passes import Pass
from cuneigh._gpu.program import Program
from cuneigh._gpu.records import (
    CLUSTERS,
    PARTS,
    axis_type,
    fill_axes,
    has_parts,
    with_starts,
)
from cuneigh._gpu.views import Views, load_width
from cuneigh._problem import Problem

UNIT = 16
"""Bytes of a load."""


def can_read(arrays: Sequence[Array]) -> bool:
    """Whether the kernels can read and write arrays of vectors with these strides."""
    return load_width(arrays) == UNIT


def launch(
    program: Program,
    problem: Problem,
    plan: SplitPlan,
    vectors: tuple[Array, Array, Array, Array],
    lse: Array | None,
) -> None:
    """Launch the kernel on query, key, value and output, whose vectors are 16 bytes wide."""
    output = vectors[-1]
    views = Views(1)  # `ForwardArguments` of cuda/fused/split/forward.cu
    views.vectors(*vectors)
    views.scalars(lse)
    sums: tuple[Array, Array] | tuple[None, None] = (None, None)
    if plan.is_joined_later:
        rows = (plan.splits, *output.shape[:-1])
        sums = (
            program.allocate((*rows, problem.value_dim), "float32"),
            program.allocate((*rows, 2), "float32"),
        )
    views.addresses(*sums)
    program.launch(
        kernel(problem, plan.form),
        (split_plan.blocks(problem, plan), 1),
        plan.form.warps * 32,
        with_starts(_record(problem, plan)),
        views.words,
        shared_bytes=split_plan.shared_bytes(problem, plan.form),
    )
    if plan.is_joined_later:
        views = Views(1)  # `JoinArguments` of cuda/fused/split/join.cu
        views.addresses(*sums, output, lse)
        rows_in_all = math.prod(output.shape[:-1])
        views.numbers(rows_in_all, plan.splits, problem.value_dim)
        program.launch(join_kernel(problem), (rows_in_all, 1), 32, views.words)


@lru_cache(maxsize=1024)
def kernel(problem: Problem, form: Form) -> _jit.Kernel:
    """The kernel, with the plan that cuda/fused/split/forward.cu describes."""
    constants = {
        "kRank": 1,
        "kRowTiles": form.row_tiles,
        "kRowWarps": form.row_warps,
        "kKeyWarps": form.key_warps,
        "kColumns": form.columns,
        "kStages": form.stages,
        "kBlocks": form.blocks,
        "kCluster": form.cluster,
        "kHeadDim": split_plan.padded(problem.head_dim),
        "kValueDim": split_plan.padded(problem.value_dim),
        "kSharedBytes": split_plan.shared_bytes(problem, form),
    }
    source = _jit.plan_source(constants, types={"Element": problem.dtype})
    macros = ((PARTS,) if has_parts(problem) else ()) + ((CLUSTERS,) if form.cluster > 1 else ())
    return _jit.Kernel("fused/split/forward", source, macros=macros)


@lru_cache(maxsize=64)
def join_kernel(problem: Problem) -> _jit.Kernel:
    """The kernel that joins sums, with the plan that cuda/fused/split/join.cu describes."""
    source = _jit.plan_source({"kSplits": split_plan.MOST_SPLITS}, types={"Element": problem.dtype})
    return _jit.Kernel("fused/split/join", source)


def kernels(problem: Problem, device: Device, pass_: Pass) -> list[_jit.Kernel]:
    """All that `problem` may need, whatever its windows."""
    if not split_plan.takes(problem, pass_):
        return []
    made = [kernel(problem, form) for form in split_plan.forms(problem, device)]
    return [*made, join_kernel(problem)] if made else []


@lru_cache(maxsize=1024)
def _record(problem: Problem, plan: SplitPlan) -> np.ndarray[Any, Any]:
    """`SplitProblem` of cuda/fused/split/problem.cuh."""
    of_plan = ("queries", "heads", "boxes", "head_boxes", "splits")
    of_problem = ("batch", "kv_heads", "group_size", "head_dim", "value_dim")
    fields: list[Any] = [("axes", axis_type(has_parts(problem)), (1,))]
    fields += [(name, "i4") for name in (*of_plan, *of_problem)]
    record = np.zeros(1, np.dtype([*fields, ("scale", "f4"), ("padding", "i4")], align=True))
    fill_axes(record, problem)
    for name in ("queries", "heads", "splits"):
        record[name] = getattr(plan, name)
    for name in of_problem:
        record[name] = getattr(problem, name)
    record["boxes"] = split_plan.count(problem, plan).blocks
    record["head_boxes"] = math.ceil(problem.group_size / plan.heads)
    record["scale"] = problem.scale * math.log2(math.e)
    return record
