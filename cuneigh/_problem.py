"""`Problem`: what is to be computed, validated once and then valid for ever.

Nothing here touches an array: a `Problem` is made of shapes, dtypes and parameters. Whatever is
illegal raises a `ValueError` (`TypeError` for a wrong type) that names the call, the argument, the
axis and the value. Backends never check again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, wraps
from numbers import Real
from typing import Any, Literal, NamedTuple

from cuneigh._window import Axis

Operation = Literal["forward", "backward", "qk", "qk_backward", "av", "av_backward"]

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Supported dtypes and their sizes in bytes."""


class Spec(NamedTuple):
    """Shape and dtype of one array argument."""

    shape: tuple[int, ...]
    dtype: str


class Operands(NamedTuple):
    """The array arguments of an operation, or one gradient for each; None where there is none."""

    query: Any = None
    key: Any = None
    value: Any = None
    additional_keys: Any = None
    additional_values: Any = None
    rpb: Any = None


RESULTS: dict[Operation, tuple[str, ...]] = {
    "forward": ("output", "lse"),
    "backward": Operands._fields,
    "qk": ("logits",),
    "qk_backward": Operands._fields,
    "av": ("output",),
    "av_backward": ("weights", *Operands._fields),
}
"""What each operation returns; a gradient is called what it is the gradient of."""

GRADIENT: dict[Operation, tuple[Operation, tuple[str, ...]]] = {
    "forward": ("backward", ("grad_output", "grad_lse")),
    "qk": ("qk_backward", ("grad_logits",)),
    "av": ("av_backward", ("grad_output",)),
}
"""The operation that differentiates another, and what it calls the gradients of its results."""


