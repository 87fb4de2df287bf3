"""Calls of the public functions that break exactly one rule, and what the error must say.

`legal_calls` draws calls whose arrays are given as `Spec`s; every function of `RULES` breaks such a
call in one way. `illegal_calls` draws a call and a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from helpers.strategies import OPERATIONS, numpy_dtype, problems
from hypothesis import strategies as st

from cuneigh._problem import DTYPES, Problem, Spec

WINDOW = ("kernel_size", "stride", "dilation", "is_causal")
OF_LAYOUT = ("border", "layout", "query_start", "key_start")


@dataclass(frozen=True)
class Call:
    """A call of ``cuneigh.<function>(**arguments)``; arrays are given as `Spec`s."""

    function: str
    arguments: dict[str, Any]
    problem: Problem = field(repr=False)

    @property
    def is_dense(self) -> bool:
        return self.function == "attention"

    def but(self, **changes: Any) -> Call:
        return Call(self.function, self.arguments | changes, self.problem)


@dataclass(frozen=True)
class Illegal:
    """A broken call, the exception that it must raise and words that the message must have."""

    call: Call
    error: type[Exception]
    words: tuple[str, ...]


def is_cross(problem: Problem) -> bool:
    """Whether it is the attention of queries to other keys, all of which they see."""
    (axis, *more), beside = problem.axes, (problem.additional, problem.rpb_dtype)
    is_alone = not more and beside == (None, None)
    return is_alone and axis.length != axis.key_length and not axis.is_part


def call_of(problem: Problem) -> Call:
    """The public call, with all its arguments, that computes `problem`."""
    arrays = {name: spec for name, spec in problem.specs._asdict().items() if spec is not None}
    axes = problem.axes
    if is_cross(problem):
        arguments = {**arrays, "is_causal": axes[0].is_causal, "scale": problem.scale}
        return Call("attention", arguments, problem)
    if problem.operation[:2] != "av":
        arrays["scale"] = problem.scale
    else:
        arrays["weights"] = problem.logits
    if problem.operation == "backward":
        arrays |= dict.fromkeys(("grad_output", "output"), problem.output)
        arrays |= dict.fromkeys(("lse", "grad_lse"), problem.lse)
    if problem.operation == "qk_backward":
        arrays["grad_logits"] = problem.logits
    if problem.operation == "av_backward":
        arrays["grad_output"] = problem.output
    is_whole = all(axis.is_ordinary and axis.length == axis.key_length for axis in axes)
    names = WINDOW if is_whole else (*WINDOW, *OF_LAYOUT)
    window = {name: tuple(getattr(axis, name) for axis in axes) for name in names}
    suffix = "" if problem.operation == "forward" else f"_{problem.operation}"
    return Call(f"na{problem.rank}d{suffix}", {**arrays, **window}, problem)


@st.composite
def legal_calls(draw, operations: tuple[str, ...] = OPERATIONS) -> Call:
    """Legal calls; `attention` is among them with the operation "forward"."""
    operation = draw(st.sampled_from(operations))
    small = {"operations": (operation,), "most_tokens": 60, "budget": 5_000}
    # `attention` has no public backward.
    cross = operation == "forward" and draw(st.booleans())
    return call_of(draw(problems(cross=cross, **small)))


@st.composite
def illegal_calls(draw, operations: tuple[str, ...] = OPERATIONS) -> Illegal:
    call = draw(legal_calls(operations))
    return draw(st.sampled_from([rule for rule in RULES if rule.applies(call)])).break_(draw, call)


def placeholder(spec: Spec) -> np.ndarray:
    """A NumPy array for a `Spec`, of unsupported dtypes too."""
    return np.zeros(spec.shape, numpy_dtype(spec.dtype))


# The rules. Each takes `draw` and a legal call to which it applies.

Break = Callable[[Callable[[st.SearchStrategy[Any]], Any], Call], Illegal]


@dataclass(frozen=True)
class Rule:
    break_: Break
    applies: Callable[[Call], bool]
    operations: tuple[str, ...] = OPERATIONS
    """Those among whose calls there are some to which the rule applies."""


RULES: list[Rule] = []
HAVE_BIAS = ("forward", "backward", "qk", "qk_backward")


def rule(
    applies: Callable[[Call], bool], operations: tuple[str, ...] = OPERATIONS
) -> Callable[[Break], Break]:
    def register(break_: Break) -> Break:
        RULES.append(Rule(break_, applies, operations))
        return break_

    return register


def always(call: Call) -> bool:
    return True


def has_window(call: Call) -> bool:
    return not call.is_dense


def has(*names: str) -> Callable[[Call], bool]:
    return lambda call: all(name in call.arguments for name in names)


def some_axis(draw, call: Call) -> int:
    return draw(st.integers(0, call.problem.rank - 1))


def with_entry(call: Call, name: str, axis: int, entry: Any) -> Call:
    """The call with one entry of a window argument replaced."""
    entries = call.arguments[name]
    return call.but(**{name: (*entries[:axis], entry, *entries[axis + 1 :])})


def resized(spec: Spec, axis: int, size: int) -> Spec:
    axis %= len(spec.shape)
    return spec._replace(shape=(*spec.shape[:axis], size, *spec.shape[axis + 1 :]))


@rule(has_window)
def less_than_one(draw, call: Call) -> Illegal:
    name, axis = draw(st.sampled_from(WINDOW[:3])), some_axis(draw, call)
    value = draw(st.sampled_from([0, -1, -7]))
    broken = with_entry(call, name, axis, value)
    return Illegal(broken, ValueError, (f"{name}={value}", f"axis {axis}"))


@rule(lambda call: has_window(call) and "rpb" not in call.arguments)
def stride_above_kernel_size(draw, call: Call) -> Illegal:
    axis = some_axis(draw, call)
    kernel_size = call.arguments["kernel_size"][axis]
    stride = kernel_size + draw(st.integers(1, 3))
    return Illegal(
        with_entry(call, "stride", axis, stride),
        ValueError,
        (f"stride={stride}", f"kernel_size={kernel_size}", f"axis {axis}"),
    )


@rule(lambda call: has_window(call) and "rpb" not in call.arguments)
def window_beyond_the_axis(draw, call: Call) -> Illegal:
    axis = some_axis(draw, call)
    length = call.problem.tokens[axis]
    kernel_size, dilation = (call.arguments[name][axis] for name in ("kernel_size", "dilation"))
    if draw(st.booleans()):
        kernel_size = length // dilation + draw(st.integers(1, 3))
    else:
        dilation = length // kernel_size + draw(st.integers(1, 3))
    broken = with_entry(call, "kernel_size", axis, kernel_size)
    return Illegal(
        with_entry(broken, "dilation", axis, dilation),
        ValueError,
        (f"kernel_size={kernel_size}", f"dilation={dilation}", f"axis {axis}", f"{length}"),
    )


@rule(has_window)
def window_argument_of_a_wrong_type(draw, call: Call) -> Illegal:
    name = draw(st.sampled_from(WINDOW))
    wrong = [1, 1.0, "1", None] if name == "is_causal" else [1.0, np.float32(1), True, "1", None]
    value = draw(st.sampled_from(wrong))
    if draw(st.booleans()):
        return Illegal(call.but(**{name: value}), TypeError, (name, repr(value)))
    axis = some_axis(draw, call)
    broken = with_entry(call, name, axis, value)
    return Illegal(broken, TypeError, (f"{name}[{axis}]", repr(value)))


@rule(has_window)
def window_argument_of_a_wrong_length(draw, call: Call) -> Illegal:
    name = draw(st.sampled_from(WINDOW))
    entries = call.arguments[name]
    entries = draw(st.sampled_from([entries[:-1], (*entries, entries[0])]))
    words = (name, repr(entries), f"{call.problem.rank} token axes")
    return Illegal(call.but(**{name: entries}), ValueError, words)


@rule(lambda call: call.is_dense, operations=("forward",))
def causal_attention_to_other_keys(draw, call: Call) -> Illegal:
    lengths = [call.arguments[name].shape[1] for name in ("query", "key")]
    return Illegal(call.but(is_causal=True), ValueError, ("is_causal=True", *map(str, lengths)))


@rule(has("scale"))
def scale_not_finite(draw, call: Call) -> Illegal:
    scale = draw(st.sampled_from([math.nan, math.inf, -math.inf, np.float32("nan"), 10**400]))
    return Illegal(call.but(scale=scale), ValueError, (f"scale={scale!r}",))


@rule(has("scale"))
def scale_of_a_wrong_type(draw, call: Call) -> Illegal:
    scale = draw(st.sampled_from(["1", 1j, True, (1.0,)]))
    return Illegal(call.but(scale=scale), TypeError, (f"scale={scale!r}",))


@rule(has_window)
def wrong_rank(draw, call: Call) -> Illegal:
    arrays = sorted(name for name, value in call.arguments.items() if isinstance(value, Spec))
    name = draw(st.sampled_from(arrays))
    spec = call.arguments[name]
    shape = draw(st.sampled_from([spec.shape[1:], (1, *spec.shape), ()]))
    broken = call.but(**{name: spec._replace(shape=shape)})
    return Illegal(broken, ValueError, (name, f"{len(shape)} axes", str(shape)))


@rule(always)
def wrong_size(draw, call: Call) -> Illegal:
    """One axis of one array has another size than all the others imply."""
    name, axis = draw(st.sampled_from(implied_sizes(call)))
    spec = call.arguments[name]
    # Never a size of zero: some axes have rules of their own about it.
    size = spec.shape[axis] + draw(st.sampled_from([1, 2, -1]))
    size = spec.shape[axis] + 1 if size < 1 else size
    words = (name, f"{size}", f"axis {axis % len(spec.shape)}")
    return Illegal(call.but(**{name: resized(spec, axis, size)}), ValueError, words)


def implied_sizes(call: Call) -> list[tuple[str, int]]:
    """(argument, axis) whose size follows from the arguments named before it."""
    places = []
    for name, value in call.arguments.items():
        if not isinstance(value, Spec):
            continue
        axes = set(range(len(value.shape)))
        first = "query" if "query" in call.arguments else "weights"
        if name == first:  # decides batch, tokens, heads; its last axis is implied in weights
            axes &= {len(value.shape) - 1} if name == "weights" else set()
        if name == "key":  # decides kv_heads, and the key tokens of cross attention
            axes -= {len(value.shape) - 2} | ({1} if call.is_dense else set())
        if name == "value":  # decides value_dim, and kv_heads where there is no key
            axes -= {len(value.shape) - 1}
            axes -= set() if "key" in call.arguments else {len(value.shape) - 2}
        # n is decided by additional_keys, or by additional_values where there are none.
        if name == "additional_keys" or (
            name == "additional_values" and "additional_keys" not in call.arguments
        ):
            axes -= {1}
        places += [(name, axis) for axis in sorted(axes)]
    return places


@rule(always)
def heads_not_a_multiple(draw, call: Call) -> Illegal:
    """More key heads than query heads, or none for some query heads."""
    heads = call.problem.heads
    kv_heads = draw(st.sampled_from([0, heads + 1]))
    changes = {
        name: resized(call.arguments[name], -2, kv_heads)
        for name in ("key", "value", "additional_keys", "additional_values")
        if name in call.arguments
    }
    names = [
        "query" if "query" in call.arguments else "weights",
        "key" if "key" in call.arguments else "value",
    ]
    words = (*names, f"{heads} heads", f"{kv_heads} heads")
    return Illegal(call.but(**changes), ValueError, words)


@rule(has("query"))
def no_head_dim(draw, call: Call) -> Illegal:
    changes = {
        name: resized(call.arguments[name], -1, 0)
        for name in ("query", "key", "additional_keys")
        if name in call.arguments
    }
    return Illegal(call.but(**changes), ValueError, ("query", "head_dim"))


@rule(has("value"))
def no_value_dim(draw, call: Call) -> Illegal:
    changes = {
        name: resized(call.arguments[name], -1, 0)
        for name in ("value", "additional_values", "output", "grad_output")
        if name in call.arguments
    }
    return Illegal(call.but(**changes), ValueError, ("value", "value_dim"))


@rule(always)
def unsupported_dtype(draw, call: Call) -> Illegal:
    name = "query" if "query" in call.arguments else "weights"
    dtype = draw(st.sampled_from(["int32", "bool", "complex64", "uint8"]))
    broken = call.but(**{name: call.arguments[name]._replace(dtype=dtype)})
    return Illegal(broken, TypeError, (name, dtype))


@rule(always)
def mixed_dtypes(draw, call: Call) -> Illegal:
    first = "query" if "query" in call.arguments else "weights"
    others = [
        name
        for name, value in call.arguments.items()
        if isinstance(value, Spec) and name not in (first, "rpb")
    ]
    name = draw(st.sampled_from(others))
    spec = call.arguments[name]
    dtype = draw(st.sampled_from([other for other in DTYPES if other != spec.dtype]))
    broken = call.but(**{name: spec._replace(dtype=dtype)})
    return Illegal(broken, TypeError, (name, dtype, spec.dtype))


@rule(has("rpb"), HAVE_BIAS)
def rpb_of_another_dtype(draw, call: Call) -> Illegal:
    own = call.problem.dtype
    dtype = draw(st.sampled_from([name for name in DTYPES if name not in (own, "float32")]))
    broken = call.but(rpb=call.arguments["rpb"]._replace(dtype=dtype))
    return Illegal(broken, TypeError, ("rpb", dtype, own))


@rule(has("rpb"), HAVE_BIAS)
def rpb_on_a_causal_axis(draw, call: Call) -> Illegal:
    axis = some_axis(draw, call)
    broken = with_entry(call, "is_causal", axis, True)
    return Illegal(broken, ValueError, ("rpb", "is_causal=True", f"axis {axis}"))


@rule(lambda call: "rpb" in call.arguments and max(call.arguments["kernel_size"]) > 1, HAVE_BIAS)
def rpb_with_a_stride(draw, call: Call) -> Illegal:
    wide = [axis for axis, size in enumerate(call.arguments["kernel_size"]) if size > 1]
    axis = draw(st.sampled_from(wide))
    stride = draw(st.integers(2, call.arguments["kernel_size"][axis]))
    broken = with_entry(call, "stride", axis, stride)
    return Illegal(broken, ValueError, ("rpb", f"stride={stride}", f"axis {axis}"))


@rule(has_window)
def unknown_border(draw, call: Call) -> Illegal:
    border, error = draw(
        st.sampled_from([("clamp", ValueError), (1, TypeError), (None, TypeError)])
    )
    return Illegal(call.but(border=border), error, (f"border={border!r}",))


@rule(lambda call: has_window(call) and any(call.arguments["is_causal"]))
def causal_ring(draw, call: Call) -> Illegal:
    axis = call.arguments["is_causal"].index(True)
    borders = tuple("wrap" if r == axis else "cut" for r in range(call.problem.rank))
    return Illegal(call.but(border=borders), ValueError, ("border='wrap'", f"axis {axis}"))


@rule(lambda call: has_window(call) and not any(call.arguments["is_causal"]))
def ring_without_whole_groups(draw, call: Call) -> Illegal:
    axis = some_axis(draw, call)
    length = call.problem.tokens[axis]
    broken = with_entry(call, "dilation", axis, length + 1)
    borders = tuple("wrap" if r == axis else "cut" for r in range(call.problem.rank))
    words = (f"dilation={length + 1}", f"axis {axis}", f"{length}")
    return Illegal(broken.but(border=borders), ValueError, words)


@rule(has_window)
def start_without_layout(draw, call: Call) -> Illegal:
    name = draw(st.sampled_from(["query_start", "key_start"]))
    start = draw(st.integers(1, 5))
    return Illegal(call.but(**{name: start}), ValueError, (f"{name}={start}", "axis 0", "layout"))


@rule(has_window)
def part_beyond_its_layout(draw, call: Call) -> Illegal:
    name, axis = draw(st.sampled_from(["query_start", "key_start"])), some_axis(draw, call)
    start = draw(st.sampled_from([-1, 1, 3]))
    starts = tuple(start if r == axis else 0 for r in range(call.problem.rank))
    broken = call.but(layout=call.problem.tokens, **{name: starts})
    return Illegal(broken, ValueError, (f"{name}={start}", f"axis {axis}"))


@rule(has_window)
def part_argument_of_a_wrong_type(draw, call: Call) -> Illegal:
    name = draw(st.sampled_from(OF_LAYOUT[1:]))
    value = draw(st.sampled_from([1.0, True, "1"]))
    return Illegal(call.but(**{name: value}), TypeError, (f"{name}={value!r}",))


@rule(always, operations=("forward", "backward", "qk", "av"))
def mask_of_another_shape_or_dtype(draw, call: Call) -> Illegal:
    problem = call.problem
    mask = Spec((problem.batch, *problem.key_tokens), "bool")
    axis = draw(st.integers(0, problem.rank))
    if draw(st.booleans()):
        dtype = draw(st.sampled_from(["float32", "uint8"]))
        return Illegal(
            call.but(key_mask=mask._replace(dtype=dtype)), TypeError, ("key_mask", dtype)
        )
    size = mask.shape[axis] + 1
    words = ("key_mask", f"{size}", f"axis {axis}")
    return Illegal(call.but(key_mask=resized(mask, axis, size)), ValueError, words)


@rule(has("additional_keys", "additional_values"), operations=("forward", "backward"))
def half_of_the_additional_tokens(draw, call: Call) -> Illegal:
    missing = draw(st.sampled_from(["additional_keys", "additional_values"]))
    broken = call.but(**{missing: None})
    return Illegal(broken, ValueError, ("additional_keys", "additional_values"))
