"""The kernels around the products: what is compiled into them, and which ones a problem needs."""

from __future__ import annotations

import math
from dataclasses import replace

from cuneigh import _jit
from cuneigh._backends.gemm.plan import MOST_MATRICES, MOST_QUERIES, USES, GemmPlan, plan_of
from cuneigh._device import Device
from cuneigh._gpu import sums
from cuneigh._problem import DTYPES, Problem

THREADS = 128
"""Threads of a block."""

HELD_PACKETS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24)
"""Packets of a row of logits that a lane can hold."""


def move_source(problem: Problem, vector: int, **flags: bool) -> str:
    """`struct Plan` of the kernels that move the vectors of tokens, `vector` elements at a time."""
    return _source(problem, {"kVector": vector}, flags)


def row_source(
    problem: Problem, lanes: int, bias: str | None, packets: int | None = None, **flags: bool
) -> str:
    """`struct Plan` of the kernels that take the rows of tiles; `lanes` lanes share a row."""
    constants = {"kLanes": lanes, "kMostQueries": MOST_QUERIES}
    if packets is not None:
        constants["kPackets"] = packets
    return _source(problem, constants, flags, Bias=bias)


def softmax_source(problem: Problem, plan: GemmPlan) -> str:
    """`struct Plan` of the softmax, whose lanes hold a row, if need be those of a whole block."""
    packets = plan.packets(problem)
    lanes = plan.lanes(problem)
    if packets > HELD_PACKETS[-1] * lanes:
        lanes = THREADS
    needed = math.ceil(packets / lanes)
    held = next((held for held in HELD_PACKETS if held >= needed), 0)
    return row_source(problem, lanes, problem.rpb_dtype, held)


def address_source(problem: Problem) -> str:
    """`struct Plan` of the kernel that finds the addresses of matrices."""
    constants = {"kRank": problem.rank, "kThreads": THREADS, "kMost": MOST_MATRICES}
    return _jit.plan_source(constants)


def _source(
    problem: Problem, constants: dict[str, int], flags: dict[str, bool], **types: str | None
) -> str:
    constants = {"kRank": problem.rank, "kThreads": THREADS, **constants}
    return _jit.plan_source(constants, flags, {"Element": problem.dtype, **types})


def weight_factor(problem: Problem) -> float:
    """What weights are multiplied by where they are stored; cuda/gemm/tiles.cuh says why."""
    return 32768.0 if problem.dtype == "float16" else 1.0


def kernels(problem: Problem, device: Device) -> list[_jit.Kernel]:
    """The kernels that `problem` needs when its arrays are contiguous."""
    plan = plan_of(problem, device, contiguous=True)
    lanes = plan.lanes(problem)
    rows = row_source(problem, lanes, None)
    biased = row_source(problem, lanes, problem.rpb_dtype)
    uses_key, uses_value = USES[problem.operation]
    names: list[tuple[str, str]] = []
    match problem.operation:
        case "forward":
            names = [("gemm/softmax", softmax_source(problem, plan))]
        case "backward":
            names = [("gemm/gradient", biased)]
        case "jvp":
            names = [("gemm/softmax", softmax_source(problem, plan)), ("gemm/tangent", biased)]
        case "qk":
            source = row_source(problem, lanes, problem.rpb_dtype, kHiddenIsZero=False)
            names = [("gemm/select", source)]
        case "qk_backward" | "av":
            names = [("gemm/spread", rows)]
        case "av_backward":
            source = row_source(problem, lanes, None, kHiddenIsZero=True)
            names = [("gemm/spread", rows), ("gemm/select", source)]
    size = DTYPES[problem.dtype]
    dims = [problem.head_dim] * uses_key + [problem.value_dim] * uses_value
    if plan.direct:
        names.append(("gemm/addresses", address_source(problem)))
    else:
        gathered, scattered = {
            "forward": ([problem.head_dim], [problem.value_dim]),
            "backward": (dims, [problem.head_dim]),
            "jvp": ([problem.head_dim], [problem.value_dim]),
            "qk": (dims, []),
            "qk_backward": (dims, dims),
            "av": ([], dims),
            "av_backward": (dims, []),
        }[problem.operation]
        for keys, packed in ((True, dims), (False, gathered)):
            names += [
                ("gemm/pack", move_source(problem, _vector(dim, size), kKeys=keys))
                for dim in packed
            ]
        names += [("gemm/unpack", move_source(problem, _vector(dim, size))) for dim in scattered]
    if problem.operation.endswith("backward"):
        most = 16 // DTYPES[problem.accumulator]
        names += [
            ("gemm/halo_sum", move_source(problem, vector))
            for vector in {min(_vector(dim, size), most) for dim in dims}
        ]
    found = [_jit.Kernel(name, source) for name, source in dict.fromkeys(names)]
    # Additional keys are columns of the tiles, so that only rpb is left to sum.
    return found + sums.kernels(replace(problem, additional=None))


def _vector(dim: int, size: int) -> int:
    """Elements of a contiguous row of `dim` that move together."""
    bits = 16 | dim * size
    return (bits & -bits) // size
