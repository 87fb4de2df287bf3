"""The arguments of a call, checked: legal ones make a `Problem`, illegal ones raise.

The error is a ValueError, or a TypeError for a wrong type, and names the call, the argument, the
axis and the value. Nothing here touches an array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from typing import Any, Literal

from cuneigh._parameters import Part, Window, neighborhood_axes
from cuneigh._problem import ARRAYS, DTYPES, SUPPORTED, Operands, Operation, Problem, Spec
from cuneigh._window import Axis


def problem_of(
    call: str,
    operation: Operation,
    specs: Mapping[str, Spec],
    window: Window,
    scale: float | None,
    part: Part | None = None,
) -> Problem:
    """The problem of `operation` on arrays of these shapes and dtypes, all of which are checked.

    `specs` has the arguments of the operation by name, without the optional ones that are not
    given. A `scale` of None stands for ``head_dim ** -0.5``.
    """
    query, key, value, additional_keys, additional_values, rpb, key_mask = map(
        specs.get, Operands._fields
    )
    given = part, key_mask
    problem: Problem
    match operation:
        case "forward" | "backward" | "jvp" | "hvp" if not window.kernel_size:
            (is_causal,) = window.is_causal
            problem = dense_problem(call, operation, query, key, value, is_causal, scale, key_mask)
        case "forward" | "backward" | "jvp" | "hvp":
            extra = additional_keys, additional_values
            problem = attention_problem(
                call, operation, query, key, value, window, scale, *extra, rpb, *given
            )
        case "qk" | "qk_backward" | "av" | "av_backward" if not window.kernel_size:
            (is_causal,) = window.is_causal
            query, key = specs.get("query", specs.get("weights")), specs.get("key", value)
            assert query is not None
            assert key is not None
            # The vectors that the operation does not take have one element.
            values = value or Spec((*key.shape[:-1], 1), key.dtype)
            if "weights" in specs:
                query, key = (Spec((*each.shape[:-1], 1), each.dtype) for each in (query, key))
            problem = dense_problem(call, operation, query, key, values, is_causal, scale, key_mask)
        case "qk" | "qk_backward":
            problem = qk_problem(
                call, operation, query, key, window, scale, rpb, additional_keys, *given
            )
        case "av" | "av_backward":
            problem = av_problem(
                call, operation, specs["weights"], value, window, additional_values, *given
            )
    if scale is not None and abs(scale) > LARGEST_SCALE[problem.accumulator]:
        raise ValueError(
            f"{call}: scale={scale} is not finite in {problem.accumulator}, in which the "
            f"logits of {problem.dtype} arrays are computed"
        )
    if ARRAYS[operation].gradient is None and not SUPPORTED[problem.dtype].has_gradients:
        raise TypeError(f"{call}: dtype {problem.dtype} has no gradients")
    for name in ARRAYS[operation].arguments:
        if name in specs and name not in _CHECKED:
            require(call, name, specs[name], problem.spec(name))
    return problem


LARGEST_SCALE = {"float32": (2 - 2.0**-23) * 2.0**127, "float64": math.inf}
"""The largest scale that does not overflow, by the dtype in which sums are taken."""

_CHECKED = frozenset([*Operands._fields, "weights"])
"""The arguments that the functions below have checked already."""


def _axes_of(
    call: str, sides: dict[str, Spec], window: Window, part: Part | None
) -> tuple[Axis, ...]:
    """The axes of two arrays, of the queries and of the keys: alike, unless they are parts."""
    (first, queries), (other, keys) = sides.items()
    _check_rank(call, other, keys, len(window.kernel_size))
    lengths, key_lengths = queries.shape[1:-2], keys.shape[1:-2]
    if part is None or part.layout is None:
        for axis, (length, key_length) in enumerate(zip(lengths, key_lengths, strict=True), 1):
            if length != key_length:
                raise ValueError(
                    f"{call}: {other} has size {key_length} on axis {axis}, but {first} has "
                    f"{length}: they must be equal, unless layout says what they are parts of"
                )
    return neighborhood_axes(call, lengths, window, queries.shape[-2], key_lengths, part)


def kept(build: Callable[..., Problem]) -> Callable[..., Problem]:
    """`build` with its problems kept, but for those of sizes that have no hash.

    Such are the symbolic sizes of a framework that is tracing. Every comparison of one becomes a
    condition under which the trace holds.
    """
    cached = lru_cache(maxsize=4096)(build)

    @wraps(build)
    def find(*args: Any) -> Problem:
        try:
            return cached(*args)
        except TypeError:
            pass  # There is no hash; or it is an error of the arguments, which comes again.
        return build(*args)

    return find


@kept
def attention_problem(
    call: str,
    operation: Literal["forward", "backward", "jvp", "hvp"],
    query: Spec,
    key: Spec,
    value: Spec,
    window: Window,
    scale: float | None,
    additional_keys: Spec | None = None,
    additional_values: Spec | None = None,
    rpb: Spec | None = None,
    part: Part | None = None,
    key_mask: Spec | None = None,
) -> Problem:
    """The problem of `na{r}d` or its backward."""
    rank = len(window.kernel_size)
    _check_query_and_key(call, rank, query, key, additional_keys)
    _check_value(call, rank, value)
    if (additional_keys is None) != (additional_values is None):
        given, missing = "additional_keys", "additional_values"
        if additional_keys is None:
            given, missing = missing, given
        raise ValueError(f"{call}: {given} was given without {missing}")
    axes = _axes_of(call, {"query": query, "key": key}, window, part)
    problem = Problem(
        operation=operation,
        dtype=query.dtype,
        batch=query.shape[0],
        heads=query.shape[-2],
        kv_heads=key.shape[-2],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        axes=axes,
        scale=_default_scale(call, query.shape[-1]) if scale is None else scale,
        additional=_additional_count(call, "additional_keys", additional_keys),
        rpb_dtype=_rpb_dtype(call, rpb, query, axes),
        has_key_mask=key_mask is not None,
    )
    _check_all(
        call,
        problem,
        Operands(query, key, value, additional_keys, additional_values, rpb, key_mask),
    )
    return problem


@kept
def qk_problem(
    call: str,
    operation: Literal["qk", "qk_backward"],
    query: Spec,
    key: Spec,
    window: Window,
    scale: float,
    rpb: Spec | None = None,
    additional_keys: Spec | None = None,
    part: Part | None = None,
    key_mask: Spec | None = None,
) -> Problem:
    """The problem of `na{r}d_qk` or its backward."""
    rank = len(window.kernel_size)
    _check_query_and_key(call, rank, query, key, additional_keys)
    axes = _axes_of(call, {"query": query, "key": key}, window, part)
    problem = Problem(
        operation=operation,
        dtype=query.dtype,
        batch=query.shape[0],
        heads=query.shape[-2],
        kv_heads=key.shape[-2],
        head_dim=query.shape[-1],
        value_dim=1,
        axes=axes,
        scale=scale,
        additional=_additional_count(call, "additional_keys", additional_keys),
        rpb_dtype=_rpb_dtype(call, rpb, query, axes),
        has_key_mask=key_mask is not None,
    )
    _check_all(call, problem, Operands(query, key, None, additional_keys, None, rpb, key_mask))
    return problem


@kept
def av_problem(
    call: str,
    operation: Literal["av", "av_backward"],
    weights: Spec,
    value: Spec,
    window: Window,
    additional_values: Spec | None = None,
    part: Part | None = None,
    key_mask: Spec | None = None,
) -> Problem:
    """The problem of `na{r}d_av` or its backward."""
    rank = len(window.kernel_size)
    _check_rank(call, "weights", weights, rank)
    _check_dtype(call, "weights", weights)
    _check_value(call, rank, value)
    _check_heads(call, "weights", weights.shape[-2], "value", value.shape[-2])
    problem = Problem(
        operation=operation,
        dtype=weights.dtype,
        batch=weights.shape[0],
        heads=weights.shape[-2],
        kv_heads=value.shape[-2],
        head_dim=1,
        value_dim=value.shape[-1],
        axes=_axes_of(call, {"weights": weights, "value": value}, window, part),
        scale=1.0,
        additional=_additional_count(call, "additional_values", additional_values),
        has_key_mask=key_mask is not None,
    )
    _check_all(call, problem, Operands(None, None, value, None, additional_values, None, key_mask))
    require(call, "weights", weights, problem.logits)
    return problem


@kept
def dense_problem(
    call: str,
    operation: Operation,
    query: Spec,
    key: Spec,
    value: Spec,
    is_causal: bool,
    scale: float | None,
    key_mask: Spec | None = None,
) -> Problem:
    """The problem of `attention` or its backward: one token axis, all of whose keys are seen."""
    _check_query_and_key(call, 1, query, key, None)
    _check_value(call, 1, value)
    length, key_length = query.shape[1], key.shape[1]
    if is_causal and length != key_length:
        raise ValueError(
            f"{call}: is_causal=True needs as many queries as keys, but query has {length} on "
            f"axis 1 and key has {key_length}"
        )
    problem = Problem(
        operation=operation,
        dtype=query.dtype,
        batch=query.shape[0],
        heads=query.shape[-2],
        kv_heads=key.shape[-2],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        axes=(Axis(length, key_length, max(key_length, 1), 1, 1, is_causal),),
        scale=_default_scale(call, query.shape[-1]) if scale is None else scale,
        has_key_mask=key_mask is not None,
    )
    _check_all(call, problem, Operands(query, key, value, key_mask=key_mask))
    return problem


def _default_scale(call: str, head_dim: int) -> float:
    try:
        scale: float = head_dim**-0.5
    except ValueError:  # of a symbol of JAX
        raise ValueError(
            f"{call}: scale must be given, for the head_dim {head_dim} from which it would follow "
            f"is not known"
        ) from None
    return scale


def require(call: str, name: str, given: Spec, expected: Spec) -> None:
    """Raise unless an argument has the dtype and shape that the others imply."""
    if given.dtype != expected.dtype:
        raise TypeError(f"{call}: {name} has dtype {given.dtype}, but {expected.dtype} is needed")
    if len(given.shape) != len(expected.shape):
        raise ValueError(
            f"{call}: {name} has {len(given.shape)} axes, but {len(expected.shape)} are needed: "
            f"{name}.shape is {given.shape} and should be {expected.shape}"
        )
    for axis, (size, needed) in enumerate(zip(given.shape, expected.shape, strict=True)):
        if size != needed:
            raise ValueError(
                f"{call}: {name} has size {size} on axis {axis}, but {needed} is needed: "
                f"{name}.shape is {given.shape} and should be {expected.shape}"
            )


def _check_all(call: str, problem: Problem, given: Operands) -> None:
    for name, spec, expected in zip(Operands._fields, given, problem.specs, strict=True):
        if spec is not None and expected is not None:
            require(call, name, spec, expected)


def _check_query_and_key(
    call: str, rank: int, query: Spec, key: Spec, additional_keys: Spec | None
) -> None:
    _check_rank(call, "query", query, rank)
    _check_dtype(call, "query", query)
    _check_rank(call, "key", key, rank)
    _check_positive(call, "query", query, "head_dim")
    _check_heads(call, "query", query.shape[-2], "key", key.shape[-2])
    # Cross attention aside, which `dense_problem` allows, the token axes must agree; the dtype,
    # batch and head_dim of key are compared with query's by `_check_all`.


def _check_value(call: str, rank: int, value: Spec) -> None:
    _check_rank(call, "value", value, rank)
    _check_positive(call, "value", value, "value_dim")


def _check_rank(call: str, name: str, spec: Spec, rank: int) -> None:
    if len(spec.shape) != rank + 3:
        tokens = ", ".join(f"X{axis + 1}" for axis in range(rank))
        raise ValueError(
            f"{call}: {name} has {len(spec.shape)} axes, but {rank + 3} are needed: "
            f"{name}.shape is {spec.shape} and should be [batch, {tokens}, heads, dim]"
        )


def _check_dtype(call: str, name: str, spec: Spec) -> None:
    if spec.dtype not in DTYPES:
        hint = ""
        if spec.dtype == "|V2":
            hint = f": if NumPy has loaded it from a file, pass {name}.view(ml_dtypes.bfloat16)"
        raise TypeError(
            f"{call}: {name} has dtype {spec.dtype}, which is not one of {', '.join(DTYPES)}{hint}"
        )


def _check_positive(call: str, name: str, spec: Spec, meaning: str) -> None:
    if spec.shape[-1] < 1:
        raise ValueError(
            f"{call}: {name} has size 0 on axis {len(spec.shape) - 1}: {meaning} must be at least 1"
        )


def _check_heads(call: str, name: str, heads: int, kv_name: str, kv_heads: int) -> None:
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"{call}: {name} has {heads} heads, which is not a multiple of the {kv_heads} heads "
            f"of {kv_name}"
        )


def _additional_count(call: str, name: str, spec: Spec | None) -> int | None:
    if spec is None:
        return None
    if len(spec.shape) != 4:
        raise ValueError(
            f"{call}: {name} has {len(spec.shape)} axes, but 4 are needed: {name}.shape is "
            f"{spec.shape} and should be [batch, n, kv_heads, dim]"
        )
    return spec.shape[1]


def _rpb_dtype(call: str, rpb: Spec | None, query: Spec, axes: tuple[Axis, ...]) -> str | None:
    if rpb is None:
        return None
    if rpb.dtype not in (query.dtype, "float32"):
        raise TypeError(
            f"{call}: rpb has dtype {rpb.dtype}, but query's {query.dtype} or float32 is needed"
        )
    for axis, window in enumerate(axes):
        if window.stride != 1 or window.is_causal:
            argument = (
                f"stride={window.stride}" if window.stride != 1 else f"is_causal={window.is_causal}"
            )
            raise ValueError(
                f"{call}: rpb cannot be combined with {argument} on axis {axis}: a relative "
                f"positional bias needs stride=1 and is_causal=False on every axis"
            )
    return rpb.dtype
