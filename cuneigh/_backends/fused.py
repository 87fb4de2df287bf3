"""Online softmax on tensor cores: nothing of the size of the logits in memory; sm_75 and later.

The kernels multiply dense boxes of queries and keys, so that a non-finite *value* may reach queries
whose box of keys held it though their window did not (0 * NaN is NaN). A non-finite key reaches
only the queries whose window holds it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cuneigh import _fused_plan, _jit
from cuneigh._backends._arguments import AXIS, Views, axis_record, load_width, readable
from cuneigh._device import Device, cuda
from cuneigh._fused_plan import WARPS, FusedPlan, padded
from cuneigh._problem import Operands, Problem

if TYPE_CHECKING:
    from cuneigh._backends import Allocate

NAME = "fused"
LONGEST = 256
"""Head dimensions that the kernels take."""


def unsupported(problem: Problem, device: Device) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    if device.kind != "cuda":
        return (
            "needs arrays on a CUDA device, but these are on the CPU; with an NVIDIA GPU, install "
            "'cuneigh[cuda12]' or 'cuneigh[cuda13]' and pass CuPy, PyTorch or JAX arrays that live "
            "on it"
        )
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
    if _fused_plan.plan(problem, device) is None:
        return f"needs more shared memory than the {device.shared_memory} bytes of {device.name}"
    return None


def forward(
    problem: Problem, operands: Operands, output: Any, lse: Any, allocate: Allocate
) -> None:
    import cupy

    operands = Operands(*(readable(array, allocate) for array in operands))
    key_bytes = load_width((operands.query, operands.key, operands.additional_keys))
    value_bytes = load_width((operands.value, operands.additional_values, output))
    device = cuda(cupy.cuda.device.get_device_id())
    plan = _fused_plan.plan(problem, device)
    assert plan is not None, "`unsupported` has seen that one fits"
    views = Views(problem.rank)
    views.vectors(*operands[:3])
    views.additional(operands.additional_keys, operands.additional_values)
    views.bias(operands.rpb)
    views.vectors(output)
    views.scalars(lse)
    kernel = _jit.load(_kernel(problem, plan.row_tiles, plan.keys, key_bytes, value_bytes), device)
    size = _fused_plan.shared_bytes(problem, plan.row_tiles, plan.keys)
    if kernel.max_dynamic_shared_size_bytes < size:
        kernel.max_dynamic_shared_size_bytes = size
    blocks = _fused_plan.count(problem, plan).blocks * problem.batch * problem.heads
    kernel((blocks,), (WARPS * 32,), (_record(problem, plan), views.pack()), shared_mem=size)


def kernels(problem: Problem, capability: tuple[int, int] = (9, 0)) -> list[_jit.Kernel]:
    """The kernels that `problem` may need when its arrays are contiguous, whatever its windows."""
    if problem.operation != "forward" or problem.dtype not in ("float16", "bfloat16"):
        return []
    dims = problem.head_dim, problem.value_dim
    if max(dims) > LONGEST:
        return []
    widths = [min(16, 2 * (dim & -dim)) for dim in dims]
    areas = _fused_plan.areas(problem, capability)
    return [_kernel(problem, *area, *widths) for area in areas]


@lru_cache(maxsize=1024)
def _kernel(
    problem: Problem, row_tiles: int, keys: int, key_bytes: int, value_bytes: int
) -> _jit.Kernel:
    """The members of `struct Plan` of cuda/fused_forward.cu."""
    head_dim, value_dim = padded(problem.head_dim), padded(problem.value_dim)
    constants = {
        "kRank": problem.rank,
        "kWarps": WARPS,
        "kRowTiles": row_tiles,
        "kKeys": keys,
        "kHeadDim": head_dim,
        "kValueDim": value_dim,
        "kKeyBytes": key_bytes,
        "kValueBytes": value_bytes,
        "kSharedBytes": _fused_plan.shared_bytes(problem, row_tiles, keys),
    }
    lines = [f"static constexpr int {name} = {value};" for name, value in constants.items()]
    for name, exact in (
        ("kKeyExact", head_dim == problem.head_dim),
        ("kValueExact", value_dim == problem.value_dim),
    ):
        lines.append(f"static constexpr bool {name} = {str(exact).lower()};")
    lines.append(f"using Element = {problem.dtype};")
    lines.append(f"using Bias = {problem.rpb_dtype or 'void'};")
    return _jit.Kernel("fused_forward", "\n".join(lines))


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
