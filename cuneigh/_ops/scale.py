"""A `scale` that is an array: of a learned temperature, or of one that a program computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from cuneigh._frameworks import adapter_of
from cuneigh._frameworks.contract import type_name
from cuneigh._problem import ARRAYS, DTYPES, SUPPORTED, Operation

Compute = Callable[[Any, Sequence[Any]], list[Any]]
"""From a scale and the arrays of a call to its results."""


def is_number(scale: object) -> bool:
    """Whether `scale` is no array: a number, None, or something that no call takes."""
    if scale is None or isinstance(scale, Real):
        return True
    return not hasattr(scale, "shape") and not hasattr(type(scale), "__jax_array__")


def scaled(
    call: str, operation: Operation, scale: Any, arrays: Sequence[Any], compute: Compute
) -> list[Any]:
    """The results of `compute` with the array `scale`, which is multiplied into the query.

    The framework does that, so that it can differentiate and trace it, and nothing waits for the
    number. The product is rounded to the query's dtype.
    """
    query = arrays[0]
    if query is None:
        return compute(1.0, arrays)  # which says what is missing
    adapter, own = adapter_of(call, "query", query), adapter_of(call, "scale", scale)
    number = own.number(scale) if getattr(scale, "shape", None) == () else None
    if number is not None:
        return compute(number, arrays)
    if own is not adapter and not adapter.adopts(own):
        raise TypeError(
            f"{call}: scale is of type {type_name(scale)}, but query is of type "
            f"{type_name(query)}: a number or an array of one framework is needed"
        )
    adapter.check(call, "query", query, borrowed=True)
    device = adapter.own_device(query)
    given = adapter.converted(call, {"query": query, "scale": scale})
    spec = adapter.spec(given["scale"])
    if spec.shape != ():
        raise ValueError(f"{call}: scale has shape {spec.shape}; a number or a 0-d array is needed")
    if spec.dtype not in DTYPES:
        raise TypeError(
            f"{call}: scale has dtype {spec.dtype}, which is not one of {', '.join(DTYPES)}"
        )
    dtype = adapter.spec(given["query"]).dtype
    if dtype not in DTYPES:
        return compute(1.0, arrays)  # which says so
    precise = SUPPORTED[dtype].accumulator

    def product(array: Any) -> Any:
        with adapter.operations(device):
            factor = adapter.cast(given["scale"], precise)
            return adapter.cast(adapter.cast(array, precise) * factor, dtype)

    made = compute(1.0, [product(given["query"]), *arrays[1:]])
    if "query" in ARRAYS[operation].results:
        made[0] = product(made[0])
    return made
