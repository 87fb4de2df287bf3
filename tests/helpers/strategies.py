"""Hypothesis strategies for the whole parameter space: problems and their arrays.

`problems` draws a `Problem`; `inputs` makes arrays for it, in any memory layout. What a problem
costs is bounded by a budget, so that the same strategies serve a slow interpreter and a GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from cuneigh._parameters import Part, Window
from cuneigh._problem import DTYPES, OfResults, Operands, Problem, Spec
from cuneigh._validate import attention_problem, av_problem, dense_problem, qk_problem
from cuneigh.reference import window_slots

OPERATIONS = ("forward", "backward", "qk", "qk_backward", "av", "av_backward")
"""Those of public functions; backends have ``jvp`` and ``hvp``, too."""
LAYOUTS = ("contiguous", "packed", "heads_first", "reversed", "broadcast", "padded", "mixed")
SMALL_DIMS = (1, 2, 3, 4, 5, 7, 8, 16, 17, 32)
LARGE_DIMS = (33, 40, 64, 65, 80, 96, 128, 200, 256)
LENGTHS = ("length", "key_length", "layout")
BUDGET = 200_000
"""Multiplications of one product of a forward: a few milliseconds of the oracle."""


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


# Problems


def biased(low: int, high: int) -> st.SearchStrategy[int]:
    """An integer from low to high, both ends more often than what lies between."""
    return st.one_of(st.just(low), st.integers(low, high), st.just(high))


@st.composite
def windows(draw, tokens: tuple[int, ...], rpb: bool = False) -> Window:
    """Legal window arguments for a layout; with rpb those that a bias can be combined with."""
    axes = []
    for length in tokens:
        longest = max(length, 1)
        # Windows of a few tokens, most often, so that they have somewhere to slide.
        few = st.integers(min(2, longest), min(6, longest))
        kernel_size = draw(st.one_of(few, few, biased(1, longest)))
        widest = longest // kernel_size
        dilation = draw(st.one_of(st.just(1), st.integers(min(2, widest), widest)))
        stride = 1 if rpb else draw(st.one_of(st.just(1), biased(min(2, kernel_size), kernel_size)))
        axes.append((kernel_size, stride, dilation, not rpb and draw(st.booleans())))
    return Window(*zip(*axes, strict=True))


@st.composite
def parts_of(draw, layout: tuple[int, ...], window: Window, fewest: int):
    """A window like `window`, a part of a layout, and the lengths of its queries and keys.

    There are at least `fewest` keys along each axis.
    """
    kernel_sizes, of_axes = [], []
    for length, k, d, causal in zip(layout, window[0], window[2], window[3], strict=True):
        ring = ["wrap"] if not causal and length % d == 0 else []
        border = draw(st.sampled_from(["shift", "cut", *ring]))
        kernel_sizes.append(k + draw(st.sampled_from([0, 3])) if border == "cut" else k)
        sides = []
        for least in (1, fewest):
            count = draw(st.one_of(st.just(length), st.integers(least, length)))
            last = length - count if border != "wrap" else 2 * length
            sides.append((count, draw(st.integers(0, last))))
        (queries, start), (keys, key_start) = sides
        of_axes.append((border, length, start, key_start, queries, keys))
    *part, tokens, keys = zip(*of_axes, strict=True)
    return window._replace(kernel_size=tuple(kernel_sizes)), Part(*part), tokens, keys


@st.composite
def token_counts(draw, rank: int, most: int) -> tuple[int, ...]:
    """Axis lengths whose product is at most `most`."""
    tokens = []
    for left in range(rank, 0, -1):
        longest = most if left == 1 else min(math.ceil(2 * most ** (1 / left)), most)
        tokens.append(draw(st.integers(1, longest)))
        most //= tokens[-1]
    return tuple(tokens)


def scales() -> st.SearchStrategy[float]:
    return st.one_of(
        st.sampled_from([1.0, 0.0, -1.0, 0.125]), st.floats(-2.0, 2.0, width=32, allow_nan=False)
    )


@st.composite
def problems(
    draw,
    operations: tuple[str, ...] = OPERATIONS,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    ranks: tuple[int, ...] = (1, 2, 3),
    most_tokens: int = 200,
    budget: int = BUDGET,
    cross: bool | None = None,
    ordinary: bool = True,
) -> Problem:
    """A problem that is not empty.

    Unless it is to be `ordinary` it has any borders, any parts of its layout, and perhaps a mask.

    Whether it is the attention of N queries to M keys, as `attention` makes it, is drawn unless
    `cross` says so.
    """
    operation, dtype = draw(st.sampled_from(operations)), draw(st.sampled_from(dtypes))
    if cross is None:
        cross = operation in ("forward", "backward", "jvp", "hvp") and draw(st.integers(0, 3)) == 3
    rank = 1 if cross else draw(st.sampled_from(ranks))
    most_tokens = min(most_tokens, math.isqrt(budget))
    tokens = draw(token_counts(rank, most_tokens))
    has_rpb = not cross and operation[:2] != "av" and draw(st.booleans())
    keys, additional, part = tokens, None, None
    has_mask = not ordinary and draw(st.booleans())
    if cross:
        is_causal = draw(st.integers(0, 3)) == 3
        keys = tokens if is_causal else draw(token_counts(1, most_tokens))
        slots = keys[0]
    else:
        window = draw(windows(tokens, rpb=has_rpb))
        additional = draw(st.none() | st.integers(0, 5))
        if not ordinary:
            fewest = 0 if additional else 1
            window, part, tokens, keys = draw(parts_of(tokens, window, fewest))
        slots = math.prod(window.kernel_size) + (additional or 0)
    # What is left of the budget goes to the channels, the heads and the batch, in a drawn order.
    left = max(budget // (math.prod(tokens) * slots), 1)
    for name in draw(st.permutations(["dims", "heads", "batch"])):
        if name == "dims":
            choices = [dim for dim in SMALL_DIMS + LARGE_DIMS if dim <= left] or [1]
            head_dim, value_dim = (
                (draw(st.sampled_from(choices)),) * 2
                if draw(st.booleans())
                else (draw(st.sampled_from(choices)), draw(st.sampled_from(choices)))
            )
            left //= max(head_dim, value_dim)
        elif name == "heads":
            kv_heads = draw(st.integers(1, max(min(3, left), 1)))
            group_size = draw(st.integers(1, max(min(4, left // kv_heads), 1)))
            left //= kv_heads * group_size
        else:
            batch = draw(st.integers(1, max(min(3, left), 1)))
            left //= batch
    heads = kv_heads * group_size
    query = Spec((batch, *tokens, heads, head_dim), dtype)
    key = Spec((batch, *keys, kv_heads, head_dim), dtype)
    value = Spec((batch, *keys, kv_heads, value_dim), dtype)
    scale = draw(scales())
    if cross:
        mask = Spec((batch, *keys), "bool") if has_mask else None
        return dense_problem("attention", operation, query, key, value, is_causal, scale, mask)
    extra_keys = extra_values = bias = None
    if additional is not None:
        extra_keys = Spec((batch, additional, kv_heads, head_dim), dtype)
        extra_values = Spec((batch, additional, kv_heads, value_dim), dtype)
    if has_rpb:
        shape = (heads, *(2 * k - 1 for k in window.kernel_size))
        bias = Spec(shape, draw(st.sampled_from([dtype, "float32"])))
    call = f"na{rank}d"
    given = part, Spec((batch, *keys), "bool") if has_mask else None
    if operation[:2] == "qk":
        return qk_problem(call, operation, query, key, window, scale, bias, extra_keys, *given)
    if operation[:2] == "av":
        weights = Spec((batch, *tokens, heads, slots), dtype)
        return av_problem(call, operation, weights, value, window, extra_values, *given)
    return attention_problem(
        call, operation, query, key, value, window, scale, extra_keys, extra_values, bias, *given
    )


@st.composite
def empty_problems(draw, **arguments: Any) -> Problem:
    """A problem of which the batch, the heads or a token axis have size zero."""
    problem = draw(problems(**arguments))
    emptied = draw(st.sampled_from(["batch", "heads", "all heads", *range(problem.rank)]))
    if emptied == "batch":
        return replace(problem, batch=0)
    if emptied == "heads":
        return replace(problem, heads=0)
    if emptied == "all heads":
        return replace(problem, heads=0, kv_heads=0)
    axes = list(problem.axes)
    is_cross = axes[emptied].length != axes[emptied].key_length
    side = draw(st.sampled_from(["length", "key_length"])) if is_cross else None
    zero = {side: 0} if side else dict.fromkeys(LENGTHS, 0)
    axes[emptied] = replace(axes[emptied], **zero)
    return replace(problem, axes=tuple(axes))


# Arrays


class Inputs(NamedTuple):
    """NumPy arrays for every input of an operation; None for what it does not take."""

    operands: Operands
    weights: Any = None
    grad_output: Any = None
    grad_lse: Any = None
    grad_logits: Any = None
    wants_lse: bool = True
    """Whether a forward is asked for its lse."""
    tangents: Operands | None = None
    """Of the operands, finite."""
    tangents_incoming: OfResults = OfResults()
    """Of the gradients of the results."""


def layouts() -> st.SearchStrategy[str]:
    return st.sampled_from(LAYOUTS)


def generators() -> st.SearchStrategy[np.random.Generator]:
    """Seeded generators: hypothesis draws the structure of an example, these its numbers."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


