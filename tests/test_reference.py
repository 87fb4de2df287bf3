"""The oracle against a brute force, dense attention, finite differences and what must be equal.

Everything here is float64 on both sides, and the tolerance is that of `accuracy`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers import brute_force
from helpers.accuracy import assert_close, named
from helpers.expected import expect
from helpers.strategies import (
    Inputs,
    empty_problems,
    generators,
    inputs,
    layouts,
    operands,
    problems,
    visible_slots,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from cuneigh import reference
from cuneigh._problem import Operands, Problem
from cuneigh._window import Axis

FUSED = ("forward", "backward")
LENGTHS = ("length", "key_length", "layout")
small = {"dtypes": ("float64",), "most_tokens": 60, "budget": 20_000}
tiny = {"dtypes": ("float64",), "most_tokens": 18, "budget": 2_000}


def run(module: ModuleType, problem: Problem, given: Inputs) -> dict[str, np.ndarray]:
    """The results of the operation of `problem`, by name; `module` is shaped like the oracle."""
    arguments = given.operands
    match problem.operation:
        case "forward":
            output, lse = module.forward(problem, arguments)
            return {"output": output, "lse": lse}
        case "backward":
            grad_lse = np.zeros(problem.lse.shape) if given.grad_lse is None else given.grad_lse
            return named(module.backward(problem, arguments, given.grad_output, grad_lse))
        case "qk":
            return {"logits": module.qk(problem, arguments)}
        case "qk_backward":
            return named(module.qk_backward(problem, arguments, given.grad_logits))
        case "av":
            return {"output": module.av(problem, given.weights, arguments)}
        case "av_backward":
            grad_weights, gradients = module.av_backward(
                problem, given.weights, arguments, given.grad_output
            )
            return {"grad weights": grad_weights, **named(gradients)}


def assert_same(
    problem: Problem, given: Inputs, got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]
) -> None:
    """Both are results of `problem`, equal up to what float64 makes of its sums."""
    expected, max_logit = expect(problem, given)
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert_close(
            name,
            got[name],
            array,
            expected[name].obvious,
            expected[name].term_bound,
            "float64",
            max_logit,
            context=problem,
        )


# The definition


@given(problems(**tiny), generators())
def test_brute_force(problem, rng):
    check_against_brute_force(problem, rng)


@given(problems(**tiny, ordinary=False), generators())
def test_brute_force_of_parts(problem, rng):
    check_against_brute_force(problem, rng)


def check_against_brute_force(problem, rng):
    given_inputs = inputs(problem, rng)
    got, wanted = (run(module, problem, given_inputs) for module in (reference, brute_force))
    assert_same(problem, given_inputs, got, wanted)


def attend(query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float) -> Any:
    """Attention of [batch, tokens, heads, dim] by torch, or written out where there is none."""
    try:
        import torch
    except ImportError:
        mask = np.tri(query.shape[1], key.shape[1], dtype=bool) if is_causal else mask
        mask = np.ones((query.shape[1], key.shape[1]), bool) if mask is None else mask
        return brute_force.dense(query, key, value, mask, scale)[0]
    # torch 2.13 returns NaN for is_causal with scale 0, so the query is scaled here.
    arrays = (torch.from_numpy(np.moveaxis(array, 2, 1)) for array in (scale * query, key, value))
    mask = None if mask is None else torch.from_numpy(mask)
    output = torch.nn.functional.scaled_dot_product_attention(
        *arrays, attn_mask=mask, is_causal=is_causal, scale=1.0
    )
    return np.moveaxis(output.numpy(), 1, 2)


def flat(problem: Problem, given: Inputs) -> list[np.ndarray]:
    """query, key and value [batch, tokens, heads, dim], every query head with its own key head."""
    arrays = [
        array.reshape(problem.batch, -1, *array.shape[-2:])
        for array in (given.operands.query, given.operands.key, given.operands.value)
    ]
    return [np.repeat(array, problem.heads // array.shape[2], axis=2) for array in arrays]


@given(problems(operations=("forward",), **small), generators(), st.booleans())
def test_a_window_of_the_whole_layout_is_attention(problem, rng, is_causal):
    axes = tuple(
        replace(axis, kernel_size=axis.key_length, stride=1, dilation=1, is_causal=False)
        for axis in problem.axes
    )
    problem = replace(problem, axes=axes, additional=None, rpb_dtype=None)
    is_causal = is_causal and problem.tokens == problem.key_tokens and problem.rank == 1
    if is_causal:
        problem = replace(problem, axes=(replace(axes[0], is_causal=True),))
    given_inputs = inputs(problem, rng)
    output, lse = reference.forward(problem, given_inputs.operands)
    wanted = attend(*flat(problem, given_inputs), None, is_causal, problem.scale)
    wanted = {"output": wanted.reshape(output.shape), "lse": lse}
    assert_same(problem, given_inputs, {"output": output, "lse": lse}, wanted)


@given(problems(operations=("forward",), **small), generators())
def test_a_window_is_attention_under_a_mask(problem, rng):
    problem = replace(problem, additional=None, rpb_dtype=None)
    given_inputs = inputs(problem, rng)
    output, lse = reference.forward(problem, given_inputs.operands)
    mask = brute_force.visible_mask(problem)
    wanted = attend(*flat(problem, given_inputs), mask, False, problem.scale)
    _, wanted_lse = brute_force.dense(*flat(problem, given_inputs), mask, problem.scale)
    wanted = {"output": wanted.reshape(output.shape), "lse": wanted_lse.reshape(lse.shape)}
    assert_same(problem, given_inputs, {"output": output, "lse": lse}, wanted)


@given(problems(operations=("forward",), **small), generators())
def test_fused_is_unfused(problem, rng):
    given_inputs = inputs(problem, rng)
    logits = reference.qk(replace(problem, operation="qk", value_dim=1), given_inputs.operands)
    top = np.maximum(logits.max(-1, keepdims=True), -1e300)
    exponentials = np.exp(logits - top)
    total = exponentials.sum(-1, keepdims=True)
    weights = exponentials / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = (np.where(total == 0, 0, top) + np.log(total))[..., 0]
    output = reference.av(
        replace(problem, operation="av", head_dim=1, rpb_dtype=None), weights, given_inputs.operands
    )
    got = run(reference, problem, given_inputs)
    assert_same(problem, given_inputs, got, {"output": output, "lse": lse})


# Gradients


def loss(problem: Problem, given: Inputs) -> float:
    """What the gradients of `problem` are the gradients of."""
    match problem.operation:
        case "backward":
            output, lse = reference.forward(problem, given.operands)
            alive = lse != -np.inf
            value = (output * given.grad_output).sum()
            if given.grad_lse is not None:
                value += (lse[alive] * given.grad_lse[alive]).sum()
            return value
        case "qk_backward":
            logits = reference.qk(problem, given.operands)
            finite = logits != -np.inf
            return (logits[finite] * given.grad_logits[finite]).sum()
        case "av_backward":
            return (reference.av(problem, given.weights, given.operands) * given.grad_output).sum()


def moved(given: Inputs, name: str, step: np.ndarray) -> Inputs:
    if name == "weights":
        return given._replace(weights=given.weights + step)
    argument = getattr(given.operands, name)
    return given._replace(operands=given.operands._replace(**{name: argument + step}))


@given(
    problems(operations=("backward", "qk_backward", "av_backward"), **small),
    generators(),
)
def test_finite_differences(problem, rng):
    """Every gradient, along a random direction.

    The difference quotient of step h errs by c h^2, which two steps tell, and by the rounding of
    the loss over h: the results' own, weighted with their gradients.
    """
    given_inputs = inputs(problem, rng)
    if problem.operation == "qk_backward":  # a logit of -inf, by rpb, has no difference quotient
        finite = np.isfinite(reference.qk(problem, given_inputs.operands))
        grad_logits = np.where(finite, given_inputs.grad_logits, 0.0)
        given_inputs = given_inputs._replace(grad_logits=grad_logits)
    forward = replace(problem, operation=FORWARD_OF[problem.operation])
    expected, max_logit = expect(forward, given_inputs)
    incoming = {
        "output": given_inputs.grad_output,
        "lse": given_inputs.grad_lse,
        "logits": given_inputs.grad_logits,
    }
    terms = sum(
        expected[name].term_bound * np.nansum(np.abs(gradient))
        for name, gradient in incoming.items()
        if gradient is not None
    )
    step = 1e-4
    rounding = 2 * np.finfo(np.float64).eps * terms * (1 + max_logit) / step
    for grad_name, gradient in run(reference, problem, given_inputs).items():
        name = grad_name.removeprefix("grad ")
        direction = rng.standard_normal(gradient.shape)
        coarse, fine = (
            sum(
                sign * loss(problem, moved(given_inputs, name, sign * h * direction)) / (2 * h)
                for sign in (1, -1)
            )
            for h in (2 * step, step)
        )
        difference = abs(fine - (gradient * direction).sum())
        assert difference <= abs(coarse - fine) + rounding, (grad_name, difference, rounding)


FORWARD_OF = {"backward": "forward", "qk_backward": "qk", "av_backward": "av"}


# Equivalences


def reshaped(problem: Problem, given: Inputs) -> Inputs:
    """The same numbers in the shapes of `problem`."""
    arguments = (
        None if spec is None else array.reshape(spec.shape)
        for array, spec in zip(given.operands, problem.specs, strict=True)
    )
    others = {
        "weights": problem.logits,
        "grad_logits": problem.logits,
        "grad_output": problem.output,
        "grad_lse": problem.lse,
    }
    return given._replace(
        operands=Operands(*arguments),
        **{
            name: getattr(given, name).reshape(spec.shape)
            for name, spec in others.items()
            if getattr(given, name) is not None
        },
    )


@given(problems(ranks=(1, 2), **small), generators(), st.data())
def test_an_axis_of_one_token_changes_nothing(problem, rng, data):
    """1 x N in two dimensions is N in one."""
    where = data.draw(st.integers(0, problem.rank))
    is_causal = problem.rpb_dtype is None and data.draw(st.booleans())
    axes = list(problem.axes)
    axes.insert(where, Axis(1, 1, 1, 1, 1, is_causal))
    thicker = replace(problem, axes=tuple(axes))
    given_inputs = inputs(problem, rng)
    got = run(reference, thicker, reshaped(thicker, given_inputs))
    for name, wanted in run(reference, problem, given_inputs).items():
        np.testing.assert_array_equal(got[name].reshape(wanted.shape), wanted, err_msg=name)


@given(problems(operations=("forward", "backward"), cross=False, **small), generators())
def test_a_dilation_is_interleaved_problems(problem, rng):
    """Every dilation group is a problem of its own; what they share gets the sum of gradients."""
    given_inputs = inputs(problem, rng)
    whole = run(reference, problem, given_inputs)
    shared = ("grad additional_keys", "grad additional_values", "grad rpb")
    sums = {name: np.zeros_like(whole[name]) for name in shared if name in whole}
    for groups in itertools.product(*(range(axis.dilation) for axis in problem.axes)):
        tokens = (
            slice(None),
            *(slice(g, None, axis.dilation) for g, axis in zip(groups, problem.axes, strict=True)),
        )
        axes = tuple(
            replace(axis, **dict.fromkeys(LENGTHS, axis.group_length(g)), dilation=1)
            for g, axis in zip(groups, problem.axes, strict=True)
        )
        part = given_inputs._replace(
            operands=given_inputs.operands._replace(
                **{
                    name: getattr(given_inputs.operands, name)[tokens]
                    for name in ("query", "key", "value")
                }
            ),
            **{
                name: getattr(given_inputs, name)[tokens]
                for name in ("grad_output", "grad_lse")
                if getattr(given_inputs, name) is not None
            },
        )
        for name, array in run(reference, replace(problem, axes=axes), part).items():
            if name in sums:
                sums[name] += array
            else:
                np.testing.assert_allclose(whole[name][tokens], array, rtol=1e-12, err_msg=name)
    assert_same(problem, given_inputs, {**whole, **sums}, whole)


@given(problems(**small), generators())
def test_batch_entries_do_not_know_of_each_other(problem, rng):
    given_inputs = inputs(problem, rng)
    order = rng.permutation(problem.batch)
    shuffled = apply(given_inputs, lambda name, array: array if name == "rpb" else array[order])
    whole, got = (run(reference, problem, arrays) for arrays in (given_inputs, shuffled))
    wanted = {name: a if name == "grad rpb" else a[order] for name, a in whole.items()}
    assert_same(problem, shuffled, got, wanted)


@given(problems(**small), generators())
def test_heads_do_not_know_of_each_other(problem, rng):
    """Key heads may be reordered along with the query heads that read them."""
    given_inputs = inputs(problem, rng)
    kv_order = rng.permutation(problem.kv_heads)
    heads = np.arange(problem.heads).reshape(problem.kv_heads, problem.group_size)
    order = rng.permuted(heads[kv_order], axis=1).ravel()

    def reorder(name: str, array: np.ndarray) -> np.ndarray:
        if name == "rpb":
            return array[order]
        if name in ("key", "value", "additional_keys", "additional_values"):
            return array[..., kv_order, :]
        return array[..., order] if name in ("lse", "grad_lse") else array[..., order, :]

    shuffled = apply(given_inputs, reorder)
    whole, got = (run(reference, problem, arrays) for arrays in (given_inputs, shuffled))
    wanted = {name: reorder(name.removeprefix("grad "), array) for name, array in whole.items()}
    assert_same(problem, shuffled, got, wanted)


@given(problems(operations=FUSED, **small), generators())
def test_grouped_queries_are_repeated_keys(problem, rng):
    """Each query head may as well have its own copy of its key head, whose gradients add up."""
    given_inputs = inputs(problem, rng)
    kv = ("key", "value", "additional_keys", "additional_values")

    def repeat(name: str, array: np.ndarray) -> np.ndarray:
        return np.repeat(array, problem.group_size, axis=-2) if name in kv else array

    repeated = replace(problem, kv_heads=problem.heads)
    got = run(reference, problem, given_inputs)
    wanted = run(reference, repeated, apply(given_inputs, repeat))
    for name in wanted:
        if name.removeprefix("grad ") in kv:
            *outer, _, dim = wanted[name].shape
            split = wanted[name].reshape(*outer, problem.kv_heads, problem.group_size, dim)
            wanted[name] = split.sum(-2)
    assert_same(problem, given_inputs, got, wanted)


def apply(given: Inputs, change: Any) -> Inputs:
    """`change(name, array)` in the place of every array."""

    def changed(arrays: dict[str, Any]) -> dict[str, Any]:
        return {name: None if a is None else change(name, a) for name, a in arrays.items()}

    others = changed({name: getattr(given, name) for name in Inputs._fields[1:5]})
    return given._replace(operands=Operands(**changed(given.operands._asdict())), **others)


@given(problems(operations=("forward",), **small), generators())
def test_constant_values_come_out_again(problem, rng):
    given_inputs = inputs(problem, rng)
    arguments = given_inputs.operands
    constant = rng.standard_normal(problem.value_dim)
    arguments = arguments._replace(value=np.broadcast_to(constant, arguments.value.shape))
    if problem.additional is not None:
        shape = arguments.additional_values.shape
        arguments = arguments._replace(additional_values=np.broadcast_to(constant, shape))
    given_inputs = given_inputs._replace(operands=arguments)
    output, lse = reference.forward(problem, arguments)
    wanted = np.where((lse != -np.inf)[..., None], constant, 0)
    wanted = {"output": wanted, "lse": lse}
    assert_same(problem, given_inputs, {"output": output, "lse": lse}, wanted)


@given(problems(operations=("forward",), cross=False, **small), generators(), st.data())
def test_far_from_the_border_only_the_neighborhood_counts(problem, rng, data):
    """Tokens cut off in front of an axis are not missed by queries far enough from them."""
    where = data.draw(st.integers(0, problem.rank - 1))
    axis = problem.axes[where]
    step = axis.stride * axis.dilation
    spare = axis.length - axis.kernel_size * axis.dilation
    assume(spare >= step)
    cut = step * data.draw(st.integers(1, spare // step))
    # The leader of a query, around whom the window is, may come before it.
    to_leader = 0 if axis.is_causal else axis.stride - 1 - axis.stride // 2
    left = axis.kernel_size - 1 if axis.is_causal else axis.kernel_size // 2
    reach = (to_leader + left) * axis.dilation

    given_inputs = inputs(problem, rng)
    shorter = replace(axis, **dict.fromkeys(LENGTHS, axis.length - cut))
    axes = (*problem.axes[:where], shorter, *problem.axes[where + 1 :])
    kept = (*(slice(None),) * (1 + where), slice(cut, None))
    arguments = given_inputs.operands._replace(
        **{name: getattr(given_inputs.operands, name)[kept] for name in ("query", "key", "value")}
    )
    part, part_lse = reference.forward(replace(problem, axes=axes), arguments)
    output, lse = reference.forward(problem, given_inputs.operands)
    far = (*(slice(None),) * (1 + where), slice(reach, None))
    np.testing.assert_array_equal(output[kept][far], part[far])
    np.testing.assert_array_equal(lse[kept][far], part_lse[far])


# Edge cases


@given(problems(), generators(), layouts())
def test_layout_and_dtype_do_not_matter(problem, rng, layout):
    """Arrays of any dtype and strides give what their contiguous float64 copies give."""
    given_inputs = inputs(problem, rng, layout)
    before = apply(given_inputs, lambda name, array: array.copy())
    got = run(reference, problem, given_inputs)
    copies = apply(given_inputs, lambda name, array: np.array(array, np.float64, order="C"))
    for name, wanted in run(reference, problem, copies).items():
        np.testing.assert_array_equal(got[name], wanted, err_msg=name)
        assert got[name].dtype == np.float64
    for array, copy in zip(leaves(given_inputs), leaves(before), strict=True):
        assert array.tobytes() == copy.tobytes()  # NaN included


def leaves(given: Inputs) -> list[np.ndarray]:
    return [array for array in (*given.operands, *given[1:5]) if array is not None]


@given(empty_problems(), generators())
def test_empty_problems(problem, rng):
    given_inputs = inputs(problem, rng)
    specs = {
        "output": problem.output,
        "lse": problem.lse,
        "logits": problem.logits,
        "grad weights": problem.logits,
        **{f"grad {name}": spec for name, spec in problem.specs._asdict().items()},
    }
    for name, array in run(reference, problem, given_inputs).items():
        assert array.shape == specs[name].shape
        np.testing.assert_array_equal(array, -np.inf if name == "lse" else 0.0)


@given(problems(**small), generators(), st.data())
def test_non_finite_keys_and_values_reach_those_who_see_them(problem, rng, data):
    """One key, or its value, is spoilt: queries whose window does not hold it do not notice."""
    given_inputs = inputs(problem, rng)
    names = [name for name in ("key", "value") if getattr(given_inputs.operands, name) is not None]
    name = data.draw(st.sampled_from(names))
    bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    y = tuple(int(rng.integers(n)) for n in problem.key_tokens)
    spoilt = getattr(given_inputs.operands, name).copy()
    spoilt[(slice(None), *y)] = bad
    sees = np.ones((), bool)
    for axis, yi in zip(problem.axes, y, strict=True):
        along = [brute_force.sees(axis, x, yi) for x in range(axis.length)]
        sees = sees[..., None] & np.array(along)
    changed = given_inputs._replace(operands=given_inputs.operands._replace(**{name: spoilt}))
    before, after = (run(reference, problem, arrays) for arrays in (given_inputs, changed))
    for result in ("output", "lse", "logits", "grad query", "grad weights"):
        if result in before:
            unseen = (slice(None), ~sees)
            np.testing.assert_array_equal(after[result][unseen], before[result][unseen])
    reached = {"key": ("logits", "grad query"), "value": ("grad weights",)}[name]
    if np.isnan(bad):
        for result in set(reached) & after.keys():
            rows = after[result][:, sees]
            dead = problem.operation == "backward" and problem.rpb_dtype is not None
            assert dead or np.isnan(rows).any(-1).all()


@given(problems(operations=FUSED, cross=False, **small), generators())
def test_a_row_without_a_finite_logit_gives_nothing(problem, rng):
    """Not even where values and incoming gradients are not finite."""
    axes = tuple(replace(axis, stride=1, is_causal=False) for axis in problem.axes)
    problem = replace(problem, axes=axes, additional=None, rpb_dtype="float64")
    given_inputs = inputs(problem, rng)
    arguments = given_inputs.operands._replace(
        value=np.full(problem.specs.value.shape, np.nan),
        rpb=np.full(problem.specs.rpb.shape, -np.inf),
    )
    grad_output = np.full(problem.output.shape, np.inf)
    results = run(
        reference, problem, given_inputs._replace(operands=arguments, grad_output=grad_output)
    )
    for name, array in results.items():
        np.testing.assert_array_equal(array, -np.inf if name == "lse" else 0.0, err_msg=name)


@given(problems(operations=("qk", "av_backward"), **small), generators())
def test_hidden_slots(problem, rng):
    """Logits are -inf there, and gradients of weights 0."""
    name, value = {"qk": ("logits", -np.inf), "av_backward": ("grad weights", 0.0)}[
        problem.operation
    ]
    given_inputs = inputs(problem, rng)
    result = run(reference, problem, given_inputs)[name]
    visible = visible_slots(problem, given_inputs.operands)
    hidden = np.broadcast_to(~visible[..., None, :], result.shape)
    assert (result[hidden] == value).all()
    if problem.rpb_dtype is None:
        assert np.isfinite(result[~hidden]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@given(data=st.data(), rng=generators())
def test_results_are_float64(dtype, data, rng):
    problem = data.draw(problems(dtypes=(dtype,), most_tokens=20, budget=2_000))
    for array in run(reference, problem, inputs(problem, rng)).values():
        assert array.dtype == np.float64


@given(problems(operations=("backward",), **small), generators())
def test_gradients_of_absent_arguments_are_none(problem, rng):
    arguments = operands(problem, rng)
    gradients = reference.backward(problem, arguments, np.ones(problem.output.shape))
    for argument, gradient in zip(arguments, gradients, strict=True):
        assert (argument is None) == (gradient is None)
