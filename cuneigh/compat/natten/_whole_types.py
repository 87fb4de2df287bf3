"""The types of whole attention: results have the type of the arrays that go in.

A function has an overload for each signature that releases gave it. Results are those of the newest
generation that accepts the call.
"""

# ruff: noqa: N803 - NATTEN's names

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar, overload

Array = TypeVar("Array")

Sizes = int | Sequence[int]
"""An integer for each token axis, or one for all of them."""

Flags = bool | Sequence[bool]
"""A bool for each token axis, or one for all of them."""


class Neighborhood(Protocol):
    """`na1d`, `na2d` and `na3d`: of 0.20 and later, then of 0.17."""

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
        scale: float | None = None,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: Literal[False] = False,
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
        scale: float | None = None,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        *,
        return_lse: Literal[True],
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
        scale: float | None = None,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
    ) -> Array | tuple[Array, Array]: ...

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
        scale: float | None = None,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        try_fuse_additional_kv: bool = False,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        is_causal: Flags = False,
        rpb: Array | None = None,
        scale: float | None = None,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        xformers_kwargs: Mapping[str, Any] | None = None,
    ) -> Array: ...


class NeighborhoodGeneric(Protocol):
    """`neighborhood_attention_generic`."""

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
        scale: float | None = None,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: Literal[False] = False,
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
        scale: float | None = None,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        *,
        return_lse: Literal[True],
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
        scale: float | None = None,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
    ) -> Array | tuple[Array, Array]: ...

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
        scale: float | None = None,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        try_fuse_additional_kv: bool = False,
    ) -> Array: ...


class Attention(Protocol):
    """`attention`."""

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        is_causal: bool = False,
        scale: float | None = None,
        seqlens_Q: None = None,
        seqlens_KV: None = None,
        cumulative_seqlen_Q: None = None,
        cumulative_seqlen_KV: None = None,
        max_seqlen_Q: int | None = None,
        max_seqlen_KV: int | None = None,
        backend: str | None = None,
        q_tile_size: int | None = None,
        kv_tile_size: int | None = None,
        backward_q_tile_size: int | None = None,
        backward_kv_tile_size: int | None = None,
        backward_kv_splits: int | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: Literal[False] = False,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        is_causal: bool = False,
        scale: float | None = None,
        seqlens_Q: None = None,
        seqlens_KV: None = None,
        cumulative_seqlen_Q: None = None,
        cumulative_seqlen_KV: None = None,
        max_seqlen_Q: int | None = None,
        max_seqlen_KV: int | None = None,
        backend: str | None = None,
        q_tile_size: int | None = None,
        kv_tile_size: int | None = None,
        backward_q_tile_size: int | None = None,
        backward_kv_tile_size: int | None = None,
        backward_kv_splits: int | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        *,
        return_lse: Literal[True],
    ) -> tuple[Array, Array]: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        is_causal: bool = False,
        scale: float | None = None,
        seqlens_Q: None = None,
        seqlens_KV: None = None,
        cumulative_seqlen_Q: None = None,
        cumulative_seqlen_KV: None = None,
        max_seqlen_Q: int | None = None,
        max_seqlen_KV: int | None = None,
        backend: str | None = None,
        q_tile_size: int | None = None,
        kv_tile_size: int | None = None,
        backward_q_tile_size: int | None = None,
        backward_kv_tile_size: int | None = None,
        backward_kv_splits: int | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
    ) -> Array | tuple[Array, Array]: ...


class MergeAttentions(Protocol):
    """`merge_attentions`."""

    def __call__(
        self,
        outputs: Sequence[Array],
        lse_tensors: Sequence[Array],
        torch_compile: bool = True,
        use_autograd_fix: bool = True,
    ) -> tuple[Array, Array]: ...
