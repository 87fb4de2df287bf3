"""Online softmax on tensor cores: nothing of the size of the logits in memory; sm_75 and later.

The kernels multiply dense boxes of queries and keys, so that a non-finite *value* may reach queries
whose box of keys held it though their window did not (0 * NaN is NaN). A non-finite key reaches
only the queries whose window holds it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cuneigh import _fused_plan, _jit
from cuneigh._backends._arguments import AXIS, Views, axis_record, load_width, readable
from cuneigh._device import Device, cuda
from cuneigh._fused_plan import WARPS, FusedPlan
from cuneigh._problem import Operands, Problem

if TYPE_CHECKING:
    from cuneigh._backends import Allocate

NAME = "fused"
LONGEST = 256
"""Head dimensions that the kernels take."""


def unsupported(problem: Problem, device: Device) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    if device.kind != "cuda":
        return "needs arrays on a CUDA device, but these are on the CPU"
    if problem.operation != "forward":
        return f"computes the forward alone, not {problem.operation}"
    if device.capability < (7, 5):
        return f"needs compute capability 7.5, but {device.name} has {device.arch}"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"computes in float16 and bfloat16, not in {problem.dtype}"
    if problem.dtype == "bfloat16" and device.capability < (8, 0):
        return f"needs compute capability 8.0 for bfloat16, but {device.name} has {device.arch}"
    for name in ("head_dim", "value_dim"):
        if getattr(problem, name) > LONGEST:
            return f"takes head dimensions up to {LONGEST}, not {name}={getattr(problem, name)}"
    return None


def forward(
    problem: Problem, operands: Operands, output: Any, lse: Any, allocate: Allocate
) -> None:
    operands = Operands(*(readable(array, allocate) for array in operands))
    key_bytes = load_width((operands.query, operands.key, operands.additional_keys))
    value_bytes = load_width((operands.value, operands.additional_values, output))
    plan = _fused_plan.plan(problem)
    views = Views(problem.rank)
    views.vectors(*operands[:3])
    views.additional(operands.additional_keys, operands.additional_values)
    views.bias(operands.rpb)
    views.vectors(output)
    views.scalars(lse)
    blocks = _fused_plan.count(problem, plan).blocks * problem.batch * problem.heads
    _kernel(problem, plan, key_bytes, value_bytes)(
        (blocks,), (WARPS * 32,), (_record(problem, plan), views.pack())
    )


def kernels(problem: Problem) -> list[_jit.Kernel]:
    """The kernels that `problem` needs when its arrays are contiguous."""
    plan = _fused_plan.plan(problem)
    widths = [min(16, 2 * (dim & -dim)) for dim in (problem.head_dim, problem.value_dim)]
    return [_jit.Kernel("fused_forward", source(problem, plan, *widths))]


def source(problem: Problem, plan: FusedPlan, key_bytes: int, value_bytes: int) -> str:
    """The members of `struct Plan` of cuda/fused_forward.cu."""
    constants = {
        "kRank": problem.rank,
        "kWarps": WARPS,
        "kRowTiles": plan.row_tiles,
        "kKeys": plan.keys,
        "kHeadDim": padded(problem.head_dim),
        "kValueDim": padded(problem.value_dim),
        "kKeyBytes": key_bytes,
        "kValueBytes": value_bytes,
        "kSharedBytes": shared_memory(problem, plan),
    }
    lines = [f"static constexpr int {name} = {value};" for name, value in constants.items()]
    for name, dim in (("kKeyExact", problem.head_dim), ("kValueExact", problem.value_dim)):
        lines.append(f"static constexpr bool {name} = {str(dim == padded(dim)).lower()};")
    lines.append(f"using Element = {problem.dtype};")
    lines.append(f"using Bias = {problem.rpb_dtype or 'void'};")
    return "\n".join(lines)


def padded(dim: int) -> int:
    """The head dimension that a kernel is compiled for."""
    return math.ceil(dim / 16) * 16


def shared_memory(problem: Problem, plan: FusedPlan) -> int:
    """Bytes of `FusedSmem`."""
    head_dim, value_dim = padded(problem.head_dim), padded(problem.value_dim)
    rank, queries = problem.rank, 16 * plan.row_tiles * WARPS

    def rows(dim: int) -> int:
        return 2 * (dim if dim // 8 % 2 else dim + 8)

    size = queries * rows(max(head_dim, value_dim))
    size += 2 * plan.keys * (rows(head_dim) + rows(value_dim))
    size += 8 * rank * (plan.keys + 1)
    size += 24 * plan.keys
    size += 8 * rank + 16 * rank * WARPS
    size += queries * (8 * rank + 4 * rank + 4)
    return math.ceil(size / 8) * 8


def _kernel(problem: Problem, plan: FusedPlan, key_bytes: int, value_bytes: int) -> Any:
    import cupy

    device = cuda(cupy.cuda.device.get_device_id())
    kernel = _jit.load(
        _jit.Kernel("fused_forward", source(problem, plan, key_bytes, value_bytes)), device
    )
    size = shared_memory(problem, plan)
    if kernel.max_dynamic_shared_size_bytes < size:
        kernel.max_dynamic_shared_size_bytes = size
    return lambda grid, block, arguments: kernel(grid, block, arguments, shared_mem=size)


@lru_cache(maxsize=1024)
def _record(problem: Problem, plan: FusedPlan) -> np.ndarray[Any, Any]:
    """`FusedProblem` of cuda/cuneigh/fused.cuh."""
    rank = problem.rank
    record = np.zeros(
        1,
        np.dtype(
            [
                ("axes", AXIS, (rank,)),
                *((name, "i4", (rank,)) for name in ("warp_box", "warps", "key_box", "boxes")),
                *((name, "i4") for name in ("batch", "heads", "group_size")),
                *((name, "i4") for name in ("head_dim", "value_dim", "additional", "sign")),
                ("scale", "f4"),
            ],
            align=True,
        ),
    )
    record["axes"] = [axis_record(axis) for axis in problem.axes]
    record["warp_box"], record["warps"] = plan.warp_box, plan.warps
    record["key_box"] = plan.key_box
    record["boxes"] = [
        _fused_plan.count_axis(axis, *sizes).blocks
        for axis, *sizes in zip(problem.axes, plan.warp_box, plan.warps, plan.key_box, strict=True)
    ]
    for name in ("batch", "heads", "group_size", "head_dim", "value_dim"):
        record[name] = getattr(problem, name)
    record["additional"] = problem.additional or 0
    record["sign"] = np.sign(problem.scale)
    record["scale"] = abs(problem.scale) or 1.0
    return record
