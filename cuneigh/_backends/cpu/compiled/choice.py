"""Whether compiled loops compute a problem, and sooner than matrix products do."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from cuneigh._backends.cpu.compiled import toolchain
from cuneigh._backends.cpu.tiles import predicted_ns
from cuneigh._problem import DTYPES, Problem
from cuneigh._window import Promise

MOST_DIM = 128
"""Numbers of a head for which loops are compiled: all that is done with a row is written out."""

LEAST_NS = 1e6
"""What products must be predicted to take for an entry of the batch, at least, for loops to be
compiled for it."""

CACHE_BYTES = 40 << 10
"""Up to this, keys and values of a window, and their gradients, stay in the first-level cache."""

MARGIN = 0.7
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
    """Whether `problem` is to be computed by compiled loops.

    That does not depend on how many entries a batch has, and so the results of one of them do not.
    """
    return toolchain.missing() is None and _is_faster(replace(problem, batch=1))


@lru_cache(maxsize=4096)
def _is_faster(problem: Problem) -> bool:
    if _left_to_products(problem) is not None:
        return False
    products = predicted_ns(problem)
    return products >= LEAST_NS and loops_ns(problem) <= MARGIN * products


def loops_ns(problem: Problem) -> float:
    """Predicted time of one thread, as measured on a core with AVX-512."""
    itemsize = DTYPES[problem.accumulator]
    lanes = toolchain.lanes(8 * itemsize)
    of_key, of_value = (-(-dim // lanes) for dim in (problem.head_dim, problem.value_dim))
    dims = problem.head_dim + problem.value_dim
    queries = problem.batch * problem.heads * math.prod(problem.tokens)
    window = problem.window_size * (of_key + of_value) * lanes * itemsize
    if problem.operation == "forward":
        pair, query = 0.3 + 0.45 * of_key + 0.3 * of_value, 90 + 1.0 * dims
    else:
        pair, query = 0.8 + 1.25 * of_key + 1.0 * of_value, 200 + 2.5 * dims
        window *= 2
    if window > CACHE_BYTES:
        pair *= 1.4
    return problem.batch * problem.heads * problem.visible_pairs() * pair + queries * query
