"""Attention with small windows, in loops that Numba compiles where it is installed.

Matrix products of tiles of queries with their halos compute several times the pairs that small
windows hold, in matrices that are small for a BLAS. Here every query is computed with the keys of
its own window alone. It serves windows as they are defined, and leaves what else a call may have
(rpb, additional keys, key masks, windows across the seam of a ring) to the products.

`toolchain` finds Numba, `vectors` are instructions of LLVM's, `steps` what is done with one query,
`kernels` the loops over queries and `slabs` what is handed to them; `choice` says when it pays.
"""

from __future__ import annotations

from typing import Any

from cuneigh._backends.cpu.compiled import slabs, toolchain
from cuneigh._backends.cpu.compiled.choice import is_faster, unsupported
from cuneigh._problem import DTYPES, Operands, Problem

__all__ = ["about", "backward", "forward", "is_faster", "unsupported"]


def about() -> str:
    """Whether small windows are computed here, for people."""
    reason = toolchain.missing()
    if reason is None:
        return f"small windows in loops that numba {toolchain.version()} compiles"
    return f"small windows as matrix products, not in compiled loops: {reason}"


def forward(problem: Problem, operands: Operands, output: Any, lse: Any) -> bool:
    """Fill `output`, and `lse` unless that is None; False if nothing could be compiled for that."""
    kernels = _compiled(problem, "pack", "forward")
    if kernels is None:
        return False
    pack, kernel = kernels
    slabs.forward(problem, operands, output, lse, pack, kernel, _lanes(problem))
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
    kernels = _compiled(problem, "pack", "unpack", "backward")
    if kernels is None:
        return False
    pack, unpack, kernel = kernels
    slabs.backward(
        *(problem, operands, grad_output, output, lse, grad_lse, gradients, allocate),
        *(pack, unpack, kernel, _lanes(problem)),
    )
    return True


def _compiled(problem: Problem, *names: str) -> list[Any] | None:
    sizes = problem.head_dim, problem.value_dim, 8 * DTYPES[problem.accumulator]
    kernels = [toolchain.compiled(name, *sizes) for name in names]
    return None if None in kernels else kernels


def _lanes(problem: Problem) -> int:
    return toolchain.lanes(8 * DTYPES[problem.accumulator])
