"""Online softmax and its gradients on Hopper's tensor cores, fed by TMA: long windows on sm_90.

Blocks of warpgroups with different roles: producers load boxes of tokens straight from the arrays'
own layout and make masks, consumers multiply by `wgmma` (cuda/hopper/forward.cu). The
kernels multiply dense boxes of queries and keys, so that a non-finite *value* may reach queries
whose box of keys held it though their window did not (0 * NaN is NaN). In a forward a non-finite
key reaches only the queries whose window holds it; in a backward it may reach neighbors of theirs.

The backward takes two kernels, one for dQ and one for dK and dV, and keeps nothing in memory
between them but lse and delta. If vectors have more than 128 elements, two warpgroups share a box
of keys, of which one makes dV and the other dK (cuda/hopper/dkv_long.cu). Of others one kernel
computes all gradients with five products instead of seven where that is faster: for head dims from
72 on, and for those from 40 to 64 if value dims are at most 64. Its blocks add to sums of dQ, which
take 256 bytes for each query and head, 512 for head dims over 64, as long as that is a small part
of the device's memory. Neither way does a result depend on the order in which blocks run: the sums
are integers, in units of about 2^-30 of what dQ of a query can be at most (cuda/sums/units.cuh).
Rounding to units matters where that is far more than dQ is: where some keys and values that hardly
count are hundreds of times as large as the others. Where rows of a kernel are keys, bfloat16 rounds
dP - delta before it is multiplied by P and rounded again: root mean square errors of gradients are
then some 1.15 times as large as with one rounding.

The forward of up to 64 queries, of which two heads share a key head, has a kernel for itself
(cuda/hopper/chunk.cu). Where tiles are few, the blocks of a cluster share the keys of one: each
rounds its output to the element type, as a result, before they are joined.

A jvp takes one kernel with six products, whose arrays come with their tangents
(cuda/hopper/jvp.cu): output, lse and their tangents in one pass.

Parts of a layout and cut windows are computed like whole ones, if none crosses the seam of a ring.

What a key mask says of every box of keys is found once for all heads (cuda/hopper/seen.cu), in 16
bytes each. Boxes of which it hides all keys are passed over. Hidden keys and values in other boxes
are set to zero once they were loaded, so that no number that they hold counts
(cuda/hopper/hidden.cuh).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cuneigh._backends.hopper import launch
from cuneigh._backends.hopper.choice import NAME, RATES, model, plans, predicted_ms
from cuneigh._backends.hopper.launch import MOST_WARPGROUPS, backward, forward, jvp
from cuneigh._backends.hopper.plan import ROWS, ways
from cuneigh._backends.hopper.tensor_maps import differently_folded, unreadable
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
    "jvp",
    "kernels",
    "leaves_to_others",
    "model",
    "plans",
    "predicted_ms",
    "unsupported",
]

SETTINGS = (kept.SETTING,)
RELIES_ON = CONTRACT
CAPABILITY = (9, 0)
DTYPES = ("float16", "bfloat16")
LONGEST = {"forward": 256, "backward": 256, "jvp": 128}
"""The longest head vectors that the kernels of an operation take."""
MOST_DILATION = 8
"""TMA loads every first to eighth token along an axis (an element stride of a tensor map)."""
SMALLEST_SCALE, LARGEST_SCALE = 1e-30, 1e30
"""Scales between these are neither 0 nor infinite in float32: the logit of a hidden pair, -inf,
stays -inf when it is multiplied by one."""
MOST_ROWS = (1 << 31) - (1 << 16)
"""Tokens of all heads and batch entries: kernels number tiles of them by 32 bits."""
MOST_MASKED_PAIRS = 1 << 41
"""Pairs of a query and a key that its tile may walk over: with a key mask, kernels number pairs of
a tile and a box of keys, which have 64 and 32 tokens at least, by 31 bits."""
WITH_TANGENTS = ("query", "key", "value", "additional_keys", "additional_values")
READ = (*WITH_TANGENTS, "grad_output", *(f"tangent_{name}" for name in WITH_TANGENTS))
"""The arguments that TMA reads; kernels read the others by themselves."""


def unsupported(
    problem: Problem, device: Device, arrays: Mapping[str, Array | None] | None = None
) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    if reason := no_gpu(device):
        return reason
    longest = LONGEST.get(problem.operation)
    if longest is None:
        return f"computes attention, its gradients and its tangents, not {problem.operation}"
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
    if reason := leaves_to_others(problem):
        return reason
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
    if problem.has_key_mask and (pairs := _walked_pairs(problem)) > MOST_MASKED_PAIRS:
        return f"takes a key mask over up to {MOST_MASKED_PAIRS} pairs of tokens, not {pairs}"
    for name, array in (_contiguous(problem) if arrays is None else arrays).items():
        if array is None or not array.size:
            continue
        if name in READ:
            rank = 1 if "additional" in name else problem.rank
            if reason := unreadable(name, array, rank):
                return reason
        elif name.startswith("result_") and not name.endswith("lse") and array.misalignment:
            return f"needs {name.removeprefix('result_')} of the results at a multiple of 16 bytes"
    if arrays is not None and problem.rank == 3:
        for name in WITH_TANGENTS[:3]:
            array, tangent = arrays.get(name), arrays.get(f"tangent_{name}")
            if array is not None and tangent is not None and differently_folded(array, tangent):
                return f"needs tangent_{name} with heads that lie in memory as those of {name}"
    return None


def leaves_to_others(problem: Problem) -> str | None:
    """Why it has no kernel for a jvp whose forward it computes, on any device; None if it has."""
    if problem.operation != "jvp":
        return None
    if problem.has_key_mask:
        return "takes no key mask for tangents"
    if has_parts(problem):
        return "takes no parts of a layout for tangents"
    longest = max(problem.head_dim, problem.value_dim)
    if longest > LONGEST["jvp"]:
        return f"takes head dimensions up to {LONGEST['jvp']} for tangents, not {longest}"
    return None


def _walked_pairs(problem: Problem) -> int:
    """No fewer than the pairs of a query and a key that its tile walks over, of one head."""
    pairs = problem.batch * math.prod(problem.tokens)
    for axis in problem.axes:
        pairs *= min(axis.key_length, axis.kernel_size + axis.stride + MOST_WARPGROUPS * ROWS)
    return pairs


def _contiguous(problem: Problem) -> dict[str, Array]:
    """The arguments of a call that says nothing of their layout."""
    specs = problem.specs._asdict()
    if problem.operation == "backward":
        specs["grad_output"] = problem.output
    if problem.operation == "jvp":
        specs |= {f"tangent_{name}": specs[name] for name in WITH_TANGENTS}
    return {
        name: Array(Pointer(0), spec.shape, spec.dtype, contiguous(spec.shape), 0)
        for name, spec in specs.items()
        if spec is not None
    }


def kernels(problem: Problem, device: Device) -> list[Kernel]:
    """The kernels that a supported `problem` needs, whatever its sizes, windows and strides."""
    return [] if unsupported(problem, device) is not None else launch.kernels(problem, device)
