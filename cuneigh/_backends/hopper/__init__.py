"""Online softmax and its gradients on Hopper's tensor cores, fed by TMA: long windows on sm_90.

Blocks of warpgroups with different roles: producers load boxes of tokens straight from the arrays'
own layout and make masks, consumers multiply by `wgmma` (cuda/hopper/forward.cu). The
kernels multiply dense boxes of queries and keys, so that a non-finite *value* may reach queries
whose box of keys held it though their window did not (0 * NaN is NaN). In a forward a non-finite
key reaches only the queries whose window holds it.

The backward takes two kernels, one for dQ and one for dK and dV, and keeps nothing in memory
between them but lse and delta. Along a single axis, for head dims from 72 on, one kernel computes
all gradients with five products instead of seven: its blocks add to sums of dQ in a fixed order.
The sums take 4 bytes for each element of the query, as long as that is a small part of the device's
memory. Neither way does a result depend on the order in which blocks run.

Parts of a layout and cut windows are computed like whole ones, if none crosses the seam of a ring.

Boxes of which a key mask hides all keys are passed over. Hidden keys and values in other boxes are
set to zero once they were loaded, so that no number that they hold counts (cuda/hopper/hidden.cuh).
"""

from __future__ import annotations

from collections.abc import Mapping

from cuneigh._backends.hopper import launch
from cuneigh._backends.hopper.choice import NAME, RATES, model, plans, predicted_ms
from cuneigh._backends.hopper.launch import backward, forward
from cuneigh._backends.hopper.plan import ways
from cuneigh._backends.hopper.tensor_maps import unreadable
from cuneigh._device import Device
from cuneigh._gpu import kept
from cuneigh._gpu.arrays import Array, Pointer, contiguous
from cuneigh._gpu.records import has_parts
from cuneigh._gpu.requirements import no_gpu
from cuneigh._jit import Kernel
from cuneigh._problem import Problem
from cuneigh._window import CONTRACT

__all__ = [
    "NAME",
    "RATES",
    "RELIES_ON",
    "SETTINGS",
    "backward",
    "forward",
    "kernels",
    "model",
    "plans",
    "predicted_ms",
    "unsupported",
]

SETTINGS = (kept.SETTING,)
RELIES_ON = CONTRACT
CAPABILITY = (9, 0)
DTYPES = ("float16", "bfloat16")
LONGEST = {"forward": 256, "backward": 128}
"""The longest head vectors that the kernels of an operation take."""
MOST_DILATION = 8
"""TMA loads every first to eighth token along an axis (an element stride of a tensor map)."""
SMALLEST_SCALE, LARGEST_SCALE = 1e-30, 1e30
"""Scales between these are neither 0 nor infinite in float32: the logit of a hidden pair, -inf,
stays -inf when it is multiplied by one."""
MOST_ROWS = (1 << 31) - (1 << 16)
"""Tokens of all heads and batch entries: kernels number tiles of them by 32 bits."""
READ = ("query", "key", "value", "grad_output", "additional_keys", "additional_values")
"""The arguments that TMA reads; kernels read the others by themselves."""


def unsupported(
    problem: Problem, device: Device, arrays: Mapping[str, Array | None] | None = None
) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    if reason := no_gpu(device):
        return reason
    longest = LONGEST.get(problem.operation)
    if longest is None:
        return f"computes attention and its gradients, not {problem.operation} alone"
    if device.capability != CAPABILITY:
        return f"needs compute capability 9.0, but {device.name} has {device.arch}"
    if problem.dtype not in DTYPES:
        return f"computes in {', '.join(DTYPES)}, not in {problem.dtype}"
    for name in ("head_dim", "value_dim"):
        dim = getattr(problem, name)
        if dim > longest or dim % 8:
            return f"takes head dimensions up to {longest} in steps of 8, not {name}={dim}"
    if problem.rpb_dtype:
        return "does not take rpb"
    if RELIES_ON not in problem.promises:
        return "does not go across the seam of a ring"
    if problem.operation == "backward" and problem.rank > 1 and has_parts(problem):
        for axis, along in enumerate(problem.axes):  # registers are few
            if along.dilation > 1:
                return f"takes no dilation for gradients of parts along several axes, as on {axis}"
    if 0 in problem.key_tokens and not problem.is_empty:
        return "needs at least one key beside additional ones"
    for axis, along in enumerate(problem.axes):
        if along.dilation > MOST_DILATION:
            return f"takes dilations up to {MOST_DILATION}, not {along.dilation} on axis {axis}"
    if problem.scale and not SMALLEST_SCALE < abs(problem.scale) < LARGEST_SCALE:
        return f"takes scales from {SMALLEST_SCALE} to {LARGEST_SCALE}, not {problem.scale}"
    rows = max(pass_.rows(problem) for way in ways(problem) for pass_ in way)
    if rows > MOST_ROWS:
        return f"takes up to {MOST_ROWS} head vectors of queries or of keys, not {rows}"
    for name, array in (_contiguous(problem) if arrays is None else arrays).items():
        if array is None or not array.size:
            continue
        if name in READ:
            rank = 1 if name.startswith("additional") else problem.rank
            if reason := unreadable(name, array, rank):
                return reason
        elif name.startswith("result_") and name != "result_lse" and array.misalignment:
            return f"needs {name.removeprefix('result_')} of the results at a multiple of 16 bytes"
    return None


def _contiguous(problem: Problem) -> dict[str, Array]:
    """The arguments of a call that says nothing of their layout."""
    specs = problem.specs._asdict()
    if problem.operation == "backward":
        specs["grad_output"] = problem.output
    return {
        name: Array(Pointer(0), spec.shape, spec.dtype, contiguous(spec.shape), 0)
        for name, spec in specs.items()
        if spec is not None
    }


def kernels(problem: Problem, device: Device) -> list[Kernel]:
    """The kernels that a supported `problem` needs, whatever its sizes, windows and strides."""
    return [] if unsupported(problem, device) is not None else launch.kernels(problem, device)
