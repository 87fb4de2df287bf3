"""Online softmax on tensor cores: nothing of the size of the logits in memory; sm_75 and later.

The kernels multiply dense boxes of queries and keys, so that a non-finite *value* may reach queries
whose box of keys held it though their window did not (0 * NaN is NaN). A non-finite key reaches
only the queries whose window holds it.

float32 is multiplied as three products of TF32 numbers, which keeps its precision, or by the FMA
units where there is no TF32. An infinite element of a query or key then makes a logit NaN.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from cuneigh import _jit, _problem
from cuneigh._backends.fused import plan as _fused_plan
from cuneigh._backends.fused.plan import (
    Area,
    FusedPlan,
    Role,
    make_plan,
    padded,
    roles,
    rows_are_keys,
)
from cuneigh._backends.fused.small import launch as _halo
from cuneigh._backends.fused.small import plan as _halo_plan
from cuneigh._device import Device
from cuneigh._gpu import sums
from cuneigh._gpu.announce import announce
from cuneigh._gpu.program import Program
from cuneigh._gpu.records import AXIS, axis_record
from cuneigh._gpu.requirements import no_gpu
from cuneigh._gpu.views import Views, load_width, readable
from cuneigh._problem import Operands, Problem

NAME = "fused"
SETTINGS = ()
DTYPES = ("float16", "bfloat16", "float32")
LONGEST = 256
"""Head dimensions that the kernels take."""


def unsupported(problem: Problem, device: Device) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    if reason := no_gpu(device):
        return reason
    if problem.operation not in ("forward", "backward"):
        return f"computes attention and its gradients, not {problem.operation} alone"
    if device.capability < (7, 5):
        return f"needs compute capability 7.5, but {device.name} has {device.arch}"
    if problem.dtype not in DTYPES:
        return f"computes in {', '.join(DTYPES)}, not in {problem.dtype}"
    if problem.dtype == "bfloat16" and device.capability < (8, 0):
        return f"needs compute capability 8.0 for bfloat16, but {device.name} has {device.arch}"
    for name in ("head_dim", "value_dim"):
        if getattr(problem, name) > LONGEST:
            return f"takes head dimensions up to {LONGEST}, not {name}={getattr(problem, name)}"
    if problem.is_empty:
        return None
    if not all(_fused_plan.areas(problem, device, role) for role in roles(problem)):
        return f"needs more shared memory than the {device.shared_memory} bytes of {device.name}"
    return None


CYCLES_PER_MS = 132 * 1.755e6
"""Of all multiprocessors of an H200."""
LAUNCH_MS = 0.003


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call with the plans for `device` is expected to take on an H200."""
    milliseconds = 0.0
    for role in roles(problem):
        small = _halo_plan.make_plan(problem, device, role)
        if small is not None:
            cycles = _halo_plan.cost(problem, small, device, role)
        else:
            cycles = _fused_plan.cost(problem, make_plan(problem, device, role), role)
            cycles *= problem.batch * problem.heads
        milliseconds += LAUNCH_MS + cycles / CYCLES_PER_MS
    return milliseconds


def forward(problem: Problem, operands: Operands, output: Any, lse: Any, program: Program) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    vectors = (*operands[:3], output)
    small = _halo.plan(program, problem, "forward", vectors)
    if small is not None:
        announce(NAME, "forward", problem, small)
        arrays = (*((array, "vectors") for array in vectors), (lse, "scalars"))
        _halo.launch(program, problem, "forward", small, arrays)
        return
    key_bytes = load_width((operands.query, operands.key, operands.additional_keys))
    value_bytes = load_width((operands.value, operands.additional_values, output))
    views = Views(problem.rank)
    views.vectors(*operands[:3])
    views.additional(operands.additional_keys, operands.additional_values)
    views.bias(operands.rpb)
    views.vectors(output)
    views.scalars(lse)
    _launch(program, problem, "forward", key_bytes, value_bytes, views)


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
    keys = (query, key, operands.additional_keys, gradients.query, gradients.key)
    values = (value, operands.additional_values, grad_output, output, gradients.value)
    key_bytes, value_bytes = load_width(keys), load_width(values)
    statistics = program.allocate((*lse.shape, 2), "float32")

    of_queries, of_keys = (query, grad_output), (key, value)
    for role in roles(problem):
        by_keys = rows_are_keys(role)
        rows, columns = (of_keys, of_queries) if by_keys else (of_queries, of_keys)
        results = (gradients.key, gradients.value) if by_keys else (gradients.query, None)
        vectors = (*rows, *columns, *results, None if by_keys else output)
        small = _halo.plan(program, problem, role, [array for array in vectors if array])
        if small is not None:
            announce(NAME, role, problem, small)
            arrays = [(array, "vectors") for array in vectors]
            arrays.insert(4, (statistics, "pairs"))
            arrays += [(None if by_keys else array, "scalars") for array in (lse, grad_lse)]
            _halo.launch(program, problem, role, small, arrays)
            continue
        if not by_keys:  # those for small windows compute the statistics themselves
            sums.delta(problem, grad_output, output, lse, grad_lse, statistics, program)
        views = Views(problem.rank)
        views.vectors(*rows, *columns)
        if by_keys:  # additional keys are rows of no box
            views.additional(None, None)
        else:
            views.additional(operands.additional_keys, operands.additional_values)
        views.bias(operands.rpb)
        views.pairs(statistics)
        views.vectors(*results)
        _launch(program, problem, role, key_bytes, value_bytes, views)

    if problem.additional or operands.rpb is not None:
        # Sums over all queries, which need no tensor cores
        sums.attention_gradients(
            problem, operands, grad_output, lse, statistics.component(1), gradients, program
        )


