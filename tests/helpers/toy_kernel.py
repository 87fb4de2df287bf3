"""A kernel of a few lines, and what the tests ask of a cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuneigh._jit import Cache, Kernel, Resources
from cuneigh._jit import _compiler as compiler

needs_nvrtc = pytest.mark.skipif(
    compiler.version() is None or compiler.header_directory() is None,
    reason="NVRTC and the CUDA headers are not installed",
)

TOY = """\
#include "cuneigh/toy.cuh"
namespace cuneigh {
template <typename Plan>
__global__ void toy(typename Plan::Number* x) { x[threadIdx.x] += kOffset + Plan::kStep; }
}
"""
KERNEL = Kernel("toy", "using Number = number;\nstatic constexpr int kStep = 2;")


def built(cubin: bytes = b"cubin") -> compiler.Built:
    return compiler.Built(cubin, "symbol", Resources(1, 2, 3, 4, 5))


def entries(cache: Cache) -> list[Path]:
    """Everything in the directory, drafts included, down to the entries."""
    return sorted(entry for key in cache.root.iterdir() for entry in (key, *key.iterdir()))