def array(spec: Spec, rng: np.random.Generator, layout: str = "contiguous") -> np.ndarray:
    """Normally distributed numbers, or bools, laid out in memory as `layout` says.

    Whatever lies in memory between the elements of a strided array is NaN.
    """
    dtype = numpy_dtype(spec.dtype)
    if layout == "mixed":
        layout = str(rng.choice([name for name in LAYOUTS if name != "mixed"]))
    if layout == "broadcast":
        repeated = rng.random(len(spec.shape)) < 0.5
        kept = tuple(
            min(n, 1) if again else n for n, again in zip(spec.shape, repeated, strict=True)
        )
        return np.broadcast_to(numbers_of(rng, kept, dtype), spec.shape)
    numbers = numbers_of(rng, spec.shape, dtype)
    if layout == "reversed":
        turned = tuple(slice(None, None, -1 if rng.random() < 0.5 else 1) for _ in spec.shape)
        return np.ascontiguousarray(numbers[turned])[turned]
    if layout == "heads_first":  # [batch, heads, tokens, dim] in memory
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(numbers, -2, 1)), 1, -2)
    if layout == "packed":  # one of query, key and value in [batch, tokens, 3, heads, dim]
        memory = np.full((*spec.shape[:-2], 3, *spec.shape[-2:]), np.nan, dtype)
        place = memory[..., int(rng.integers(3)), :, :]
        place[...] = numbers
        return place
    if layout == "padded":  # every second element of rows that are longer than they need be
        memory = np.full((*spec.shape[:-1], 2 * spec.shape[-1] + 3), np.nan, dtype)
        place = memory[..., 1 : 1 + 2 * spec.shape[-1] : 2]
        place[...] = numbers
        return place
    assert layout == "contiguous", layout
    return numbers