def kernels(problem: Problem, device: Device) -> list[_jit.Kernel]:
    """The kernels that `problem` may need when its arrays are contiguous, whatever its windows."""
    if unsupported(problem, device) is not None:
        return []
    size = _problem.DTYPES[problem.dtype]
    widths = [min(16, size * (dim & -dim)) for dim in (problem.head_dim, problem.value_dim)]
    needed = [
        _kernel(problem, device.capability, role, area, several, *widths)
        for role in roles(problem)
        for area in _fused_plan.areas(problem, device, role)
        for several in {_fused_plan.several(problem, role, part) for part in (1, 2)}
    ]
    if device.capability >= (8, 0):
        needed += [
            kernel for role in roles(problem) for kernel in _halo.kernels(problem, device, role)
        ]
    if problem.operation == "backward":
        needed += [sums.delta_kernel(problem), *sums.kernels(problem)]
    return needed


def _launch(
    program: Program,
    problem: Problem,
    role: Role,
    key_bytes: int,
    value_bytes: int,
    views: Views,
) -> None:
    device = program.device
    chosen = make_plan(problem, device, role)
    announce(NAME, role, problem, chosen)
    kernel = _kernel(
        problem,
        device.capability,
        role,
        chosen.area,
        _fused_plan.several(problem, role, chosen.part),
        key_bytes,
        value_bytes,
    )
    heads = problem.kv_heads if rows_are_keys(role) else problem.heads
    parts = -(-problem.batch * heads // chosen.part)
    blocks = _fused_plan.count(problem, chosen, role).blocks * parts
    program.launch(
        kernel,
        (blocks, 1),
        chosen.area.warps * 32,
        _record(problem, chosen, role),
        views.words,
        shared_bytes=_fused_plan.shared_bytes(problem, chosen.area, role),
    )


@lru_cache(maxsize=1024)
def _kernel(
    problem: Problem,
    capability: tuple[int, int],
    role: Role,
    area: Area,
    several: bool,
    key_bytes: int,
    value_bytes: int,
) -> _jit.Kernel:
    """The kernel of a role, with the plan that cuda/fused/forward.cu describes."""
    head_dim, value_dim = padded(problem.head_dim), padded(problem.value_dim)
    constants = {
        "kRank": problem.rank,
        "kWarps": area.warps,
        "kRowTiles": area.row_tiles,
        "kBlocks": _fused_plan.blocks_per_multiprocessor(problem, capability, area, role),
        "kColumns": area.columns,
        "kHeadDim": head_dim,
        "kValueDim": value_dim,
        "kKeyBytes": key_bytes,
        "kValueBytes": value_bytes,
        "kSharedBytes": _fused_plan.shared_bytes(problem, area, role),
    }
    flags = {
        "kKeyExact": head_dim == problem.head_dim,
        "kValueExact": value_dim == problem.value_dim,
        "kRowsAreKeys": rows_are_keys(role),
        "kAdditional": _fused_plan.has_additional(problem, role),
    }
    if role == "forward":
        flags["kSeveral"] = several
    else:
        flags |= {
            "kGradKey": role != "value",
            "kGradValue": role in ("value", "key_value"),
        }
    lines = [f"static constexpr int {name} = {value};" for name, value in constants.items()]
    lines += [f"static constexpr bool {name} = {str(on).lower()};" for name, on in flags.items()]
    lines.append(f"using Element = {problem.dtype};")
    lines.append(f"using Bias = {problem.rpb_dtype or 'void'};")
    name = "fused/forward" if role == "forward" else "fused/backward"
    return _jit.Kernel(name, "\n".join(lines))


@lru_cache(maxsize=1024)
def _record(problem: Problem, chosen: FusedPlan, role: Role) -> np.ndarray[Any, Any]:
    """`FusedProblem` of cuda/fused/fused.cuh."""
    rank = problem.rank
    record = np.zeros(
        1,
        np.dtype(
            [
                ("axes", AXIS, (rank,)),
                *((name, "i4", (rank,)) for name in ("warp_box", "warps", "column_box", "boxes")),
                *((name, "i4") for name in ("batch", "heads", "group_size", "part")),
                *((name, "i4") for name in ("head_dim", "value_dim", "additional", "sign")),
                ("scale", "f4"),
                ("gradient_scale", "f4"),
            ],
            align=True,
        ),
    )
    record["axes"] = [axis_record(axis) for axis in problem.axes]
    record["warp_box"], record["warps"] = chosen.warp_box, chosen.warps
    record["column_box"] = chosen.column_box
    record["boxes"] = [
        _fused_plan.count_axis(axis, *sizes, rows_are_keys(role)).blocks
        for axis, *sizes in zip(
            problem.axes, chosen.warp_box, chosen.warps, chosen.column_box, strict=True
        )
    ]
    for name in ("batch", "heads", "group_size", "head_dim", "value_dim"):
        record[name] = getattr(problem, name)
    record["part"] = chosen.part
    record["additional"] = 0 if rows_are_keys(role) else problem.additional or 0
    record["sign"] = np.sign(problem.scale)
    record["scale"] = (abs(problem.scale) or 1.0) * math.log2(math.e)
    record["gradient_scale"] = problem.scale
    return record
