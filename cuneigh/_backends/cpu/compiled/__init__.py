"""Attention in loops that Numba compiles where it is installed.

A BLAS multiplies large tiles of queries and halos fast, of which windows hold a half or a tenth,
and in between NumPy goes through the logits pass by pass. Here a tile has as many queries as a
vector or two have numbers, so that its halo holds little more than their windows, and its logits
stay in the first-level cache from the product that makes them to the one that consumes them. It
serves windows as they are defined, and leaves what else a call may have (rpb, additional keys, key
masks, windows across the seam of a ring) to the products.

`toolchain` finds Numba, `vectors` are instructions of LLVM's, of which `intrinsics` are made;
`storage` widens and narrows half precision, `steps` and `weights` are what is done with a tile,
`kernels` the loops over tiles, `copies` what comes before. `cuts` cuts token axes into tiles,
`slabs` a problem into what is handed to kernels, `arrays` says where in memory that is; `choice`
says when it pays.
"""

from __future__ import annotations

from typing import Any

from cuneigh._backends.cpu.compiled import cuts, slabs, toolchain
from cuneigh._backends.cpu.compiled.choice import is_faster, unsupported, why_not
from cuneigh._problem import Operands, Problem

__all__ = ["about", "backward", "forward", "is_faster", "method", "unsupported"]


def about() -> str:
    """Whether most problems are computed here, for people."""
    reason = toolchain.missing()
    if reason is None:
        return f"most problems in loops that numba {toolchain.version()} compiles"
    return f"matrix products, not compiled loops: {reason}"


def method(problem: Problem) -> str:
    """How `problem` is computed, for people."""
    reason = why_not(problem)
    if reason is not None:
        return f"matrix products, not compiled loops: {reason}"
    shape = cuts.tile_shape(problem.axes, slabs.lanes_of(problem))
    tile = " x ".join(map(str, shape))
    return f"loops that numba {toolchain.version()} compiles, tiles of {tile} queries"


def forward(problem: Problem, operands: Operands, output: Any, lse: Any) -> bool:
    """Fill `output`, and `lse` unless that is None; False if nothing could be compiled for that."""
    compiled = _compiled(problem, "pack", "forward")
    if compiled is None:
        return False
    slabs.forward(problem, operands, output, lse, *compiled)
    return True


def backward(
    problem: Problem,
    operands: Operands,
    grad_output: Any,
    output: Any,
    lse: Any,
    grad_lse: Any,
    gradients: Operands,
    allocate: Any,
) -> bool:
    """Fill all `gradients`; False if nothing could be compiled for that."""
    compiled = _compiled(problem, "pack", "unpack", "backward")
    if compiled is None:
        return False
    arguments = problem, operands, grad_output, output, lse, grad_lse, gradients, allocate
    slabs.backward(*arguments, *compiled)
    return True


def _compiled(problem: Problem, *names: str) -> tuple[Any, ...] | None:
    """The dtype of the arrays that kernels read, and kernels; None if they cannot be compiled."""
    stored = problem.dtype if toolchain.converts(problem.dtype) else problem.accumulator
    sizes = problem.head_dim, problem.value_dim, stored, slabs.lanes_of(problem)
    kernels = [toolchain.compiled(name, *sizes) for name in names]
    return None if None in kernels else (stored, *kernels)
