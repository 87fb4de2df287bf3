"""The launches of the kernels for small windows: slabs of keys and lists out of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from cuneigh import _jit
from cuneigh._backends.fused.plan import Role, rows_are_keys
from cuneigh._backends.fused.small import plan as _halo_plan
from cuneigh._backends.fused.small.plan import Form, HaloPlan
from cuneigh._device import Device
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.program import Program
from cuneigh._gpu.records import AXIS, axis_record
from cuneigh._gpu.views import Views, load_width
from cuneigh._problem import Problem

UNIT = 16
"""Bytes of a load, and what steps in memory are counted in."""
DIVISOR = np.dtype([("divisor", "i4"), ("inverse", "u4")])
"""`Divisor` of cuda/fused/small/small.cuh."""


def plan(
    program: Program, problem: Problem, role: Role, vectors: Sequence[Array]
) -> HaloPlan | None:
    """The plan for these arrays; None where the other kernels of `fused` are to be taken."""
    if load_width(vectors) < UNIT or not all(_steps_fit(array) for array in vectors):
        return None
    return _halo_plan.make_plan(problem, program.device, role)


def launch(
    program: Program,
    problem: Problem,
    role: Role,
    chosen: HaloPlan,
    arrays: Sequence[tuple[Array | None, str]],
) -> None:
    """Launch the kernel of `role` on `arrays`, each with the method of `Views` that takes it."""
    views = Views(problem.rank)
    lse, _ = arrays[-1]
    flags = (chosen.whole, lse is not None) if role == "forward" else ()
    for array, kind in arrays:
        if array is not None and _halo_plan.inner(problem) == "heads":
            array = _heads_first(array, -1 if kind == "scalars" else -2)
        getattr(views, kind)(array)
    length, outer = _halo_plan.sizes(problem, role)
    record = _record(problem, chosen, role)
    boxes = int(record["boxes"].prod())
    program.launch(
        kernel(problem, role, chosen.form, chosen.columns, *flags),
        (boxes * outer * -(-length // chosen.part), 1),
        chosen.form.warps * 32,
        record,
        views.words,
        shared_bytes=_halo_plan.shared_bytes(problem, chosen, role),
    )


@lru_cache(maxsize=1024)
def kernel(
    problem: Problem, role: Role, form: Form, columns: int, whole: bool = False, lse: bool = False
) -> _jit.Kernel:
    """The kernel of a role, with the plan that cuda/fused/small/forward.cu describes."""
    constants = {
        "kRank": problem.rank,
        "kWarps": form.warps,
        "kBlocks": form.blocks,
        "kColumns": columns,
        "kBuffers": form.buffers,
        "kHeadDim": problem.head_dim,
        "kValueDim": problem.value_dim,
        "kSides": _halo_plan.sides(problem.rank),
        "kTableBytes": _halo_plan.table_bytes(problem, columns, form.warps),
    }
    lines = [f"static constexpr int {name} = {value};" for name, value in constants.items()]
    flags = {"kRowsAreKeys": rows_are_keys(role), "kWhole": whole, "kLse": lse}
    lines += [f"static constexpr bool {name} = {str(on).lower()};" for name, on in flags.items()]
    lines.append(f"using Element = {problem.dtype};")
    name = "fused/small/forward" if role == "forward" else "fused/small/backward"
    return _jit.Kernel(name, "\n".join(lines))


def kernels(problem: Problem, device: Device, role: Role) -> list[_jit.Kernel]:
    """All that `problem` may need, whatever its windows."""
    if not _halo_plan.takes(problem, role):
        return []
    flags = itertools.product((True, False), repeat=2) if role == "forward" else [(False, False)]
    return [
        kernel(problem, role, form, columns, whole, lse)
        for whole, lse in flags
        for form, places in _halo_plan.forms(problem, device.capability, role, whole).items()
        for columns in places
    ]


def _steps_fit(array: Array) -> bool:
    """Whether the steps to all vectors are positive and fit into 32 bits."""
    axes = list(zip(array.shape, array.strides, strict=True))[:-1]
    span = sum((length - 1) * step for length, step in axes)
    return all(step >= 0 for _, step in axes) and span * array.itemsize < UNIT << 32


def _heads_first(array: Array, heads: int) -> Array:
    """The array with batch and heads in each other's place."""

    def swapped(values: tuple[int, ...]) -> tuple[int, ...]:
        changed = list(values)
        changed[0], changed[heads] = changed[heads], changed[0]
        return tuple(changed)

    return replace(array, shape=swapped(array.shape), strides=swapped(array.strides))


@lru_cache(maxsize=1024)
def _record(problem: Problem, chosen: HaloPlan, role: Role) -> np.ndarray[Any, Any]:
    """`HaloProblem` of cuda/fused/small/small.cuh."""
    rank = problem.rank
    divisors = ("warp_box", "warps", "slab", "list")
    numbers = ("batch", "part", "heads", "group_size")
    record = np.zeros(
        1,
        np.dtype(
            [
                ("axes", AXIS, (rank,)),
                *((name, DIVISOR, (rank,)) for name in divisors),
                ("boxes", "i4", (rank,)),
                *((name, "i4") for name in numbers),
                ("scale", "f4"),
                ("gradient_scale", "f4"),
            ],
            align=True,
        ),
    )
    record["axes"] = [axis_record(axis) for axis in problem.axes]
    for name in divisors:
        record[name] = [
            (divisor, _halo_plan.LARGEST_QUOTIENT // divisor + 1)
            for divisor in getattr(chosen, name)
        ]
    record["boxes"] = [count.blocks for count in _halo_plan.along(problem, chosen, role)]
    record["batch"], heads = _halo_plan.sizes(problem, role)
    record["heads"] = heads * problem.group_size if rows_are_keys(role) else heads
    record["part"], record["group_size"] = chosen.part, problem.group_size
    record["scale"] = problem.scale * math.log2(math.e)
    record["gradient_scale"] = problem.scale
    return record
