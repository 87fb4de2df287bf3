"""Neighborhood attention and its gradient."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple

from cuneigh._backends import BackendName
from cuneigh._frameworks import load_adapter
from cuneigh._ops.compute import compute
from cuneigh._ops.types import Array, Borders, Flags, Scale, Sizes, neighborhood_attention


class Gradients(NamedTuple, Generic[Array]):
    """Gradients of `na2d` and its kin with respect to the arrays given; None for the others."""

    query: Array
    key: Array
    value: Array
    additional_keys: Array | None
    additional_values: Array | None
    rpb: Array | None


@neighborhood_attention
def na1d(
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
) -> Array | tuple[Array, Array]:
    """1-D neighborhood attention: every query attends to the keys of a window around it.

    `na2d` for arrays with one token axis: see there for what the parameters mean.

    Parameters
    ----------
    query : array [B, X1, H, D]
    key : array [B, X1, H_kv, D]
    value : array [B, X1, H_kv, D_v]
    kernel_size, stride, dilation : int
    is_causal : bool
    scale : float, optional
        Factor of the logits; ``D ** -0.5`` if not given.
    additional_keys, additional_values : arrays [B, n, H_kv, D] and [B, n, H_kv, D_v], optional
    rpb : array [H, 2 * K1 - 1], optional
    return_lse : bool
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    output : array [B, X1, H, D_v]
    lse : array [B, X1, H]
        With `return_lse` only.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key, value = numpy.random.default_rng(0).standard_normal((3, 1, 64, 2, 16))
    >>> cuneigh.na1d(query, key, value, kernel_size=5).shape
    (1, 64, 2, 16)

    A decoder: the query at position 40 and a cache of the keys and values so far, whose length
    stays the same, so that no step plans anything anew.

    >>> step = cuneigh.na1d(
    ...     query[:, 40:41], key, value, kernel_size=32, is_causal=True, layout=64, query_start=40
    ... )
    >>> whole = cuneigh.na1d(query, key, value, kernel_size=32, is_causal=True)
    >>> bool(numpy.allclose(step, whole[:, 40:41]))
    True
    """
    load_adapter(query)
    output, lse = compute(
        (
            "forward",
            1,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            return_lse,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        query,
        key,
        value,
        additional_keys,
        additional_values,
        rpb,
        key_mask,
    )
    return output if lse is None else (output, lse)


@neighborhood_attention
def na2d(
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
) -> Array | tuple[Array, Array]:
    """2-D neighborhood attention: every query attends to the keys of a window around it.

    ``softmax(scale * query @ keys.T + rpb) @ values`` over the window of each query and the
    additional keys. Arrays may be NumPy's, CuPy's, PyTorch's or JAX's, all of one framework, device
    and dtype: float16, bfloat16 (that of ml_dtypes in NumPy and CuPy), float32 or float64. They are
    read where they are, whatever their strides. Beside JAX's arrays, NumPy's are constants.

    Arrays of any other framework that speaks DLPack, or ``__cuda_array_interface__``, may be on the
    CPU or a CUDA device. There they are read, and results are written, on CuPy's current stream.
    Results are arrays of that framework if its array namespace or module has a ``from_dlpack``, and
    NumPy's or CuPy's if not. No derivative passes through such a call. Through the others PyTorch
    and JAX take derivatives of every order, in reverse and in forward mode; from the second on they
    need memory for logits.

    Parameters
    ----------
    query : array [B, X1, X2, H, D]
    key : array [B, X1, X2, H_kv, D]
        H must be a multiple of H_kv: query head h reads key head ``h // (H / H_kv)``.
    value : array [B, X1, X2, H_kv, D_v]
    kernel_size : int, or one per token axis
        Keys that a query sees along an axis. The window is pushed inwards at the borders, so that
        its size is the same everywhere; an even one has one more key before the query than after.
        ``kernel_size * dilation`` must not exceed the length of the axis.
    stride : int, or one per token axis
        Neighboring queries that share one window, at most kernel_size. 1 is a sliding window,
        kernel_size is blocked attention.
    dilation : int, or one per token axis
        Step between the keys of a window, in tokens.
    is_causal : bool, or one per token axis
        Whether keys after the query are hidden along an axis.
    scale : float or 0-d array, optional
        Factor of the logits; ``D ** -0.5`` if not given. Any finite number. An array of the
        framework, which may be traced or differentiated and is not checked, is multiplied into the
        query, in the query's dtype.
    additional_keys, additional_values : arrays [B, n, H_kv, D] and [B, n, H_kv, D_v], optional
        Keys that every query sees besides its window.
    rpb : array [H, 2 * K1 - 1, 2 * K2 - 1], optional
        Relative positional bias, where K is the kernel_size of an axis: the element at
        ``key - query + K - 1``, counted in steps of dilation, is added to the scaled logit. Its
        dtype is the query's or float32. It needs stride 1 and no causal axis.
    return_lse : bool
        Whether to return the logarithm of the sum of the exponentials of all logits as well.
    backend : str, optional
        Name of the backend to use: "hopper", "fused", "gemm", "naive" or "cpu". Of those that can
        run the problem the one that is expected to be fastest if not given, and for derivatives
        that the one of this name has no kernels for.
    border : str, or one per token axis
        What becomes of a window at the ends of an axis: "shift" pushes it inwards, "cut" takes off
        what lies outside, and with "wrap" it goes on at the other end: the axis is a ring, such as
        a longitude. A causal window is cut in any case. With "cut" kernel_size may be anything; a
        ring must not be causal, and dilation must be a divisor of its length.
    layout : int, or one per token axis, optional
        Lengths of the layout of which the arrays hold parts. Window, borders, stride groups and
        dilation groups are those of the whole layout; then query, output and lse may have other
        token axes than key, value and key_mask. Keys that are not given are hidden.
    query_start, key_start : int, or one per token axis
        The token of the layout that is the first of the queries, or of the keys. On a ring it is
        taken modulo the length. Outputs of parts of the keys are joined by `merge_attentions`.
        Among JAX's arrays it may be traced: one program serves all starts, and one that does not
        lie in the layout is an error when the program runs. On a GPU the host waits for the number.
    key_mask : array of bool [B, X1, X2], optional
        False for keys that no query may see, whatever they and their values hold, NaN included.
        Its gradient is not asked for, and those of masked keys and values are 0. Additional keys
        are never masked. A query that sees no key has output 0, lse -inf and no gradient.

    Returns
    -------
    output : array [B, X1, X2, H, D_v]
        Contiguous, of the query's dtype.
    lse : array [B, X1, X2, H]
        With `return_lse` only: natural logarithm, float32 (float64 for float64 arrays).

    Raises
    ------
    TypeError, ValueError
        For an illegal argument; the message names it, the axis, and what would be legal.
    RuntimeError
        If no backend can run the problem.
    NotImplementedError
        For a JAX array that is sharded over explicit axes of a mesh along anything but its batch
        and heads.
    BufferError
        If a framework does not lend the memory of an array.

    Notes
    -----
    The operator is from [1]_, dilation from [2]_ and causal and strided windows from [3]_. The
    parameters mean what they mean in NATTEN, the authors' library; ``help("cuneigh.windows")``
    tells what a window of the same number means in others. ``python -m cuneigh show`` draws it.

    References
    ----------
    .. [1] Hassani et al., "Neighborhood Attention Transformer", CVPR 2023.
    .. [2] Hassani and Shi, "Dilated Neighborhood Attention Transformer", 2022.
    .. [3] Hassani et al., "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self
       Attention at the Threadblock Level", NeurIPS 2024.

    Examples
    --------
    A sliding window: every query sees the 5 x 5 keys around it.

    >>> import cuneigh, numpy
    >>> random = numpy.random.default_rng(0).standard_normal
    >>> query, key, value = random((3, 1, 16, 16, 4, 8))
    >>> cuneigh.na2d(query, key, value, kernel_size=5).shape
    (1, 16, 16, 4, 8)

    A causal axis: a query sees its own row and the 4 before it, so no later row changes anything.

    >>> causal = cuneigh.na2d(query, key, value, kernel_size=5, is_causal=(True, False))
    >>> first = [x[:, :8] for x in (query, key, value)]
    >>> of_first = cuneigh.na2d(*first, kernel_size=5, is_causal=(True, False))
    >>> bool(numpy.allclose(causal[:, :8], of_first))
    True

    Dilation: the same 25 keys, every third one along the second axis, where the window spans 13.

    >>> output = cuneigh.na2d(query, key, value, kernel_size=5, dilation=(1, 3))

    Stride: 4 x 4 neighboring queries share one window, which is faster; stride and kernel_size
    alike are blocked attention.

    >>> output = cuneigh.na2d(query, key, value, kernel_size=8, stride=4)
    >>> blocked = cuneigh.na2d(query, key, value, kernel_size=4, stride=4)
    >>> alone = [x[:, :4, :4] for x in (query, key, value)]
    >>> bool(numpy.allclose(blocked[:, :4, :4], cuneigh.na2d(*alone, kernel_size=4)))
    True

    Grouped heads: 4 query heads read 2 key heads, so that keys and values are half as large.

    >>> cuneigh.na2d(query, key[..., :2, :], value[..., :2, :], kernel_size=5).shape
    (1, 16, 16, 4, 8)

    Extra keys, such as registers or a prompt, that every query sees beside its window.

    >>> extra = random((2, 1, 3, 4, 8))
    >>> output = cuneigh.na2d(
    ...     query, key, value, 5, additional_keys=extra[0], additional_values=extra[1]
    ... )

    The lse of two calls joins them: attention to the window and to a context beside it.

    >>> near = cuneigh.na2d(query, key, value, kernel_size=5, return_lse=True)
    >>> flat = query.reshape(1, 256, 4, 8)
    >>> far = cuneigh.attention(flat, *extra, return_lse=True)
    >>> far = [x.reshape(1, 16, 16, *x.shape[2:]) for x in far]
    >>> joined, _ = cuneigh.merge_attentions([near[0], far[0]], [near[1], far[1]])
    >>> bool(numpy.allclose(joined, output))
    True

    A ring: the second axis is a longitude, so that the globe may be turned.

    >>> output = cuneigh.na2d(query, key, value, 5, border=("cut", "wrap"))
    >>> turned = [numpy.roll(x, 3, axis=2) for x in (query, key, value)]
    >>> of_turned = cuneigh.na2d(*turned, 5, border=("cut", "wrap"))
    >>> bool(numpy.allclose(of_turned, numpy.roll(output, 3, axis=2)))
    True

    Keys that are not there: at sea, only the sea is looked at.

    >>> sea = numpy.random.default_rng(0).random((1, 16, 16)) < 0.7
    >>> at_sea = cuneigh.na2d(query, key, value, 5, key_mask=sea)
    >>> key[~sea] = value[~sea] = numpy.nan
    >>> bool(numpy.array_equal(at_sea, cuneigh.na2d(query, key, value, 5, key_mask=sea)))
    True

    A part: rows 4 to 7 of the layout, with the 2 rows on either side that their windows reach.

    >>> query, key, value = random((3, 1, 16, 16, 4, 8))
    >>> halo = slice(2, 10)
    >>> part = cuneigh.na2d(
    ...     query[:, 4:8], key[:, halo], value[:, halo], 5,
    ...     layout=(16, 16), query_start=(4, 0), key_start=(2, 0),
    ... )
    >>> bool(numpy.allclose(part, cuneigh.na2d(query, key, value, 5)[:, 4:8]))
    True
    """
    load_adapter(query)
    output, lse = compute(
        (
            "forward",
            2,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            return_lse,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        query,
        key,
        value,
        additional_keys,
        additional_values,
        rpb,
        key_mask,
    )
    return output if lse is None else (output, lse)


@neighborhood_attention
def na3d(
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
) -> Array | tuple[Array, Array]:
    """3-D neighborhood attention: every query attends to the keys of a window around it.

    `na2d` for arrays with three token axes: see there for what the parameters mean.

    Parameters
    ----------
    query : array [B, X1, X2, X3, H, D]
    key : array [B, X1, X2, X3, H_kv, D]
    value : array [B, X1, X2, X3, H_kv, D_v]
    kernel_size, stride, dilation : int, or one per token axis
    is_causal : bool, or one per token axis
    scale : float, optional
        Factor of the logits; ``D ** -0.5`` if not given.
    additional_keys, additional_values : arrays [B, n, H_kv, D] and [B, n, H_kv, D_v], optional
    rpb : array [H, 2 * K1 - 1, 2 * K2 - 1, 2 * K3 - 1], optional
    return_lse : bool
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    output : array [B, X1, X2, X3, H, D_v]
    lse : array [B, X1, X2, X3, H]
        With `return_lse` only.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key, value = numpy.random.default_rng(0).standard_normal((3, 1, 4, 4, 4, 2, 16))
    >>> cuneigh.na3d(query, key, value, kernel_size=3).shape
    (1, 4, 4, 4, 2, 16)
    """
    load_adapter(query)
    output, lse = compute(
        (
            "forward",
            3,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            return_lse,
            backend,
            border,
            layout,
            query_start,
            key_start,
        ),
        query,
        key,
        value,
        additional_keys,
        additional_values,
        rpb,
        key_mask,
    )
    return output if lse is None else (output, lse)


def na1d_backward(
    grad_output: Array,
    query: Array,
    key: Array,
    value: Array,
    output: Array,
    lse: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale | None = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    rpb: Any = None,
    grad_lse: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> Gradients[Array]:
    """Gradients of `na1d` with respect to every array that it was given.

    `na2d_backward` for arrays with one token axis: see there for what the parameters mean.

    Parameters
    ----------
    grad_output : array [B, X1, H, D_v]
    query, key, value, additional_keys, additional_values, rpb : arrays
        What `na1d` was given.
    output, lse : arrays [B, X1, H, D_v] and [B, X1, H]
        What `na1d` returned with ``return_lse=True``.
    kernel_size, stride, dilation, is_causal, scale
        What `na1d` was given.
    grad_lse : array [B, X1, H], optional
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    Gradients
        As of `na2d_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> random = numpy.random.default_rng(0)
    >>> query, key, value, grad_output = random.standard_normal((4, 1, 64, 2, 16))
    >>> output, lse = cuneigh.na1d(query, key, value, 5, return_lse=True)
    >>> gradients = cuneigh.na1d_backward(grad_output, query, key, value, output, lse, 5)
    >>> gradients.key.shape
    (1, 64, 2, 16)
    """
    load_adapter(query)
    gradients = compute(
        (
            "backward",
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
        value,
        additional_keys,
        additional_values,
        rpb,
        key_mask,
        grad_output,
        output,
        lse,
        grad_lse,
    )
    return Gradients(*gradients)


def na2d_backward(
    grad_output: Array,
    query: Array,
    key: Array,
    value: Array,
    output: Array,
    lse: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale | None = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    rpb: Any = None,
    grad_lse: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> Gradients[Array]:
    """Gradients of `na2d` with respect to every array that it was given.

    Parameters
    ----------
    grad_output : array [B, X1, X2, H, D_v]
        Gradient of a scalar with respect to the output.
    query, key, value, additional_keys, additional_values, rpb : arrays
        What `na2d` was given.
    output, lse : arrays [B, X1, X2, H, D_v] and [B, X1, X2, H]
        What `na2d` returned with ``return_lse=True``.
    kernel_size, stride, dilation, is_causal, scale
        What `na2d` was given.
    grad_lse : array [B, X1, X2, H], optional
        Gradient of the same scalar with respect to lse, of its dtype; zero if not given.
    backend : str, optional
        As in `na2d`; it need not be the one that ran forward.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    Gradients
        A named tuple of contiguous arrays, each of the shape and dtype of what it belongs to; None
        for what was not given. In PyTorch and JAX they can be differentiated as functions of all
        arguments, of `output` and `lse` as well.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> random = numpy.random.default_rng(0)
    >>> query, key, value, grad_output = random.standard_normal((4, 1, 8, 8, 2, 16))
    >>> output, lse = cuneigh.na2d(query, key, value, 5, return_lse=True)
    >>> gradients = cuneigh.na2d_backward(grad_output, query, key, value, output, lse, 5)
    >>> gradients.key.shape
    (1, 8, 8, 2, 16)
    """
    load_adapter(query)
    gradients = compute(
        (
            "backward",
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
        value,
        additional_keys,
        additional_values,
        rpb,
        key_mask,
        grad_output,
        output,
        lse,
        grad_lse,
    )
    return Gradients(*gradients)


def na3d_backward(
    grad_output: Array,
    query: Array,
    key: Array,
    value: Array,
    output: Array,
    lse: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale | None = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    rpb: Any = None,
    grad_lse: Any = None,
    backend: BackendName | None = None,
    *,
    border: Borders = "shift",
    layout: Sizes | None = None,
    query_start: Sizes = 0,
    key_start: Sizes = 0,
    key_mask: Any = None,
) -> Gradients[Array]:
    """Gradients of `na3d` with respect to every array that it was given.

    `na2d_backward` for arrays with three token axes: see there for what the parameters mean.

    Parameters
    ----------
    grad_output : array [B, X1, X2, X3, H, D_v]
    query, key, value, additional_keys, additional_values, rpb : arrays
        What `na3d` was given.
    output, lse : arrays [B, X1, X2, X3, H, D_v] and [B, X1, X2, X3, H]
        What `na3d` returned with ``return_lse=True``.
    kernel_size, stride, dilation, is_causal, scale
        What `na3d` was given.
    grad_lse : array [B, X1, X2, X3, H], optional
    backend : str, optional
        As in `na2d`.
    border, layout, query_start, key_start, key_mask
        As in `na2d`.

    Returns
    -------
    Gradients
        As of `na2d_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> random = numpy.random.default_rng(0)
    >>> query, key, value, grad_output = random.standard_normal((4, 1, 4, 4, 4, 2, 16))
    >>> output, lse = cuneigh.na3d(query, key, value, 3, return_lse=True)
    >>> gradients = cuneigh.na3d_backward(grad_output, query, key, value, output, lse, 3)
    >>> gradients.key.shape
    (1, 4, 4, 4, 2, 16)
    """
    load_adapter(query)
    gradients = compute(
        (
            "backward",
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
        value,
        additional_keys,
        additional_values,
        rpb,
        key_mask,
        grad_output,
        output,
        lse,
        grad_lse,
    )
    return Gradients(*gradients)
