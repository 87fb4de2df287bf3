"""`Problem`: what is to be computed, apart from the numbers in the arrays.

A `Problem` is made of shapes, dtypes and parameters and touches no array. `_validate` makes one of
the arguments of a call and raises for whatever is illegal; backends never check again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, reduce
from operator import and_
from typing import Any, Literal, NamedTuple

from cuneigh._window import CONTRACT, Axis, Promise


class Dtype(NamedTuple):
    """What there is to know of a dtype that queries, keys and values may have."""

    itemsize: int
    accumulator: str = "float32"
    """The dtype of lse, and the least precise one in which sums are taken."""
    has_gradients: bool = True
    """False for a dtype of which there is a forward pass only."""


SUPPORTED = {
    "float16": Dtype(2),
    "bfloat16": Dtype(2),
    "float32": Dtype(4),
    "float64": Dtype(8, accumulator="float64"),
}
"""The supported dtypes, by the names that NumPy or ml_dtypes has for them."""

DTYPES = {name: dtype.itemsize for name, dtype in SUPPORTED.items()}
"""The supported dtypes and their sizes in bytes."""


class Spec(NamedTuple):
    """Shape and dtype of one array."""

    shape: tuple[int, ...]
    dtype: str


class Operands(NamedTuple):
    """The arrays that attention is computed of, or one gradient for each; None where there is none.

    Backends take their arguments, and the gradients to fill, in this form.
    """

    query: Any = None
    key: Any = None
    value: Any = None
    additional_keys: Any = None
    additional_values: Any = None
    rpb: Any = None
    key_mask: Any = None
    """False where a key is hidden from all queries; it has no gradient."""


DIFFERENTIATED = Operands._fields[:-1]
"""The operands that have gradients, and tangents."""


class JvpResults(NamedTuple):
    """What a jvp computes, in one pass; None for what is not wanted."""

    output: Any = None
    lse: Any = None
    tangent_output: Any = None
    tangent_lse: Any = None


class OfResults(NamedTuple):
    """An array for each result of attention: its gradients, say, or their tangents."""

    output: Any = None
    lse: Any = None


Operation = Literal["forward", "backward", "jvp", "hvp", "qk", "qk_backward", "av", "av_backward"]

TANGENTS = tuple(f"tangent_{name}" for name in DIFFERENTIATED)
"""What a jvp calls the directions in which it differentiates, in the order of the operands."""

INCOMING = ("grad_output", "grad_lse")
"""The gradients of the results, of which a backward makes those of the operands."""


class Arrays(NamedTuple):
    """The names of the arrays that an operation takes and returns, in their order."""

    arguments: tuple[str, ...]
    results: tuple[str, ...]
    """A result of a backward has the name of the array that it is the gradient of.

    One of an hvp has the name of the array whose gradient it is the tangent of.
    """
    gradient: Operation | None = None
    """The operation that gives the gradients of this one; None for one that is itself derived."""

    @property
    def incoming(self) -> tuple[str, ...]:
        """What the gradient of this operation calls the gradients of its results."""
        return tuple(f"grad_{name}" for name in self.results)


ARRAYS: dict[Operation, Arrays] = {
    "forward": Arrays(Operands._fields, ("output", "lse"), "backward"),
    "backward": Arrays(
        (*Operands._fields, "grad_output", "output", "lse", "grad_lse"), DIFFERENTIATED
    ),
    "qk": Arrays(
        ("query", "key", "additional_keys", "rpb", "key_mask"), ("logits",), "qk_backward"
    ),
    "jvp": Arrays((*Operands._fields, *TANGENTS), JvpResults._fields),
    # How the results of a backward, and those of its forward, change where all their arguments do:
    # a product with the Hessian of sum(grad_output * output) + sum(grad_lse * lse).
    "hvp": Arrays(
        (
            *(*Operands._fields, "grad_output", "output", "lse", "grad_lse"),
            *(*TANGENTS, "tangent_grad_output", "tangent_grad_lse"),
        ),
        (*DIFFERENTIATED, "tangent_output", "tangent_lse"),
    ),
    "qk_backward": Arrays(
        ("query", "key", "additional_keys", "rpb", "key_mask", "grad_logits"),
        ("query", "key", "additional_keys", "rpb"),
    ),
    "av": Arrays(("weights", "value", "additional_values", "key_mask"), ("output",), "av_backward"),
    "av_backward": Arrays(
        ("weights", "value", "additional_values", "key_mask", "grad_output"),
        ("weights", "value", "additional_values"),
    ),
}
"""The arrays of every operation. Whatever passes arrays on by name or position reads them here."""

OPTIONAL = frozenset(
    [
        *("additional_keys", "additional_values", "rpb", "key_mask", "grad_lse"),
        *("tangent_additional_keys", "tangent_additional_values", "tangent_rpb"),
        *("tangent_grad_output", "tangent_grad_lse"),
    ]
)
"""Arguments that need not be given; the tangent of one that is given must be, too."""


STARTS = "starts"
"""An argument beside those of an operation: where the queries and the keys start, for each axis.

