"""`Problem`: legal arguments make one, illegal ones are named, what it says of itself is true."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from helpers.brute_force import neighbors, queries
from helpers.illegal import RULES, Call, call_of, is_cross, legal_calls
from helpers.strategies import array, empty_problems, generators, numpy_dtype, problems
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cuneigh._parameters import finite_scale, part_arguments, window_arguments
from cuneigh._problem import SUPPORTED, Dtype, Operands, Problem, Spec
from cuneigh._validate import attention_problem, dense_problem, problem_of


def build(call: Call) -> Problem:
    """The problem of a call, as the public functions validate it."""
    name, given = call.function, dict(call.arguments)
    if call.is_dense:
        operands = (given["query"], given["key"], given["value"])
        scale = finite_scale(name, given["scale"])
        mask = given.get("key_mask")
        return dense_problem(name, "forward", *operands, given["is_causal"], scale, mask)
    rank = int(name[2])
    window = window_arguments(
        name,
        rank,
        given["kernel_size"],
        given["stride"],
        given["dilation"],
        given["is_causal"],
    )
    operation = name[5:] or "forward"
    scale = finite_scale(name, given.get("scale", 1.0))
    specs = {name: spec for name, spec in given.items() if isinstance(spec, Spec)}
    of_layout = [given.get(argument, usual) for argument, usual in OF_LAYOUT.items()]
    part = part_arguments(name, rank, *of_layout)
    return problem_of(name, operation, specs, window, scale, part)


OF_LAYOUT = {"border": "shift", "layout": None, "query_start": 0, "key_start": 0}


@given(st.booleans().flatmap(lambda each: problems(ordinary=each)))
def test_a_legal_call_makes_the_problem_it_came_from(problem):
    if is_cross(problem) and problem.operation == "backward":
        return
    assert build(call_of(problem)) == problem


@given(empty_problems(cross=False))
def test_zero_sizes_are_legal(problem):
    assert problem.is_empty
    assert build(call_of(problem)) == problem
    assert problem.visible_pairs() == problem.flops() == 0


@given(empty_problems(operations=("forward",)))
def test_the_other_axes_of_an_empty_layout_obey_their_rules(problem):
    call = call_of(problem)
    if call.is_dense:
        return
    axis = problem.tokens.index(max(problem.tokens))
    if problem.tokens[axis] == 0:
        return
    sizes = list(call.arguments["kernel_size"])
    sizes[axis] = problem.tokens[axis] + 1
    with pytest.raises(ValueError, match=f"kernel_size={sizes[axis]}"):
        build(call.but(kernel_size=tuple(sizes)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.break_.__name__)
@settings(max_examples=max(settings.default.max_examples // 5, 1))  # there are many rules
@given(data=st.data())
def test_a_call_that_breaks_a_rule_is_refused_by_name(rule, data):
    call = data.draw(legal_calls(rule.operations).filter(rule.applies))
    illegal = rule.break_(data.draw, call)
    with pytest.raises((ValueError, TypeError)) as caught:
        build(illegal.call)
    assert type(caught.value) is illegal.error
    for word in (f"{illegal.call.function}: ", *illegal.words):
        assert word in str(caught.value)


def test_ints_and_bools_are_repeated_over_the_axes():
    window = window_arguments("na3d", 3, 5, np.int8(2), [1, 2, 3], np.bool_(True))
    assert window == ((5, 5, 5), (2, 2, 2), (1, 2, 3), (True, True, True))
    assert all(type(entry) is int for entry in window.stride)
    assert all(type(entry) is bool for entry in window.is_causal)


@example(scale=np.float16(-0.5))
@example(scale=3)
@given(scale=st.floats(allow_nan=False, allow_infinity=False))
def test_finite_scales_are_legal(scale):
    assert finite_scale("na1d", scale) == scale


def test_scale_defaults_to_one_over_the_root_of_head_dim():
    spec = Spec((1, 5, 2, 16), "float32")
    window = window_arguments("na1d", 1, 3, 1, 1, False)
    assert attention_problem("na1d", "forward", spec, spec, spec, window, None).scale == 0.25
    assert dense_problem("attention", "forward", spec, spec, spec, False, None).scale == 0.25


def test_problems_are_cached_and_hashable():
    spec = Spec((1, 5, 2, 16), "float32")
    window = window_arguments("na1d", 1, 3, 1, 1, False)
    first, second = (
        attention_problem("na1d", "forward", spec, spec, spec, window, None) for _ in range(2)
    )
    assert first is second
    assert {first: 1}[dataclasses.replace(first)] == 1


def test_a_dtype_may_have_a_forward_pass_only(monkeypatch):
    monkeypatch.setitem(SUPPORTED, "float16", Dtype(2, has_gradients=False))
    window = window_arguments("na1d", 1, 3, 1, 1, False)
    names = ("query", "key", "value", "output", "grad_output")
    specs = dict.fromkeys(names, Spec((1, 5, 2, 16), "float16"))
    specs["lse"] = Spec((1, 5, 2), "float32")
    problem = problem_of("na1d", "forward", specs, window, None)
    with pytest.raises(TypeError, match="dtype float16 has no gradients"):
        problem.gradient  # noqa: B018 - a property that raises
    with pytest.raises(TypeError, match="na1d_backward: dtype float16 has no gradients"):
        problem_of("na1d_backward", "backward", specs, window, None)


tiny = st.booleans().flatmap(lambda each: problems(most_tokens=16, budget=2_000, ordinary=each))


def count_pairs(problem):
    """Pairs of every batch entry and head that see each other, those that are masked too."""
    nothing = Operands()
    return sum(1 for b, x, _, _ in queries(problem) for _ in neighbors(problem, nothing, b, x))


@given(tiny)
def test_visible_pairs(problem):
    pairs = count_pairs(problem)
    assert problem.batch * problem.heads * problem.visible_pairs() == pairs


@given(tiny)
def test_flops(problem):
    """A multiplication and an addition for each channel of every product of a visible pair."""
    dims = {"query key": problem.head_dim, "weights value": problem.value_dim}
    products = {
        "forward": ["query key", "weights value"],
        # Logits once more; dP and dV; dQ and dK.
        "backward": ["query key", *["weights value"] * 2, *["query key"] * 2],
        "qk": ["query key"],
        "qk_backward": ["query key"] * 2,
        "av": ["weights value"],
        "av_backward": ["weights value"] * 2,
    }[problem.operation]
    pairs = count_pairs(problem)
    if problem.operation == "backward":
        # By convention 2.5 forwards, which is the same where head_dim is value_dim.
        assert problem.flops() == 5 * pairs * (problem.head_dim + problem.value_dim)
        if problem.head_dim != problem.value_dim:
            return
    assert problem.flops() == 2 * pairs * sum(dims[product] for product in products)


@given(tiny, generators())
def test_bytes(problem, rng):
    """Every argument is read once and every result written once."""

    def size(*specs) -> int:
        return sum(array(spec, rng).nbytes for spec in specs if spec is not None)

    operands = size(*problem.specs)
    expected = {
        "forward": operands + size(problem.output, problem.lse),
        "backward": 2 * operands + size(problem.output, problem.output, problem.lse),
        "qk": operands + size(problem.logits),
        "qk_backward": 2 * operands + size(problem.logits),
        "av": operands + size(problem.logits, problem.output),
        "av_backward": 2 * operands + size(problem.logits, problem.logits, problem.output),
    }[problem.operation]
    assert problem.bytes() == expected


@given(problems())
def test_specs(problem):
    specs = problem.specs
    assert len(specs) == len(Operands._fields)
    for name, spec in specs._asdict().items():
        if spec is None:
            continue
        numpy_dtype(spec.dtype)
        assert len(spec.shape) == {"rpb": 1 + problem.rank}.get(
            name, 4 if name.startswith("additional") else 3 + problem.rank
        )
    assert problem.slots == math.prod(axis.kernel_size for axis in problem.axes) + (
        problem.additional or 0
    )
    assert problem.heads == problem.kv_heads * problem.group_size
