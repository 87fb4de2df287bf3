"""Whether compiled loops compute a problem, and sooner than matrix products do."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from cuneigh._backends.cpu.compiled import toolchain
from cuneigh._backends.cpu.compiled.cuts import logits
from cuneigh._backends.cpu.compiled.slabs import lanes_of
from cuneigh._backends.cpu.tiles import predicted_ns
from cuneigh._problem import DTYPES, Problem
from cuneigh._window import Promise

MOST_DIM = 128
"""Numbers of a head for which loops are compiled: all that is done with a row is written out."""

LEAST_NS = 1e6
"""What products must be predicted to take for an entry of the batch, at least, for loops to be
compiled for it."""

MARGIN = 0.8
"""Loops must be predicted to take at most this part of the products' time."""


def unsupported(problem: Problem) -> str | None:
    """Why compiled loops cannot compute `problem`; None when they can."""
    return _left_to_products(problem) or toolchain.missing()


def _left_to_products(problem: Problem) -> str | None:
    if problem.operation not in ("forward", "backward"):
        return f"{problem.operation} is left to matrix products"
    if problem.rpb_dtype is not None or problem.additional is not None or problem.has_key_mask:
        return "rpb, additional keys and key masks are left to matrix products"
    if Promise.INSIDE not in problem.promises:
        return "windows across the seam of a ring are left to matrix products"
    if max(problem.head_dim, problem.value_dim) > MOST_DIM:
        return f"heads of more than {MOST_DIM} are left to matrix products"
    return None


def is_faster(problem: Problem) -> bool:
    """Whether `problem` is to be computed by compiled loops."""
    return why_not(problem) is None


def why_not(problem: Problem) -> str | None:
    """Why `problem` is left to matrix products; None if it is not.

    That does not depend on how many entries a batch has, and so the results of one of them do not.
    """
    return toolchain.missing() or _why_not(replace(problem, batch=1))


@lru_cache(maxsize=4096)
def _why_not(problem: Problem) -> str | None:
    reason = _left_to_products(problem)
    if reason is not None:
        return reason
    products = predicted_ns(problem)
    if products < LEAST_NS:
        return "so little is not worth compiling for"
    share = loops_ns(problem) / products
    return f"loops are predicted to take {share:.2f} of the time" if share > MARGIN else None


def loops_ns(problem: Problem) -> float:
    """Predicted time of one thread, as measured on a core with AVX-512."""
    lanes = lanes_of(problem)
    vectors = lanes // toolchain.vector_size(8 * DTYPES[problem.accumulator])
    of_head = problem.batch * problem.heads
    queries = of_head * math.prod(problem.tokens)
    of_logits = of_head * vectors * logits(problem.axes, lanes)
    dims = problem.head_dim + problem.value_dim
    if problem.operation == "forward":
        return of_logits * (6 + 0.25 * dims) + queries * (60 + 1.0 * dims)
    products = 3 * problem.head_dim + 2 * problem.value_dim
    return of_logits * (14 + 0.25 * products) + queries * (150 + 2.5 * dims)
