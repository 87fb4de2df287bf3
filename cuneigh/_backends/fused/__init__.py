"""Online softmax on tensor cores: nothing of the size of the logits in memory; sm_75 and later.

The kernels multiply dense boxes of queries and keys, so that a non-finite *value* may reach queries
whose box of keys held it though their window did not (0 * NaN is NaN). A non-finite key reaches
only the queries whose window holds it.

float32 is multiplied as three products of TF32 numbers, which keeps its precision, or by the FMA
units where there is no TF32. An infinite element of a query or key then makes a logit NaN.

A jvp of values of more than 128 elements, 64 in float32, computes the logits once for each as many
of them.

There are kernels for windows of any size (`plan`, `launch`), kernels for small windows of half
types (`small`), which compute tangents where a block's keys lie in shared memory at once, and all
gradients in one launch where a block holds a whole dilation group (`small.whole`), and kernels for
few queries of half types along one axis (`split`), which neither take key masks nor the seam of a
ring. `choice` compares them. With small windows the last bits of the output depend on whether lse
is asked for, as derivatives do: with lse the weights are summed before they are rounded, without it
after.

Of hidden keys neither key nor value is read, and boxes that hold no others are left out.
"""

from __future__ import annotations

from cuneigh._backends.fused import launch, passes, plan
from cuneigh._backends.fused.choice import NAME, RATES, model, plans, predicted_ms
from cuneigh._backends.fused.launch import backward, forward
from cuneigh._backends.fused.tangents import hvp, jvp
from cuneigh._device import Device
from cuneigh._gpu import kept
from cuneigh._gpu.requirements import no_gpu
from cuneigh._jit import Kernel
from cuneigh._problem import Problem
from cuneigh._window import Promise

__all__ = [
    "NAME",
    "RATES",
    "RELIES_ON",
    "SETTINGS",
    "backward",
    "forward",
    "hvp",
    "jvp",
    "kernels",
    "model",
    "plans",
    "predicted_ms",
    "unsupported",
]

SETTINGS = (kept.SETTING,)
RELIES_ON = Promise.ONE_RANGE | Promise.INCREASING
DTYPES = ("float16", "bfloat16", "float32")
LONGEST = 256
"""Head dimensions that the kernels take."""
LONGEST_OF_HVP = 128
"""Those that the kernels of an hvp take, which hold twice as many vectors."""


def unsupported(problem: Problem, device: Device, arrays: object = None) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    if reason := no_gpu(device):
        return reason
    if problem.operation not in ("forward", "backward", "jvp", "hvp"):
        return f"computes attention and its derivatives, not {problem.operation} alone"
    if device.capability < (7, 5):
        return f"needs compute capability 7.5, but {device.name} has {device.arch}"
    if problem.dtype not in DTYPES:
        return f"computes in {', '.join(DTYPES)}, not in {problem.dtype}"
    if problem.dtype == "bfloat16" and device.capability < (8, 0):
        return f"needs compute capability 8.0 for bfloat16, but {device.name} has {device.arch}"
    longest = LONGEST_OF_HVP if problem.operation == "hvp" else LONGEST
    for name in ("head_dim", "value_dim"):
        if getattr(problem, name) > longest:
            return f"takes head dimensions up to {longest}, not {name}={getattr(problem, name)}"
    if problem.is_empty:
        return None
    if 0 in problem.key_tokens:
        return "needs at least one key beside additional ones"
    parts = [part for _, part in passes.parts(problem)]
    if not all(plan.areas(part, device, pass_) for part in parts for pass_ in passes.passes(part)):
        return f"needs more shared memory than the {device.shared_memory} bytes of {device.name}"
    return None


def kernels(problem: Problem, device: Device) -> list[Kernel]:
    """The kernels that `problem` may need when its arrays are contiguous, whatever its windows."""
    return [] if unsupported(problem, device) is not None else launch.kernels(problem, device)
