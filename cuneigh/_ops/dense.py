"""Attention over all keys, and the merge of attention over parts of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from cuneigh._backends import BackendName
from cuneigh._call import opaque
from cuneigh._frameworks import adapter_of, load_adapter
from cuneigh._frameworks.arguments import examine
from cuneigh._frameworks.contract import type_name
from cuneigh._ops.compute import NO_PART, compute
from cuneigh._ops.types import Array, Scale, dense_attention
from cuneigh._problem import DTYPES, SUPPORTED, Spec
from cuneigh._validate import require


@dense_attention
def attention(
    query: Array,
    key: Array,
    value: Array,
    is_causal: bool = False,
    scale: Scale | None = None,
    return_lse: bool = False,
    backend: BackendName | None = None,
    *,
    key_mask: Any = None,
) -> Array | tuple[Array, Array]:
    """Attention of every query to every key: self attention, cross attention, causal attention.

    Together with `merge_attentions` it extends neighborhood attention by keys from elsewhere.
    Arrays are as in `na2d`, but for the number of keys, which may differ from that of queries.

    Parameters
    ----------
    query : array [B, N, H, D]
    key : array [B, M, H_kv, D]
    value : array [B, M, H_kv, D_v]
    is_causal : bool
        Whether keys after the query are hidden; needs N == M.
    scale : float or 0-d array, optional
        Factor of the logits, as in `na2d`; ``D ** -0.5`` if not given.
    return_lse : bool
        Whether to return the logarithm of the sum of the exponentials of all logits as well.
    backend : str, optional
        As in `na2d`.
    key_mask : array of bool [B, M], optional
        False for keys that no query may see, as in `na2d`: padding, for instance.

    Returns
    -------
    output : array [B, N, H, D_v]
        Zeros if there are no keys.
    lse : array [B, N, H]
        With `return_lse` only, as in `na2d`. It is -inf if there are no keys.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `na2d` does.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> random = numpy.random.default_rng(0)
    >>> image, text = random.standard_normal((1, 64, 2, 16)), random.standard_normal((1, 7, 2, 16))
    >>> cuneigh.attention(image, text, text).shape
    (1, 64, 2, 16)
    """
    load_adapter(query)
    output, lse = compute(
        ("forward", 0, None, None, None, is_causal, scale, return_lse, backend, *NO_PART),
        query,
        key,
        value,
        None,
        None,
        None,
        key_mask,
    )
    return output if lse is None else (output, lse)


def merge_attentions(outputs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """The attention over all keys, from the attentions of the same queries to parts of them.

    ``lse = logsumexp(lses)`` and ``output = sum(exp(lse_i - lse) * output_i)``, in the arrays' own
    framework, whose automatic differentiation and transformations pass through it.

    Parameters
    ----------
    outputs : sequence of arrays [.., D_v]
        At least one; all of the same shape, dtype, framework and device.
    lses : sequence of arrays [..]
        One for each output: float32 (float64 for float64 outputs). An lse of -inf stands for no
        keys at all, whatever the output holds.

    Returns
    -------
    output : array [.., D_v]
        Of the dtype of `outputs`, summed in float32 at least. 0 where every lse is -inf.
    lse : array [..]
        Of the dtype of `lses`.

    Raises
    ------
    TypeError, ValueError
        For an illegal argument; the message names it.

    Examples
    --------
    >>> import cuneigh, numpy
    >>> query, key, value = numpy.random.default_rng(0).standard_normal((3, 1, 64, 2, 16))
    >>> first = cuneigh.attention(query, key[:, :40], value[:, :40], return_lse=True)
    >>> second = cuneigh.attention(query, key[:, 40:], value[:, 40:], return_lse=True)
    >>> output, lse = cuneigh.merge_attentions(*zip(first, second))
    >>> numpy.allclose(output, cuneigh.attention(query, key, value))
    True
    """
    load_adapter(outputs)
    return _merge(outputs, lses)


@opaque
def _merge(outputs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    call = "merge_attentions"
    for name, given in (("outputs", outputs), ("lses", lses)):
        if not isinstance(given, (tuple, list)):
            raise TypeError(
                f"{call}: {name} is of type {type_name(given)}; a tuple or list of arrays is needed"
            )
    if len(outputs) != len(lses) or not outputs:
        raise ValueError(
            f"{call}: there are {len(outputs)} outputs and {len(lses)} lses; at least one of "
            f"each, and as many of either, are needed"
        )
    arrays = {f"outputs[{i}]": output for i, output in enumerate(outputs)}
    arrays |= {f"lses[{i}]": lse for i, lse in enumerate(lses)}
    adapter, device = examine(call, arrays, adapter_of, borrowed=False)
    arrays = adapter.converted(call, arrays)
    outputs, lses = list(arrays.values())[: len(outputs)], list(arrays.values())[len(outputs) :]
    specs = {name: adapter.spec(array) for name, array in arrays.items()}
    first = specs["outputs[0]"]
    accumulator = _check_merge(call, len(outputs), specs)

    with adapter.operations(device) as xp:
        # Where every lse is -inf, so is their maximum. There 0 stands for the maximum and 1 for the
        # total, so that neither a value nor a derivative becomes NaN.
        highest = functools.reduce(xp.maximum, lses)
        highest = xp.where(highest == -math.inf, 0.0, highest)
        terms = [xp.exp(lse - highest) for lse in lses]
        total = sum(terms)
        nothing = total == 0
        total = xp.where(nothing, 1.0, total)
        merged_lse = xp.where(nothing, -math.inf, highest + xp.log(total))
        merged = sum(
            (term / total)[..., None]
            * xp.where((lse == -math.inf)[..., None], 0.0, adapter.cast(output, accumulator))
            for term, lse, output in zip(terms, lses, outputs, strict=True)
        )
        results = adapter.cast(merged, first.dtype), adapter.cast(merged_lse, accumulator)
        output, lse = adapter.returned(call, device, results)
        return output, lse


def _check_merge(call: str, count: int, specs: dict[str, Spec]) -> str:
    """The dtype of the sums; raises unless all outputs and all lses are alike."""
    first = specs["outputs[0]"]
    if first.dtype not in DTYPES:
        raise TypeError(
            f"{call}: outputs[0] has dtype {first.dtype}, which is not one of {', '.join(DTYPES)}"
        )
    if not first.shape:
        raise ValueError(f"{call}: outputs[0] has 0 axes, but at least 1 is needed")
    accumulator = SUPPORTED[first.dtype].accumulator
    lse = Spec(first.shape[:-1], accumulator)
    for i in range(count):
        require(call, f"outputs[{i}]", specs[f"outputs[{i}]"], first)
        require(call, f"lses[{i}]", specs[f"lses[{i}]"], lse)
    return accumulator
