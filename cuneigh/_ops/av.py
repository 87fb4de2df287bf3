"""The second half of neighborhood attention, with weights in memory, and its gradient."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple

from cuneigh._backends import BackendName
from cuneigh._frameworks import load_adapter
from cuneigh._ops.compute import compute
from cuneigh._ops.types import Array, Borders, Flags, Sizes


class AVGradients(NamedTuple, Generic[Array]):
    """Gradients of `na2d_av` and its kin; None for what was not given."""

    weights: Array
    value: Array
    additional_values: Array | None


def na1d_av(
    weights: Array,
    value: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    additional_values: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> Array:
    """Sums of the values in the windows of a 1-D layout, weighted by what is in memory.

    `na2d_av` for arrays with one token axis: see there for what the parameters mean.

    Parameters
    ----------
    weights : array [B, X1, H, K1 (+ n)]
    value : array [B, X1, H_kv, D_v]
    kernel_size, stride, dilation : int
    is_causal : bool
    additional_values : array [B, n, H_kv, D_v], optional
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    output : array [B, X1, H, D_v]

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key, value = numpy.random.default_rng(0).standard_normal((3, 1, 64, 2, 16))
    >>> weights = cuneigh.na1d_qk(query, key, kernel_size=5)
    >>> cuneigh.na1d_av(weights, value, kernel_size=5).shape
    (1, 64, 2, 16)
    """
    load_adapter(weights)
    output: Array
    (output,) = compute(
        (
            "av",
            1,
            kernel_size,
            stride,
            dilation,
            is_causal,
            None,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        weights,
        value,
        additional_values,
        key_mask,
    )
    return output


def na2d_av(
    weights: Array,
    value: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    additional_values: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> Array:
    """Sums of the values in the windows of a 2-D layout, weighted by what is in memory.

    The second half of `na2d`: `weights` is laid out like the result of `na2d_qk`, and is usually a
    softmax of it along the last axis. Arrays and the window are as in `na2d`.

    Parameters
    ----------
    weights : array [B, X1, X2, H, K1 * K2 (+ n)]
        What slots that a causal axis hides hold is never read.
    value : array [B, X1, X2, H_kv, D_v]
    kernel_size, stride, dilation, is_causal
        The window, as in `na2d`.
    additional_values : array [B, n, H_kv, D_v], optional
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    output : array [B, X1, X2, H, D_v]

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key, value = numpy.random.default_rng(0).standard_normal((3, 1, 8, 8, 2, 16))
    >>> weights = numpy.exp(cuneigh.na2d_qk(query, key, kernel_size=5, scale=0.25))
    >>> weights /= weights.sum(-1, keepdims=True)
    >>> output = cuneigh.na2d_av(weights, value, kernel_size=5)
    >>> numpy.allclose(output, cuneigh.na2d(query, key, value, kernel_size=5))
    True
    """
    load_adapter(weights)
    output: Array
    (output,) = compute(
        (
            "av",
            2,
            kernel_size,
            stride,
            dilation,
            is_causal,
            None,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        weights,
        value,
        additional_values,
        key_mask,
    )
    return output


def na3d_av(
    weights: Array,
    value: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    additional_values: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> Array:
    """Sums of the values in the windows of a 3-D layout, weighted by what is in memory.

    `na2d_av` for arrays with three token axes: see there for what the parameters mean.

    Parameters
    ----------
    weights : array [B, X1, X2, X3, H, K1 * K2 * K3 (+ n)]
    value : array [B, X1, X2, X3, H_kv, D_v]
    kernel_size, stride, dilation : int, or one per token axis
    is_causal : bool, or one per token axis
    additional_values : array [B, n, H_kv, D_v], optional
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    output : array [B, X1, X2, X3, H, D_v]

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key, value = numpy.random.default_rng(0).standard_normal((3, 1, 4, 4, 4, 2, 16))
    >>> weights = cuneigh.na3d_qk(query, key, kernel_size=3)
    >>> cuneigh.na3d_av(weights, value, kernel_size=3).shape
    (1, 4, 4, 4, 2, 16)
    """
    load_adapter(weights)
    output: Array
    (output,) = compute(
        (
            "av",
            3,
            kernel_size,
            stride,
            dilation,
            is_causal,
            None,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        weights,
        value,
        additional_values,
        key_mask,
    )
    return output


def na1d_av_backward(
    grad_output: Array,
    weights: Array,
    value: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    additional_values: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> AVGradients[Array]:
    """Gradients of `na1d_av` with respect to every array that it was given.

    `na2d_av_backward` for arrays with one token axis: see there for what the parameters mean.

    Parameters
    ----------
    grad_output : array [B, X1, H, D_v]
    weights, value, kernel_size, stride, dilation, is_causal, additional_values
        What `na1d_av` was given.
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    AVGradients
        As of `na2d_av_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key, value = numpy.random.default_rng(0).standard_normal((3, 1, 64, 2, 16))
    >>> weights = cuneigh.na1d_qk(query, key, kernel_size=5)
    >>> cuneigh.na1d_av_backward(numpy.ones_like(value), weights, value, 5).value.shape
    (1, 64, 2, 16)
    """
    load_adapter(weights)
    gradients = compute(
        (
            "av_backward",
            1,
            kernel_size,
            stride,
            dilation,
            is_causal,
            None,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        weights,
        value,
        additional_values,
        key_mask,
        grad_output,
    )
    return AVGradients(*gradients)


def na2d_av_backward(
    grad_output: Array,
    weights: Array,
    value: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    additional_values: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> AVGradients[Array]:
    """Gradients of `na2d_av` with respect to every array that it was given.

    Parameters
    ----------
    grad_output : array [B, X1, X2, H, D_v]
        Gradient of a scalar with respect to the output.
    weights, value, kernel_size, stride, dilation, is_causal, additional_values
        What `na2d_av` was given.
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    AVGradients
        A named tuple of contiguous arrays, each of the shape and dtype of what it belongs to; None
        for what was not given. The gradient of weights is 0 in hidden slots.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key, value = numpy.random.default_rng(0).standard_normal((3, 1, 8, 8, 2, 16))
    >>> weights = cuneigh.na2d_qk(query, key, kernel_size=5)
    >>> cuneigh.na2d_av_backward(numpy.ones_like(value), weights, value, 5).value.shape
    (1, 8, 8, 2, 16)
    """
    load_adapter(weights)
    gradients = compute(
        (
            "av_backward",
            2,
            kernel_size,
            stride,
            dilation,
            is_causal,
            None,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        weights,
        value,
        additional_values,
        key_mask,
        grad_output,
    )
    return AVGradients(*gradients)


def na3d_av_backward(
    grad_output: Array,
    weights: Array,
    value: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    additional_values: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> AVGradients[Array]:
    """Gradients of `na3d_av` with respect to every array that it was given.

    `na2d_av_backward` for arrays with three token axes: see there for what the parameters mean.

    Parameters
    ----------
    grad_output : array [B, X1, X2, X3, H, D_v]
    weights, value, kernel_size, stride, dilation, is_causal, additional_values
        What `na3d_av` was given.
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    AVGradients
        As of `na2d_av_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key, value = numpy.random.default_rng(0).standard_normal((3, 1, 4, 4, 4, 2, 16))
    >>> weights = cuneigh.na3d_qk(query, key, kernel_size=3)
    >>> cuneigh.na3d_av_backward(numpy.ones_like(value), weights, value, 3).value.shape
    (1, 4, 4, 4, 2, 16)
    """
    load_adapter(weights)
    gradients = compute(
        (
            "av_backward",
            3,
            kernel_size,
            stride,
            dilation,
            is_causal,
            None,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        weights,
        value,
        additional_values,
        key_mask,
        grad_output,
    )
    return AVGradients(*gradients)
