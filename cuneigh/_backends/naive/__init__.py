"""The definition in CUDA: one group of lanes for each query or key, all parameters, all dtypes.

An honest baseline: coalesced and vectorized, deterministic, and nothing of the size of the logits
in memory unless the operation's own result is. A non-finite value reaches only the queries whose
window holds it.
"""

from __future__ import annotations

from cuneigh._backends.naive import plan
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
from cuneigh._device import Device
from cuneigh._gpu.requirements import no_gpu
from cuneigh._problem import Problem
from cuneigh._window import Promise

__all__ = [
    "NAME",
    "RELIES_ON",
    "SETTINGS",
    "av",
    "av_backward",
    "backward",
    "forward",
    "hvp",
    "jvp",
    "kernels",
    "predicted_ms",
    "qk",
    "qk_backward",
    "unsupported",
]

NAME = "naive"
SETTINGS = ()
RELIES_ON = Promise.ONE_RANGE


def unsupported(problem: Problem, device: Device, arrays: object = None) -> str | None:
    """Why this backend cannot run `problem` on `device`; None when it can."""
    return no_gpu(device)


def predicted_ms(problem: Problem, device: Device) -> float:
    """How long a call is expected to take on an H200, in milliseconds."""
    return plan.predicted(problem)