@dataclass(frozen=True)
class Problem:
    """One neighborhood attention operation, apart from the numbers in its arrays.

    What follows from the fields is computed once: a problem is kept and serves every call like it.
    """

    operation: Operation
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    axes: tuple[Axis, ...]
    scale: float
    additional: int | None = None
    """Number of additional keys, or None when they were not given."""
    rpb_dtype: str | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __getstate__(self) -> dict[str, Any]:
        # In another process strings have other hashes.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def rank(self) -> int:
        return len(self.axes)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)

    @cached_property
    def key_tokens(self) -> tuple[int, ...]:
        return tuple(axis.key_length for axis in self.axes)

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def window_size(self) -> int:
        """Window slots of one query, additional keys not counted."""
        return math.prod(axis.kernel_size for axis in self.axes)

    @property
    def slots(self) -> int:
        """Length of one query's row of logits: its window slots, then the additional keys."""
        return self.window_size + (self.additional or 0)

    @cached_property
    def is_empty(self) -> bool:
        """Whether a batch, head or token axis has size zero, so that nothing is computed."""
        return 0 in (self.batch, self.heads, *self.tokens, *self.key_tokens)

    @cached_property
    def accumulator(self) -> str:
        """The dtype of lse, and the least precise one in which sums are taken."""
        return "float64" if self.dtype == "float64" else "float32"

    @cached_property
    def gradient(self) -> Problem:
        """The problem of the gradient of this one."""
        return replace(self, operation=GRADIENT[self.operation][0])

    @cached_property
    def specs(self) -> Operands:
        """The `Spec` of every array argument; None for what this problem does not take."""
        batch, tokens, keys, kv = self.batch, self.tokens, self.key_tokens, self.kv_heads
        has_qk = self.operation not in ("av", "av_backward")
        has_av = self.operation not in ("qk", "qk_backward")
        n = self.additional
        bias = tuple(2 * axis.kernel_size - 1 for axis in self.axes)
        return Operands(
            query=Spec((batch, *tokens, self.heads, self.head_dim), self.dtype) if has_qk else None,
            key=Spec((batch, *keys, kv, self.head_dim), self.dtype) if has_qk else None,
            value=Spec((batch, *keys, kv, self.value_dim), self.dtype) if has_av else None,
            additional_keys=(
                Spec((batch, n, kv, self.head_dim), self.dtype)
                if has_qk and n is not None
                else None
            ),
            additional_values=(
                Spec((batch, n, kv, self.value_dim), self.dtype)
                if has_av and n is not None
                else None
            ),
            rpb=Spec((self.heads, *bias), self.rpb_dtype) if self.rpb_dtype else None,
        )

    @cached_property
    def output(self) -> Spec:
        return Spec((self.batch, *self.tokens, self.heads, self.value_dim), self.dtype)

    @cached_property
    def lse(self) -> Spec:
        return Spec((self.batch, *self.tokens, self.heads), self.accumulator)

    @cached_property
    def logits(self) -> Spec:
        return Spec((self.batch, *self.tokens, self.heads, self.slots), self.dtype)

    def spec(self, name: str) -> Spec:
        """That of the argument or the result called `name`."""
        match name:
            case "output" | "grad_output":
                return self.output
            case "lse" | "grad_lse":
                return self.lse
            case "logits" | "grad_logits" | "weights":
                return self.logits
        spec: Spec = getattr(self.specs, name)
        return spec

    def visible_pairs(self) -> int:
        """(query, key) pairs of one batch entry and one query head that attend to each other."""
        if self.is_empty:
            return 0
        pairs = math.prod(axis.visible_pairs() for axis in self.axes)
        return pairs + math.prod(self.tokens) * (self.additional or 0)

    def flops(self) -> int:
        """Useful floating point operations: those of the visible pairs alone."""
        dims = {"qk": self.head_dim, "av": self.value_dim}.get(
            self.operation.removesuffix("_backward"), self.head_dim + self.value_dim
        )
        forward = 2 * self.batch * self.heads * self.visible_pairs() * dims
        if self.operation == "backward":
            return forward * 5 // 2
        return forward * 2 if self.operation.endswith("_backward") else forward

    def bytes(self) -> int:
        """Compulsory memory traffic: every argument read once, every result written once."""
        arguments = sum(size_of(spec) for spec in self.specs if spec is not None)
        output, lse, logits = size_of(self.output), size_of(self.lse), size_of(self.logits)
        match self.operation:
            case "forward":
                return arguments + output + lse
            case "backward":  # arguments and their gradients; output, its gradient and lse
                return 2 * arguments + 2 * output + lse
            case "qk":
                return arguments + logits
            case "qk_backward":
                return 2 * arguments + logits
            case "av":
                return arguments + logits + output
            case "av_backward":
                return 2 * arguments + 2 * logits + output


def size_of(spec: Spec) -> int:
    """Bytes of a dense array."""
    return math.prod(spec.shape) * DTYPES[spec.dtype]


