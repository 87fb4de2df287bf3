"""Random problems with borders, parts and key masks, of few kinds of kernels.

All that is compiled into a kernel is that of one of `FAMILIES`: many problems share kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cuneigh._parameters import Part, Window
from cuneigh._problem import Operation, Problem, Spec
from cuneigh._validate import attention_problem, av_problem, qk_problem


class Family(NamedTuple):
    """What a kernel depends on, apart from the operation and from what is hidden."""

    dtype: str
    rank: int
    head_dim: int
    value_dim: int
    additional: bool = False
    rpb: str | None = None


FAMILIES = (
    Family("float16", 1, 64, 64),
    Family("float16", 2, 32, 32),
    Family("bfloat16", 3, 32, 32),
    Family("bfloat16", 1, 128, 128, additional=True),
    Family("bfloat16", 2, 64, 64, rpb="float32"),
    Family("float16", 3, 40, 24, additional=True, rpb="float16"),
    Family("float32", 1, 20, 36, additional=True, rpb="float32"),
    Family("float32", 3, 32, 32),
    Family("float64", 2, 4, 3, additional=True, rpb="float64"),
)

LONGEST = {1: 130, 2: 17, 3: 8}
"""Tokens along an axis of the layout, by rank."""


class Along(NamedTuple):
    """One axis of a problem."""

    layout: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    border: str
    queries: int
    query_start: int
    keys: int
    key_start: int


def part_problem(
    rng: np.random.Generator, family: Family, operation: Operation, has_mask: bool
) -> Problem:
    """A problem that is not empty."""
    has_rpb = family.rpb is not None and operation[:2] != "av"
    axes = [_axis(rng, LONGEST[family.rank], has_rpb) for _ in range(family.rank)]
    window = Window(
        tuple(axis.kernel_size for axis in axes),
        tuple(axis.stride for axis in axes),
        tuple(axis.dilation for axis in axes),
        tuple(axis.is_causal for axis in axes),
    )
    part = Part(
        tuple(axis.border for axis in axes),  # type: ignore[arg-type]
        tuple(axis.layout for axis in axes),
        tuple(axis.query_start for axis in axes),
        tuple(axis.key_start for axis in axes),
    )
    batch, kv_heads, group = (int(n) for n in rng.integers(1, 3, 3))
    queries = (batch, *(axis.queries for axis in axes), kv_heads * group)
    keys = (batch, *(axis.keys for axis in axes))
    query = Spec((*queries, family.head_dim), family.dtype)
    key = Spec((*keys, kv_heads, family.head_dim), family.dtype)
    value = Spec((*keys, kv_heads, family.value_dim), family.dtype)
    mask = Spec(keys, "bool") if has_mask else None
    extra_keys = extra_values = rpb = None
    if family.additional:
        count = int(rng.integers(0, 6))
        extra_keys = Spec((batch, count, kv_heads, family.head_dim), family.dtype)
        extra_values = Spec((batch, count, kv_heads, family.value_dim), family.dtype)
    if has_rpb:
        rpb = Spec((kv_heads * group, *(2 * k - 1 for k in window.kernel_size)), str(family.rpb))
    scale = float(rng.choice([family.head_dim**-0.5, 0.3]))
    call = f"na{family.rank}d"
    if operation in ("qk", "qk_backward"):
        return qk_problem(call, operation, query, key, window, scale, rpb, extra_keys, part, mask)
    if operation in ("av", "av_backward"):
        slots = int(np.prod(window.kernel_size)) + (extra_keys.shape[1] if extra_keys else 0)
        weights = Spec((*queries, slots), family.dtype)
        return av_problem(call, operation, weights, value, window, extra_values, part, mask)
    assert operation in ("forward", "backward", "jvp", "hvp")
    extra = extra_keys, extra_values
    return attention_problem(
        call, operation, query, key, value, window, scale, *extra, rpb, part, mask
    )


def _axis(rng: np.random.Generator, longest: int, has_rpb: bool) -> Along:
    dilation = int(rng.choice([1, 1, 2, 3]))
    border = str(rng.choice(["shift", "cut", "wrap"]))
    length = int(rng.integers(dilation, longest + 1))
    if border == "wrap":
        length -= length % dilation
    most = length // dilation
    kernel_size = int(rng.integers(1, rng.choice([min(8, most), most]) + 1))
    if border == "cut":
        kernel_size += int(rng.choice([0, 3]))
    stride = 1 if has_rpb else int(rng.integers(1, rng.choice([1, kernel_size]) + 1))
    is_causal = not has_rpb and border != "wrap" and bool(rng.random() < 0.3)
    sides = []
    for _ in range(2):
        count = int(rng.choice([length, rng.integers(1, length + 1)]))
        last = 2 * length if border == "wrap" else length - count
        sides += [count, int(rng.integers(0, last + 1))]
    return Along(length, kernel_size, stride, dilation, is_causal, border, *sides)
