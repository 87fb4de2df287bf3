"""The arrays of a problem to measure: normally distributed numbers, on a GPU or on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh._device import CPU, Device, cuda
from cuneigh._problem import Operands, Problem, Spec

PART = 1 << 26
"""Elements that are made at a time, so that the float32 numbers behind them take little memory."""


def here() -> tuple[Any, Device]:
    """CuPy and its current GPU; NumPy and the CPU where there is none."""
    try:
        import cupy
    except ImportError:
        return np, CPU
    if not cupy.cuda.is_available():
        return np, CPU
    return cupy, cuda(cupy.cuda.Device().id)


def normal(xp: Any, shape: Sequence[int], dtype: str, seed: int) -> Any:
    """Normally distributed numbers of `dtype`, a function of shape and `seed`.

    Those of bfloat16 are float32 ones truncated.
    """
    rng = xp.random.default_rng(seed)
    if dtype != "bfloat16":
        drawn = np.float64 if dtype == "float64" else np.float32
        return rng.standard_normal(tuple(shape), dtype=drawn).astype(dtype, copy=False)
    import ml_dtypes

    bits = xp.empty(tuple(shape), np.uint16)
    flat = bits.reshape(-1)
    for start in range(0, flat.size, PART):
        part = flat[start : start + PART]
        numbers = rng.standard_normal(part.size, dtype=np.float32)
        part[...] = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return bits.view(ml_dtypes.bfloat16)


def operands_of(xp: Any, problem: Problem) -> Operands:
    """Every operand of a problem; None for those that it does not take."""
    return Operands(
        *(
            None if spec is None else normal(xp, spec.shape, spec.dtype, seed)
            for seed, spec in enumerate(problem.specs)
        )
    )


def grad_output_of(xp: Any, problem: Problem) -> Any:
    """A gradient of the output."""
    spec: Spec = problem.output
    return normal(xp, spec.shape, spec.dtype, len(Operands._fields))


def float64(array: Any) -> npt.NDArray[np.float64]:
    """A few numbers of any array library, on the host."""
    if hasattr(array, "detach"):  # PyTorch's, which has no NumPy of bfloat16
        array = array.detach().double().cpu().numpy()
    elif hasattr(array, "get"):  # CuPy's
        array = array.get()
    return np.asarray(array).astype(np.float64)
