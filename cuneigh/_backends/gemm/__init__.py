"""Neighborhood attention as batched matrix products: the source paper's first formulation.

Boxes of queries are multiplied with the halos of keys that they see, on cuBLAS; kernels around the
products (`cuda/gemm`) gather boxes and halos, turn dense logits into weights, and sum the gradients
of halos per key in a fixed order. `plan` cuts a problem into tiles, `walk` goes over them, `launch`
holds the operations, `sources` what is compiled into the kernels, and `cublas` calls cuBLAS.

The products are dense, and hidden pairs are zeros in them: a non-finite *value* may reach queries
whose halo held it though their window did not (0 * NaN is NaN), and so may, in gradients, any other
non-finite operand. In a forward a non-finite key reaches only the queries whose window holds it.

float32 is multiplied in float32. `CUNEIGH_ALLOW_TF32=1` in the environment allows cuBLAS to round
the factors to TF32, about 2.5 times as fast. A call walks over its tiles in chunks that fit in
`CUNEIGH_WORKSPACE_BYTES` of workspace (512 MiB by default). Where the tiles of one key head are
more than that, half-precision gradients take the float32 sums of that head on top.
"""

from __future__ import annotations

from cuneigh._backends.gemm.launch import (
    av,
    av_backward,
    backward,
    forward,
    jvp,
    qk,
    qk_backward,
)
from cuneigh._backends.gemm.plan import (
    NAME,
    RATES,
    model,
    plan_of,
    predicted_ms,
    workspace_limit,
)
from cuneigh._backends.gemm.sources import kernels
from cuneigh._device import Device
from cuneigh._gpu import kept
from cuneigh._gpu.ordinary import extraordinary
from cuneigh._gpu.requirements import no_gpu
from cuneigh._problem import Problem
from cuneigh._window import CONTRACT

__all__ = [
    "NAME",
    "RATES",
    "RELIES_ON",
    "SETTINGS",
    "av",
    "av_backward",
    "backward",
    "forward",
    "jvp",
    "kernels",
    "model",
    "predicted_ms",
    "qk",
    "qk_backward",
    "unsupported",
]

SETTINGS = ("CUNEIGH_WORKSPACE_BYTES", "CUNEIGH_ALLOW_TF32", kept.SETTING)
RELIES_ON = CONTRACT


def unsupported(problem: Problem, device: Device, arrays: object = None) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    reason = no_gpu(device) or extraordinary(problem)
    if problem.operation == "hvp":
        reason = reason or "computes no derivatives of second order"
    if reason is not None or problem.is_empty:
        return reason
    limit = workspace_limit()
    plan = plan_of(problem, device, contiguous=True)
    if plan.chunk_bytes > limit:
        return (
            f"needs {plan.chunk_bytes} bytes of workspace for one tile, but may take {limit}; "
            "CUNEIGH_WORKSPACE_BYTES raises that"
        )
    return None
