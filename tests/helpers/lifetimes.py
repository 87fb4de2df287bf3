"""Memory that is freed as early as it may be, for compute-sanitizer: ``python lifetimes.py``.

Every framework gives memory back to the driver at once, so that a kernel that is launched on some
of it after its owner is gone is an error that memcheck sees. Arguments are dropped as soon as a
call has returned, or held by nobody else while it runs; views outlive the arrays that they were
made of; each result is compared with that of the CPU backend.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"

import cupy
import jax
import numpy as np
import torch

import cuneigh

SHAPE = (2, 9, 7, 2, 16)
WINDOW = 3
ROUNDS = 3

Arrays = list[np.ndarray]
Make = Callable[[np.ndarray], Any]


def whole(make: Make, read: Callable[[Any], np.ndarray], given: Arrays, backend: str) -> Arrays:
    """A forward and a backward, of which nothing is kept but the numbers."""
    operands = [make(array) for array in given]
    output, lse = cuneigh.na2d(*operands, WINDOW, return_lse=True, backend=backend)
    gradients = cuneigh.na2d_backward(
        output, *operands, output, lse, WINDOW, grad_lse=lse, backend=backend
    )[:3]
    del operands
    return [read(array) for array in (output, lse, *gradients)]


def temporaries(make: Make, read: Callable[[Any], np.ndarray], given: Arrays, backend: str) -> Any:
    """Arguments that nobody holds while the call runs."""
    return read(cuneigh.na2d(*(make(array) for array in given), WINDOW, backend=backend))


def differentiated(given: Arrays, backend: str) -> Arrays:
    """PyTorch keeps what the backward needs, and nothing else does."""
    leaves = [torch.from_numpy(array).cuda().requires_grad_() for array in given]
    output = cuneigh.na2d(*(2 * leaf for leaf in leaves), WINDOW, backend=backend)
    gradients = torch.autograd.grad((output**2).sum(), leaves)
    del leaves
    return [array.detach().cpu().numpy() for array in (output, *gradients)]


def exported(array: np.ndarray) -> Any:
    """A tensor on the memory of a CuPy array that only DLPack still holds."""
    return torch.from_dlpack(cupy.asarray(array))


def imported(array: np.ndarray) -> Any:
    """A CuPy array on the memory of a tensor that only DLPack still holds."""
    return cupy.from_dlpack(torch.from_numpy(array).cuda())


class Spoken:
    """A tensor that is known by DLPack alone, and held by nobody else."""

    def __init__(self, array: np.ndarray) -> None:
        self._tensor = torch.from_numpy(array).cuda()

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()

    def __dlpack__(self, **asked: Any) -> Any:
        return self._tensor.__dlpack__(**asked)


def uncopied(array: np.ndarray) -> Any:
    """A view whose head vectors are not contiguous, which a backend has to copy."""
    return cupy.asarray(np.ascontiguousarray(array.swapaxes(-1, -2))).swapaxes(-1, -2)


FRAMEWORKS: dict[str, tuple[Make, Callable[[Any], np.ndarray]]] = {
    "CuPy": (cupy.asarray, cupy.asnumpy),
    "CuPy, strided": (uncopied, cupy.asnumpy),
    "CuPy on a tensor": (imported, cupy.asnumpy),
    "PyTorch": (lambda array: torch.from_numpy(array).cuda(), lambda tensor: tensor.cpu().numpy()),
    "PyTorch on CuPy": (exported, lambda tensor: tensor.cpu().numpy()),
    "DLPack": (Spoken, cupy.asnumpy),
    "JAX": (jax.device_put, np.asarray),
}


def checks(dtype: str) -> Iterator[str]:
    rng = np.random.default_rng(0)
    step = {"float16": 2.0**-8, "float32": 2.0**-12}[dtype]

    def agree(got: Any, wanted: Any) -> None:
        for one, other in zip(got, wanted, strict=True):
            other = other.astype(np.float64)
            np.testing.assert_allclose(one, other, rtol=step, atol=step * np.abs(other).max())

    for _ in range(ROUNDS):
        given = [rng.standard_normal(SHAPE).astype(dtype) for _ in range(3)]
        wanted = whole(lambda array: array, lambda array: array, given, "cpu")
        for backend in ("naive", "gemm", "fused"):
            for name, framework in FRAMEWORKS.items():
                agree(whole(*framework, given, backend), wanted)
                agree([temporaries(*framework, given, backend)], wanted[:1])
                yield name
            leaves = [torch.from_numpy(array).requires_grad_() for array in given]
            output = cuneigh.na2d(*(2 * leaf for leaf in leaves), WINDOW, backend="cpu")
            gradients = torch.autograd.grad((output**2).sum(), leaves)
            on_cpu = [array.detach().numpy() for array in (output, *gradients)]
            agree(differentiated(given, backend), on_cpu)
            yield "PyTorch, differentiated"
            gc.collect()


def main() -> None:
    cupy.cuda.set_allocator(None)
    count = sum(1 for dtype in ("float16", "float32") for _ in checks(dtype))
    print(f"{count} checks: every result agrees with that of the CPU backend")


if __name__ == "__main__":
    main()