class Window(NamedTuple):
    """The window arguments of a call, one entry per token axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]


def window_arguments(
    call: str, rank: int, kernel_size: object, stride: object, dilation: object, is_causal: object
) -> Window:
    """The window arguments repeated over the token axes, their types checked."""
    return Window(
        _per_axis(call, "kernel_size", kernel_size, rank, _integer),
        _per_axis(call, "stride", stride, rank, _integer),
        _per_axis(call, "dilation", dilation, rank, _integer),
        _per_axis(call, "is_causal", is_causal, rank, boolean),
    )


def _per_axis(call: str, name: str, value: Any, rank: int, convert: Any) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        return (convert(call, name, value),) * rank
    if len(value) != rank:
        raise ValueError(
            f"{call}: {name}={value!r} has {len(value)} entries, but there are {rank} token axes"
        )
    return tuple(convert(call, f"{name}[{axis}]", entry) for axis, entry in enumerate(value))


def _integer(call: str, name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if not _boolean_like(value):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{call}: {name}={value!r} is {_type_name(value)}, not an int")


def boolean(call: str, name: str, value: Any) -> bool:
    if _boolean_like(value):
        return bool(value)
    raise TypeError(f"{call}: {name}={value!r} is {_type_name(value)}, not a bool")


def _boolean_like(value: object) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")


def _type_name(value: object) -> str:
    return type(value).__name__


def finite_scale(call: str, scale: object) -> float:
    """`scale` as a float; TypeError unless it is a real number, ValueError unless finite."""
    if not isinstance(scale, Real) or _boolean_like(scale):
        raise TypeError(f"{call}: scale={scale!r} is {_type_name(scale)}, not a real number")
    try:
        result = float(scale)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"{call}: scale={scale!r} is not finite")
    return result


def neighborhood_axes(call: str, tokens: Sequence[int], window: Window) -> tuple[Axis, ...]:
    """One `Axis` per token axis, every rule of the window checked."""
    axes = []
    for axis, (length, k, s, d, causal) in enumerate(zip(tokens, *window, strict=True)):
        for name, size in (("kernel_size", k), ("dilation", d), ("stride", s)):
            if size < 1:
                raise ValueError(f"{call}: {name}={size} on axis {axis} must be at least 1")
        if s > k:
            raise ValueError(f"{call}: stride={s} on axis {axis} must not exceed kernel_size={k}")
        if length and k * d > length:
            raise ValueError(
                f"{call}: kernel_size={k} times dilation={d} on axis {axis} is {k * d}, "
                f"which exceeds that axis's length {length}"
            )
        axes.append(Axis(length, length, k, s, d, causal))
    return tuple(axes)


def kept(build: Callable[..., Problem]) -> Callable[..., Problem]:
    """`build` with its problems kept, but for those of sizes that have no hash.

    Such are the symbolic sizes of a framework that is tracing: every comparison they go through
    becomes a condition under which the trace holds.
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
    operation: Literal["forward", "backward"],
    query: Spec,
    key: Spec,
    value: Spec,
    window: Window,
    scale: float | None,
    additional_keys: Spec | None = None,
    additional_values: Spec | None = None,
    rpb: Spec | None = None,
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
    axes = neighborhood_axes(call, query.shape[1:-2], window)
    problem = Problem(
        operation=operation,
        dtype=query.dtype,
        batch=query.shape[0],
        heads=query.shape[-2],
        kv_heads=key.shape[-2],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        axes=axes,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        additional=_additional_count(call, "additional_keys", additional_keys),
        rpb_dtype=_rpb_dtype(call, rpb, query, axes),
    )
    _check_all(
        call,
        problem,
        Operands(query, key, value, additional_keys, additional_values, rpb),
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
) -> Problem:
    """The problem of `na{r}d_qk` or its backward."""
    rank = len(window.kernel_size)
    _check_query_and_key(call, rank, query, key, additional_keys)
    axes = neighborhood_axes(call, query.shape[1:-2], window)
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
    )
    _check_all(call, problem, Operands(query, key, None, additional_keys, None, rpb))
    return problem


@kept
def av_problem(
    call: str,
    operation: Literal["av", "av_backward"],
    weights: Spec,
    value: Spec,
    window: Window,
    additional_values: Spec | None = None,
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
        axes=neighborhood_axes(call, weights.shape[1:-2], window),
        scale=1.0,
        additional=_additional_count(call, "additional_values", additional_values),
    )
    _check_all(call, problem, Operands(None, None, value, None, additional_values, None))
    require(call, "weights", weights, problem.logits)
    return problem


@kept
def dense_problem(
    call: str,
    operation: Literal["forward", "backward"],
    query: Spec,
    key: Spec,
    value: Spec,
    is_causal: bool,
    scale: float | None,
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
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    _check_all(call, problem, Operands(query, key, value))
    return problem


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
        if spec is not None:
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
        raise TypeError(
            f"{call}: {name} has dtype {spec.dtype}, which is not one of {', '.join(DTYPES)}"
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
