"""The definition in CUDA: one group of lanes for each query or key, all parameters, all dtypes.

An honest baseline: coalesced and vectorized, deterministic, and nothing of the size of the logits
in memory unless the operation's own result is. A non-finite value reaches only the queries whose
window holds it.
"""

from __future__ import annotations

from cuneigh._backends.naive.launch import (
    av,
    av_backward,
    backward,
    forward,
    hvp,
    jvp,
    kernels,
    qk,
    qk_backward,
)
from cuneigh._backends.naive.plan import NAME, RATES, model, predicted_ms
from cuneigh._device import Device
from cuneigh._gpu import kept
from cuneigh._gpu.requirements import no_gpu
from cuneigh._problem import Problem
from cuneigh._window import Promise

__all__ = [
    "NAME",
    "RATES",
    "RELIES_ON",
    "SETTINGS",
    "av",
    "av_backward",
    "backward",
    "forward",
    "hvp",
    "jvp",
    "kernels",
    "model",
    "predicted_ms",
    "qk",
    "qk_backward",
    "unsupported",
]

SETTINGS = (kept.SETTING,)
RELIES_ON = Promise.ONE_RANGE


def unsupported(problem: Problem, device: Device, arrays: object = None) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    return no_gpu(device)
