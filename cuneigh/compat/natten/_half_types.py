"""The types of the two halves, `na2d_qk`, `na2d_av` and what they were called before.

A function has an overload for each signature that releases gave it.
"""

from __future__ import annotations

from typing import Protocol, overload

from cuneigh.compat.natten._whole_types import Array, Flags, Sizes


class Logits(Protocol):
    """`na1d_qk` and `na2d_qk`."""

    def __call__(
        self,
        query: Array,
        key: Array,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        additional_keys: Array | None = None,
        is_causal: Flags = False,
        rpb: Array | None = None,
    ) -> Array: ...


class Logits3D(Protocol):
    """`na3d_qk`: of 0.17, then of 0.15."""

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        additional_keys: Array | None = None,
        is_causal: Flags = False,
        rpb: Array | None = None,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
        additional_keys: Array | None = None,
    ) -> Array: ...


class Output(Protocol):
    """`na1d_av` and `na2d_av`."""

    def __call__(
        self,
        attn: Array,
        value: Array,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        additional_values: Array | None = None,
        is_causal: Flags = False,
    ) -> Array: ...


class Output3D(Protocol):
    """`na3d_av`: of 0.17, then of 0.15."""

    @overload
    def __call__(
        self,
        attn: Array,
        value: Array,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        additional_values: Array | None = None,
        is_causal: Flags = False,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        attn: Array,
        value: Array,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
        additional_values: Array | None = None,
    ) -> Array: ...


class BiasedLogits(Protocol):
    """`na1d_qk_with_bias` and `na2d_qk_with_bias`."""

    def __call__(
        self,
        query: Array,
        key: Array,
        bias: Array,
        kernel_size: int,
        dilation: int,
        additional_keys: Array | None = None,
    ) -> Array: ...


class BiasedLogits3D(Protocol):
    """`na3d_qk_with_bias`."""

    def __call__(
        self,
        query: Array,
        key: Array,
        bias: Array,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
        additional_keys: Array | None = None,
    ) -> Array: ...


class EarlyBiasedLogits(Protocol):
    """`natten1dqkrpb` and `natten2dqkrpb`, which up to 0.14.4 took no size."""

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        rpb: Array,
        kernel_size: int,
        dilation: int,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        query: Array,
        key: Array,
        rpb: Array,
        dilation: int,
    ) -> Array: ...


class EarlyBiasedLogits3D(Protocol):
    """`natten3dqkrpb`."""

    def __call__(
        self,
        query: Array,
        key: Array,
        rpb: Array,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
    ) -> Array: ...


class EarlyLogits(Protocol):
    """`natten1dqk` and `natten2dqk`."""

    def __call__(
        self,
        query: Array,
        key: Array,
        kernel_size: int,
        dilation: int,
        additional_keys: Array | None = None,
    ) -> Array: ...


class EarlyLogits3D(Protocol):
    """`natten3dqk`."""

    def __call__(
        self,
        query: Array,
        key: Array,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
        additional_keys: Array | None = None,
    ) -> Array: ...


class EarlyOutput(Protocol):
    """`natten1dav` and `natten2dav`, which up to 0.14.5 took no size."""

    @overload
    def __call__(
        self,
        attn: Array,
        value: Array,
        kernel_size: int,
        dilation: int,
        additional_values: Array | None = None,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        attn: Array,
        value: Array,
        dilation: int,
    ) -> Array: ...


class EarlyOutput3D(Protocol):
    """`natten3dav`."""

    def __call__(
        self,
        attn: Array,
        value: Array,
        kernel_size_d: int,
        kernel_size: int,
        dilation_d: int,
        dilation: int,
        additional_values: Array | None = None,
    ) -> Array: ...