There is one where parts of a layout start at places that are known only when a program runs; those
of the problem do not count then.
"""


def of_what(name: str) -> str:
    """The name of the array that `name` is the gradient or the tangent of, or `name` itself."""
    return name.removeprefix("tangent_").removeprefix("grad_")


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
    has_key_mask: bool = False

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
        """Whether nothing is computed: there is no batch, head or query, or no key at all."""
        if 0 in (self.batch, self.heads, *self.tokens):
            return True
        return 0 in self.key_tokens and not self.additional

    @cached_property
    def is_ordinary(self) -> bool:
        """Whether nothing but the queries' windows hides keys of a whole layout from them."""
        return not self.has_key_mask and all(axis.is_ordinary for axis in self.axes)

    @cached_property
    def promises(self) -> Promise:
        """What of the contract of `_window` is kept along every axis."""
        return reduce(and_, (axis.promises for axis in self.axes), CONTRACT)

    def at(self, query_start: Sequence[int], key_start: Sequence[int]) -> Problem:
        """The same problem on other parts, of the same sizes, of its layout."""
        starts = zip(self.axes, query_start, key_start, strict=True)
        return replace(self, axes=tuple(axis.at(*start) for axis, *start in starts))

    @cached_property
    def anywhere(self) -> Problem:
        """The same problem on other parts: one for all starts that need no other plan.

        What is kept for calls to come, kernels and plans, is kept by this.
        """
        if not any(axis.is_part for axis in self.axes):
            return self
        return replace(self, axes=tuple(axis.anywhere() for axis in self.axes))

    @cached_property
    def accumulator(self) -> str:
        """The dtype of lse, and the least precise one in which sums are taken."""
        return SUPPORTED[self.dtype].accumulator

    @cached_property
    def gradient(self) -> Problem:
        """The problem of the gradient of this one; TypeError if its dtype has none."""
        operation = ARRAYS[self.operation].gradient
        assert operation is not None, "only what has a gradient is asked for it"
        if not SUPPORTED[self.dtype].has_gradients:
            raise TypeError(f"{self.operation}: dtype {self.dtype} has no gradients")
        return replace(self, operation=operation)

    def but(self, operation: Operation, **changes: Any) -> Problem:
        """The problem of another operation on the same windows."""
        if changes:
            return replace(self, operation=operation, **changes)
        if operation not in self._of_others:
            self._of_others[operation] = replace(self, operation=operation)
        return self._of_others[operation]

    @cached_property
    def _of_others(self) -> dict[Operation, Problem]:
        """Those of other operations that were asked for."""
        return {}

    @cached_property
    def _specs(self) -> dict[str, Spec]:
        """The shape and dtype of every array that the operation, or another on it, may have."""
        queries = (self.batch, *self.tokens, self.heads)
        keys = (self.batch, *self.key_tokens, self.kv_heads)
        specs = {
            "query": Spec((*queries, self.head_dim), self.dtype),
            "key": Spec((*keys, self.head_dim), self.dtype),
            "value": Spec((*keys, self.value_dim), self.dtype),
            "logits": Spec((*queries, self.slots), self.dtype),
            "weights": Spec((*queries, self.slots), self.dtype),
            "output": Spec((*queries, self.value_dim), self.dtype),
            "lse": Spec(queries, self.accumulator),
            STARTS: Spec((2, self.rank), "int32"),
        }
        if self.has_key_mask:
            specs["key_mask"] = Spec((self.batch, *self.key_tokens), "bool")
        if self.additional is not None:
            extra = (self.batch, self.additional, self.kv_heads)
            specs["additional_keys"] = Spec((*extra, self.head_dim), self.dtype)
            specs["additional_values"] = Spec((*extra, self.value_dim), self.dtype)
        if self.rpb_dtype is not None:
            sizes = tuple(2 * axis.kernel_size - 1 for axis in self.axes)
            specs["rpb"] = Spec((self.heads, *sizes), self.rpb_dtype)
        return specs

    def spec(self, name: str) -> Spec:
        """Shape and dtype of the argument or result called `name`; KeyError if it is not given."""
        return self._specs[of_what(name)]

    def has(self, name: str) -> bool:
        """Whether there is an argument or result called `name`."""
        return of_what(name) in self._specs

    @cached_property
    def specs(self) -> Operands:
        """The `Spec` of every operand; None for what this problem does not take."""
        taken = ARRAYS[self.operation].arguments
        return Operands(
            *[self._specs.get(name) if name in taken else None for name in Operands._fields]
        )

    @property
    def gradient_specs(self) -> Operands:
        """The `Spec` of the gradient of every operand; None for what has none or is not taken."""
        return self.specs._replace(key_mask=None)

    @cached_property
    def results(self) -> tuple[Spec | None, ...]:
        """The `Spec` of every result of the operation; None for gradients of what is not given."""
        return tuple(self._specs.get(of_what(name)) for name in ARRAYS[self.operation].results)

    @property
    def output(self) -> Spec:
        return self._specs["output"]

    @property
    def lse(self) -> Spec:
        return self._specs["lse"]

    @property
    def logits(self) -> Spec:
        return self._specs["logits"]

    def visible_pairs(self) -> int:
        """(query, key) pairs that attend to each other, in one batch and one query head.

        Pairs that only a mask hides are counted.
        """
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
        if self.operation in ("jvp", "hvp"):
            return forward * (3 if self.operation == "jvp" else 6)
        return forward * 2 if self.operation.endswith("_backward") else forward

    def bytes(self) -> int:
        """Compulsory memory traffic: every argument read once, every result written once.

        A gradient of lse is not counted, for most calls have none, nor its tangent.
        """
        arguments, results, _ = ARRAYS[self.operation]
        moved = [name for name in (*arguments, *results) if not name.endswith("grad_lse")]
        specs = [self._specs.get(of_what(name)) for name in moved]
        return sum(size_of(spec) for spec in specs if spec is not None)


def size_of(spec: Spec) -> int:
    """Bytes of a dense array."""
    itemsize = 1 if spec.dtype == "bool" else DTYPES[spec.dtype]
    return math.prod(spec.shape) * itemsize