def numbers_of(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Normally distributed, or True with a random probability."""
    if dtype.kind == "b":
        mask = rng.random(shape) < rng.choice([0.0, 0.3, 0.9, 1.0])
        if rng.random() < 0.3:  # whole boxes of keys, too
            mask[:, rng.integers(max(shape[1], 1)) :] = False
        return mask
    return rng.standard_normal(shape).astype(dtype)


def operands(problem: Problem, rng: np.random.Generator, layout: str = "contiguous") -> Operands:
    """The arguments of a problem; now and then rpb hides some neighbors with -inf, or all.

    Masked keys, and values of masked keys, are NaN.
    """
    drawn = Operands(
        *(None if spec is None else array(spec, rng, layout) for spec in problem.specs)
    )
    if drawn.rpb is not None and rng.random() < 0.3:
        hidden = rng.random(drawn.rpb.shape) < rng.choice([0.1, 0.5, 1.0])
        drawn = drawn._replace(rpb=np.where(hidden, -np.inf, drawn.rpb).astype(drawn.rpb.dtype))
    if drawn.key_mask is not None:
        for side in ("key", "value"):
            if (tokens := getattr(drawn, side)) is not None and not drawn.key_mask.all():
                tokens = tokens if tokens.flags.writeable else tokens.copy()
                tokens[~drawn.key_mask] = np.nan
                drawn = drawn._replace(**{side: tokens})
    return drawn


def inputs(problem: Problem, rng: np.random.Generator, layout: str = "contiguous") -> Inputs:
    """Everything that the operation of `problem` reads.

    Weights and the gradient of logits hold NaN in hidden slots, which nobody may read.
    """
    arguments = operands(problem, rng, layout)
    match problem.operation:
        case "forward":
            return Inputs(arguments, wants_lse=bool(rng.random() < 0.7))
        case "backward":
            grad_lse = array(problem.lse, rng, layout) if rng.random() < 0.5 else None
            return Inputs(
                arguments, grad_output=array(problem.output, rng, layout), grad_lse=grad_lse
            )
        case "jvp":
            tangents = (
                None if spec is None else array(spec, rng, layout) for spec in problem.specs
            )
            return Inputs(arguments, tangents=Operands(*tangents))
        case "hvp":
            tangents = (
                None if spec is None else array(spec, rng, layout) for spec in problem.specs
            )
            moved, grad_lse, moved_lse = (
                array(spec, rng, layout) if rng.random() < 0.5 else None
                for spec in (problem.output, problem.lse, problem.lse)
            )
            return Inputs(
                arguments,
                grad_output=array(problem.output, rng, layout),
                grad_lse=grad_lse,
                tangents=Operands(*tangents),
                tangents_incoming=OfResults(moved, moved_lse),
            )
        case "qk":
            return Inputs(arguments)
        case "qk_backward":
            return Inputs(arguments, grad_logits=poisoned_logits(problem, arguments, rng, layout))
        case "av":
            return Inputs(arguments, weights=poisoned_logits(problem, arguments, rng, layout))
        case "av_backward":
            return Inputs(
                arguments,
                weights=poisoned_logits(problem, arguments, rng, layout),
                grad_output=array(problem.output, rng, layout),
            )


def poisoned_logits(
    problem: Problem, arguments: Operands, rng: np.random.Generator, layout: str
) -> np.ndarray:
    """An array like the logits of a problem, NaN in hidden slots."""
    numbers = array(problem.logits, rng, layout)
    visible = visible_slots(problem, arguments)
    if visible.all():
        return numbers
    if not numbers.flags.writeable:  # broadcast over queries, some of which see less than others
        numbers = numbers.copy()
    numbers[np.broadcast_to(~visible[..., None, :], numbers.shape)] = np.nan
    return numbers


def visible_slots(problem: Problem, arguments: Operands) -> np.ndarray:
    """[batch, X1..Xr, slots]: False where a slot holds no key that the query sees."""
    slots = window_slots(problem, arguments).visible
    return np.broadcast_to(slots, (problem.batch, *slots.shape[1:])).reshape(
        problem.batch, *problem.tokens, problem.slots
    )
