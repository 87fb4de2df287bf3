"""The two halves of neighborhood attention, with the logits or weights in memory between them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from cuneigh._arrays import examine
from cuneigh._ops.call import Flags, Sizes, compute, for_each_rank
from cuneigh._problem import (
    Operands,
    Problem,
    Spec,
    Window,
    av_problem,
    finite_scale,
    qk_problem,
    require,
    window_arguments,
)


class QKGradients(NamedTuple):
    """Gradients of `na2d_qk` and its kin; None for what was not given."""

    query: Any
    key: Any
    additional_keys: Any
    rpb: Any


class AVGradients(NamedTuple):
    """Gradients of `na2d_av` and its kin; None for what was not given."""

    weights: Any
    value: Any
    additional_values: Any


def na_qk(
    rank: int,
    query: Any,
    key: Any,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float = 1.0,
    rpb: Any = None,
    additional_keys: Any = None,
    backend: str | None = None,
) -> Any:
    """The logits of 2-D neighborhood attention, for models that need them in memory.

    `na2d` is ``na2d_av(softmax(na2d_qk(...)), ...)`` and stores neither logits nor weights: prefer
    it wherever it will do. Arrays, the window and `rpb` are as in `na2d`.

    Parameters
    ----------
    query : array [B, X1, X2, H, D]
    key : array [B, X1, X2, H_kv, D]
    kernel_size, stride, dilation, is_causal
        The window, as in `na2d`.
    scale : float
        Factor of the logits, 1 unless given.
    rpb : array [H, 2 * K1 - 1, 2 * K2 - 1], optional
    additional_keys : array [B, n, H_kv, D], optional
    backend : str, optional

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
    call = f"na{rank}d_qk"
    arguments = examine(
        call, {"query": query, "key": key}, {"additional_keys": additional_keys, "rpb": rpb}
    )
    window = window_arguments(call, rank, kernel_size, stride, dilation, is_causal)
    problem = _qk_problem(call, "qk", arguments.specs, window, scale)
    (logits,) = compute(
        call,
        arguments,
        problem,
        backend,
        (problem.logits,),
    )
    return logits


def na_qk_backward(
    rank: int,
    grad_logits: Any,
    query: Any,
    key: Any,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float = 1.0,
    rpb: Any = None,
    additional_keys: Any = None,
    backend: str | None = None,
) -> QKGradients:
    """Gradients of `na2d_qk` with respect to every array that it was given.

    Parameters
    ----------
    grad_logits : array [B, X1, X2, H, K1 * K2 (+ n)]
        Gradient of a scalar with respect to the logits. What hidden slots hold is ignored.
    query, key, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys
        What `na2d_qk` was given.
    backend : str, optional

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
    call = f"na{rank}d_qk_backward"
    arguments = examine(
        call,
        {"grad_logits": grad_logits, "query": query, "key": key},
        {"additional_keys": additional_keys, "rpb": rpb},
    )
    specs = arguments.specs
    window = window_arguments(call, rank, kernel_size, stride, dilation, is_causal)
    problem = _qk_problem(call, "qk_backward", specs, window, scale)
    require(call, "grad_logits", specs["grad_logits"], problem.logits)
    gradients = compute(
        call,
        arguments,
        problem,
        backend,
        problem.specs,
    )
    of = Operands(*gradients)
    return QKGradients(of.query, of.key, of.additional_keys, of.rpb)


def na_av(
    rank: int,
    weights: Any,
    value: Any,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    additional_values: Any = None,
    backend: str | None = None,
) -> Any:
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
    call = f"na{rank}d_av"
    arguments = examine(
        call, {"weights": weights, "value": value}, {"additional_values": additional_values}
    )
    window = window_arguments(call, rank, kernel_size, stride, dilation, is_causal)
    problem = _av_problem(call, "av", arguments.specs, window)
    (output,) = compute(
        call,
        arguments,
        problem,
        backend,
        (problem.output,),
    )
    return output


def na_av_backward(
    rank: int,
    grad_output: Any,
    weights: Any,
    value: Any,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    additional_values: Any = None,
    backend: str | None = None,
) -> AVGradients:
    """Gradients of `na2d_av` with respect to every array that it was given.

    Parameters
    ----------
    grad_output : array [B, X1, X2, H, D_v]
        Gradient of a scalar with respect to the output.
    weights, value, kernel_size, stride, dilation, is_causal, additional_values
        What `na2d_av` was given.
    backend : str, optional

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
    call = f"na{rank}d_av_backward"
    arguments = examine(
        call,
        {"grad_output": grad_output, "weights": weights, "value": value},
        {"additional_values": additional_values},
    )
    specs = arguments.specs
    window = window_arguments(call, rank, kernel_size, stride, dilation, is_causal)
    problem = _av_problem(call, "av_backward", specs, window)
    require(call, "grad_output", specs["grad_output"], problem.output)
    grad_weights, *gradients = compute(
        call,
        arguments,
        problem,
        backend,
        (problem.logits, *problem.specs),
    )
    of = Operands(*gradients)
    return AVGradients(grad_weights, of.value, of.additional_values)


def _qk_problem(
    call: str,
    operation: Literal["qk", "qk_backward"],
    specs: dict[str, Spec],
    window: Window,
    scale: object,
) -> Problem:
    return qk_problem(
        call,
        operation,
        specs["query"],
        specs["key"],
        window,
        finite_scale(call, scale),
        specs.get("rpb"),
        specs.get("additional_keys"),
    )


def _av_problem(
    call: str, operation: Literal["av", "av_backward"], specs: dict[str, Spec], window: Window
) -> Problem:
    return av_problem(
        call,
        operation,
        specs["weights"],
        specs["value"],
        window,
        specs.get("additional_values"),
    )


na1d_qk, na2d_qk, na3d_qk = for_each_rank(na_qk)
na1d_qk_backward, na2d_qk_backward, na3d_qk_backward = for_each_rank(na_qk_backward)
na1d_av, na2d_av, na3d_av = for_each_rank(na_av)
na1d_av_backward, na2d_av_backward, na3d_av_backward = for_each_rank(na_av_backward)
