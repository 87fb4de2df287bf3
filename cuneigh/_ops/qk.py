"""The first half of neighborhood attention, which puts the logits into memory, and its gradient."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple

from cuneigh._backends import BackendName
from cuneigh._frameworks import load_adapter
from cuneigh._ops.compute import compute
from cuneigh._ops.types import Array, Borders, Flags, Scale, Sizes


class QKGradients(NamedTuple, Generic[Array]):
    """Gradients of `na2d_qk` and its kin; None for what was not given."""

    query: Array
    key: Array
    additional_keys: Array | None
    rpb: Array | None


def na1d_qk(
    query: Array,
    key: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale = 1.0,
    rpb: Any = None,
    additional_keys: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> Array:
    """The logits of 1-D neighborhood attention, for models that need them in memory.

    `na2d_qk` for arrays with one token axis: see there for what the parameters mean.

    Parameters
    ----------
    query : array [B, X1, H, D]
    key : array [B, X1, H_kv, D]
    kernel_size, stride, dilation : int
    is_causal : bool
    scale : float or 0-d array
        Factor of the logits, as in `na2d`; 1 unless given.
    rpb : array [H, 2 * K1 - 1], optional
    additional_keys : array [B, n, H_kv, D], optional
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    logits : array [B, X1, H, K1 (+ n)]

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key = numpy.random.default_rng(0).standard_normal((2, 1, 64, 2, 16))
    >>> cuneigh.na1d_qk(query, key, kernel_size=5, scale=0.25).shape
    (1, 64, 2, 5)
    """
    load_adapter(query)
    logits: Array
    (logits,) = compute(
        (
            "qk",
            1,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        query,
        key,
        additional_keys,
        rpb,
        key_mask,
    )
    return logits


def na2d_qk(
    query: Array,
    key: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale = 1.0,
    rpb: Any = None,
    additional_keys: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> Array:
    """The logits of 2-D neighborhood attention, for models that need them in memory.

    `na2d` is ``na2d_av(softmax(na2d_qk(...)), ...)`` and stores neither logits nor weights: prefer
    it wherever it will do. Arrays, the window and `rpb` are as in `na2d`.

    Parameters
    ----------
    query : array [B, X1, X2, H, D]
    key : array [B, X1, X2, H_kv, D]
    kernel_size, stride, dilation, is_causal
        The window, as in `na2d`.
    scale : float or 0-d array
        Factor of the logits, as in `na2d`; 1 unless given.
    rpb : array [H, 2 * K1 - 1, 2 * K2 - 1], optional
    additional_keys : array [B, n, H_kv, D], optional
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    logits : array [B, X1, X2, H, K1 * K2 (+ n)]
        The window's keys in C order of their position, then the additional keys; of the query's
        dtype. Slots that a causal axis hides hold -inf.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key = numpy.random.default_rng(0).standard_normal((2, 1, 8, 8, 2, 16))
    >>> logits = cuneigh.na2d_qk(query, key, kernel_size=5, scale=0.25)
    >>> logits.shape[:-1]
    (1, 8, 8, 2)
    """
    load_adapter(query)
    logits: Array
    (logits,) = compute(
        (
            "qk",
            2,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        query,
        key,
        additional_keys,
        rpb,
        key_mask,
    )
    return logits


def na3d_qk(
    query: Array,
    key: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale = 1.0,
    rpb: Any = None,
    additional_keys: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> Array:
    """The logits of 3-D neighborhood attention, for models that need them in memory.

    `na2d_qk` for arrays with three token axes: see there for what the parameters mean.

    Parameters
    ----------
    query : array [B, X1, X2, X3, H, D]
    key : array [B, X1, X2, X3, H_kv, D]
    kernel_size, stride, dilation : int, or one per token axis
    is_causal : bool, or one per token axis
    scale : float or 0-d array
        Factor of the logits, as in `na2d`; 1 unless given.
    rpb : array [H, 2 * K1 - 1, 2 * K2 - 1, 2 * K3 - 1], optional
    additional_keys : array [B, n, H_kv, D], optional
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    logits : array [B, X1, X2, X3, H, K1 * K2 * K3 (+ n)]

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key = numpy.random.default_rng(0).standard_normal((2, 1, 4, 4, 4, 2, 16))
    >>> cuneigh.na3d_qk(query, key, kernel_size=3, scale=0.25).shape
    (1, 4, 4, 4, 2, 27)
    """
    load_adapter(query)
    logits: Array
    (logits,) = compute(
        (
            "qk",
            3,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        query,
        key,
        additional_keys,
        rpb,
        key_mask,
    )
    return logits


def na1d_qk_backward(
    grad_logits: Array,
    query: Array,
    key: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale = 1.0,
    rpb: Any = None,
    additional_keys: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> QKGradients[Array]:
    """Gradients of `na1d_qk` with respect to every array that it was given.

    `na2d_qk_backward` for arrays with one token axis: see there for what the parameters mean.

    Parameters
    ----------
    grad_logits : array [B, X1, H, K1 (+ n)]
    query, key, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys
        What `na1d_qk` was given.
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    QKGradients
        As of `na2d_qk_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key = numpy.random.default_rng(0).standard_normal((2, 1, 64, 2, 16))
    >>> logits = cuneigh.na1d_qk(query, key, kernel_size=5)
    >>> cuneigh.na1d_qk_backward(numpy.ones_like(logits), query, key, 5).query.shape
    (1, 64, 2, 16)
    """
    load_adapter(query)
    gradients = compute(
        (
            "qk_backward",
            1,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        query,
        key,
        additional_keys,
        rpb,
        key_mask,
        grad_logits,
    )
    return QKGradients(*gradients)


def na2d_qk_backward(
    grad_logits: Array,
    query: Array,
    key: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale = 1.0,
    rpb: Any = None,
    additional_keys: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> QKGradients[Array]:
    """Gradients of `na2d_qk` with respect to every array that it was given.

    Parameters
    ----------
    grad_logits : array [B, X1, X2, H, K1 * K2 (+ n)]
        Gradient of a scalar with respect to the logits. What hidden slots hold is ignored.
    query, key, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys
        What `na2d_qk` was given.
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    QKGradients
        A named tuple of contiguous arrays, each of the shape and dtype of what it belongs to; None
        for what was not given.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key = numpy.random.default_rng(0).standard_normal((2, 1, 8, 8, 2, 16))
    >>> logits = cuneigh.na2d_qk(query, key, kernel_size=5)
    >>> cuneigh.na2d_qk_backward(numpy.ones_like(logits), query, key, 5).query.shape
    (1, 8, 8, 2, 16)
    """
    load_adapter(query)
    gradients = compute(
        (
            "qk_backward",
            2,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        query,
        key,
        additional_keys,
        rpb,
        key_mask,
        grad_logits,
    )
    return QKGradients(*gradients)


def na3d_qk_backward(
    grad_logits: Array,
    query: Array,
    key: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale = 1.0,
    rpb: Any = None,
    additional_keys: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> QKGradients[Array]:
    """Gradients of `na3d_qk` with respect to every array that it was given.

    `na2d_qk_backward` for arrays with three token axes: see there for what the parameters mean.

    Parameters
    ----------
    grad_logits : array [B, X1, X2, X3, H, K1 * K2 * K3 (+ n)]
    query, key, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys
        What `na3d_qk` was given.
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    QKGradients
        As of `na2d_qk_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key = numpy.random.default_rng(0).standard_normal((2, 1, 4, 4, 4, 2, 16))
    >>> logits = cuneigh.na3d_qk(query, key, kernel_size=3)
    >>> cuneigh.na3d_qk_backward(numpy.ones_like(logits), query, key, 3).query.shape
    (1, 4, 4, 4, 2, 16)
    """
    load_adapter(query)
    gradients = compute(
        (
            "qk_backward",
            3,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            True,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        query,
        key,
        additional_keys,
        rpb,
        key_mask,
        grad_logits,
    )
    return QKGradients(*gradients)
