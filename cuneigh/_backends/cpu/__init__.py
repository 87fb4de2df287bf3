"""The CPU backend: dense products of tiles of queries with their halos, on NumPy's BLAS.

Each token axis is cut into tiles of queries of one dilation group. The keys that a tile sees lie in
a box, its halo; one batch of matrix products takes many tiles and heads at once, the logits of
hidden pairs become -inf, and a second product sums the values. Nothing of size queries times keys
is ever in memory: every thread works on about half a million logits at a time.

`_tiles` cuts, `_rows` reads and writes tokens whatever their strides, `_products` holds what boxes
have in common, `_fused` and `_unfused` the operations, `_gradients` what boxes add up, `_threads`
how they run in parallel. Half-precision arrays are computed in float32, float64 in float64. Results
do not depend on the number of threads. What is not finite reaches only the queries that see it.
"""

from __future__ import annotations

from cuneigh._backends.cpu._fused import backward, forward
from cuneigh._backends.cpu._unfused import av, av_backward, qk, qk_backward
from cuneigh._device import Device
from cuneigh._problem import Problem

__all__ = ["NAME", "av", "av_backward", "backward", "forward", "qk", "qk_backward", "unsupported"]

NAME = "cpu"


def unsupported(problem: Problem, device: Device) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    if device.kind != "cpu":
        return "its arrays are on a CUDA device"
    return None
