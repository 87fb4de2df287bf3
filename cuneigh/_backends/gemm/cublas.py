"""cuBLAS's batched matrix products, called where CuPy does not lead to them.

CuPy binds the strided batch but refuses to call it while a stream is captured into a CUDA graph,
and does not bind the batch of addresses at all. The library and the handle are those of CuPy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from cuneigh._device import installation
from cuneigh._gpu.arrays import Pointer

CUDA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
"""cudaDataType_t by dtype."""

FLOAT32 = 68
"""CUBLAS_COMPUTE_32F: float32 sums of products of half-precision numbers."""
FLOAT32_EXACT = 69
"""CUBLAS_COMPUTE_32F_PEDANTIC: float32 throughout, whatever the handle's math mode says."""
FLOAT32_TF32 = 77
"""CUBLAS_COMPUTE_32F_FAST_TF32: factors are rounded to TF32, sums are float32."""
FLOAT64 = 70
"""CUBLAS_COMPUTE_64F."""

DEFAULT_ALGORITHM = -1


class Matrices(NamedTuple):
    """A batch of matrices [rows, columns] whose rows are contiguous."""

    data: Pointer
    """The first matrix, or an array of the addresses of all if `stride` is None."""
    row_stride: int
    """Elements from row to row."""
    stride: int | None
    """Elements from matrix to matrix."""
    dtype: str

    def located(self, addresses: Sequence[int]) -> tuple[int, ...]:
        """What cuBLAS takes for the batch."""
        data = addresses[self.data.slot] + self.data.offset
        strides = () if self.stride is None else (self.stride,)
        return data, CUDA_TYPES[self.dtype], self.row_stride, *strides


@dataclass(frozen=True)
class Product:
    """``result = factor * left @ right`` for `count` matrices; `shape` is (rows, columns, inner).

    It is added to what the result holds if it `adds`.

    cuBLAS takes column-major matrices, for which ours are transposed: it computes
    ``result.T = right.T @ left.T``.
    """

    result: Matrices
    left: Matrices
    right: Matrices
    shape: tuple[int, int, int]
    count: int
    factor: float
    compute: int
    transpose_left: bool = False
    transpose_right: bool = False
    adds: bool = False

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        """Multiply, in the order of `stream`."""
        import cupy

        library, handle = _library(), cupy.cuda.device.get_cublas_handle()
        _check(library.cublasSetStream_v2(handle, stream))
        rows, columns, inner = self.shape
        factors = np.array(
            [self.factor, self.adds], np.float64 if self.compute == FLOAT64 else np.float32
        )
        alpha, beta = factors.ctypes.data, factors.ctypes.data + factors.itemsize
        by_address = self.result.stride is None
        multiply = library.cublasGemmBatchedEx if by_address else library.cublasGemmStridedBatchedEx
        _check(
            multiply(
                handle, int(self.transpose_right), int(self.transpose_left), columns, rows, inner,
                alpha, *self.right.located(addresses), *self.left.located(addresses),
                beta, *self.result.located(addresses), self.count, self.compute, DEFAULT_ALGORITHM,
            )
        )  # fmt: skip


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLAS failed with status {status}")


@cache
def _library() -> Any:
    """The cuBLAS that CuPy has loaded."""
    from cuda import pathfinder

    try:
        found = pathfinder.load_nvidia_dynamic_lib("cublas")
    except pathfinder.DynamicLibNotFoundError as error:
        raise RuntimeError(f"cuBLAS is not installed: {installation()}") from error
    library = ctypes.CDLL(found.abs_path)
    pointer: Any
    number: Any
    stride: Any
    pointer, number, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    head = [pointer, *[number] * 5, pointer]
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasGemmBatchedEx.argtypes = [
        *head, *[pointer, number, number] * 2, pointer, pointer, *[number] * 5
    ]  # fmt: skip
    library.cublasGemmStridedBatchedEx.argtypes = [
        *head, *[pointer, number, number, stride] * 2, pointer, pointer, number, number, stride,
        *[number] * 3,
    ]  # fmt: skip
    return library
