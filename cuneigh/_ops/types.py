"""The types of the public functions: results have the type of the arrays that go in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, SupportsFloat, TypeVar, overload

from cuneigh._backends import BackendName
from cuneigh._window import Border

Array = TypeVar("Array")
"""The arrays of one framework."""

Sizes = int | Sequence[int]
"""An integer for each token axis, or one for all of them."""

Flags = bool | Sequence[bool]
"""A bool for each token axis, or one for all of them."""

Borders = Border | Sequence[Border]
"""The name of a border for each token axis, or one for all of them."""

Scale = SupportsFloat
"""A number, or a 0-d array of the framework."""


class NeighborhoodAttention(Protocol):
    """What `na1d`, `na2d` and `na3d` return for what."""

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags = False,
        scale: Scale | None = None,
        additional_keys: Any = None,
        additional_values: Any = None,
        rpb: Any = None,
        return_lse: Literal[False] = False,
        backend: BackendName | None = None,
        *,
        border: Borders = "shift",
        layout: Sizes | None = None,
        query_start: Sizes = 0,
        key_start: Sizes = 0,
        key_mask: Any = None,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags = False,
        scale: Scale | None = None,
        additional_keys: Any = None,
        additional_values: Any = None,
        rpb: Any = None,
        *,
        return_lse: Literal[True],
        backend: BackendName | None = None,
        border: Borders = "shift",
        layout: Sizes | None = None,
        query_start: Sizes = 0,
        key_start: Sizes = 0,
        key_mask: Any = None,
    ) -> tuple[Array, Array]: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags = False,
        scale: Scale | None = None,
        additional_keys: Any = None,
        additional_values: Any = None,
        rpb: Any = None,
        return_lse: bool = False,
        backend: BackendName | None = None,
        *,
        border: Borders = "shift",
        layout: Sizes | None = None,
        query_start: Sizes = 0,
        key_start: Sizes = 0,
        key_mask: Any = None,
    ) -> Array | tuple[Array, Array]: ...


def neighborhood_attention(function: Callable[..., Any]) -> NeighborhoodAttention:
    """`function`, with its type."""
    return function


class Attention(Protocol):
    """What `attention` returns for what."""

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        is_causal: bool = False,
        scale: Scale | None = None,
        return_lse: Literal[False] = False,
        backend: BackendName | None = None,
        *,
        key_mask: Any = None,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        is_causal: bool = False,
        scale: Scale | None = None,
        *,
        return_lse: Literal[True],
        backend: BackendName | None = None,
        key_mask: Any = None,
    ) -> tuple[Array, Array]: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        is_causal: bool = False,
        scale: Scale | None = None,
        return_lse: bool = False,
        backend: BackendName | None = None,
        *,
        key_mask: Any = None,
    ) -> Array | tuple[Array, Array]: ...


def dense_attention(function: Callable[..., Any]) -> Attention:
    """`function`, with its type."""
    return function
