"""The public functions on NumPy arrays: what they compute, return and leave alone."""

from __future__ import annotations

import doctest
import inspect
import math
import re
from typing import get_args
from unittest import mock

import numpy as np
import pytest
from helpers.accuracy import assert_close, expect
from helpers.calls import arguments_of, check_call, results_of
from helpers.illegal import OF_LAYOUT, is_cross
from helpers.strategies import (
    Inputs,
    array,
    empty_problems,
    generators,
    inputs,
    layouts,
    numpy_dtype,
    problems,
)
from hypothesis import given
from hypothesis import strategies as st

import cuneigh
from cuneigh import _call
from cuneigh._backends import BACKENDS, BackendName
from cuneigh._problem import DIFFERENTIATED, DTYPES, Operands, Problem, Spec
from cuneigh._validate import dense_problem

FUNCTIONS = [name for name in cuneigh.__all__ if not name.endswith("Gradients")]
NO_BACKEND = mock.patch.object(_call, "choose", return_value=mock.Mock(spec=[]))
"""Any launch within it raises AttributeError."""


def is_public(problem: Problem) -> bool:
    """Whether a public function computes `problem`: cross attention has no backward of its own."""
    return not is_cross(problem) or problem.operation == "forward"


def unit(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Normally distributed numbers."""
    return array(Spec(shape, dtype), np.random.default_rng(seed))


# What they compute


@given(
    st.booleans().flatmap(lambda each: problems(budget=20_000, ordinary=each)).filter(is_public),
    generators(),
    layouts(),
)
def test_every_call_agrees_with_the_oracle(problem, rng, layout):
    check_call("numpy", problem, inputs(problem, rng, layout))


@given(empty_problems(budget=2_000).filter(is_public), generators())
def test_an_empty_call_launches_nothing(problem, rng):
    asked = inputs(problem, rng)
    function, arguments = arguments_of(problem, asked)
    with NO_BACKEND:
        results = results_of(problem, getattr(cuneigh, function)(**arguments))
    assert set(results) == set(result_specs(problem, asked))
    for name, spec in result_specs(problem, asked).items():
        result = results[name]
        assert (result.shape, result.dtype) == (spec.shape, numpy_dtype(spec.dtype)), name
        assert (result == (-math.inf if name == "lse" else 0)).all(), name


def result_specs(problem: Problem, asked: Inputs) -> dict[str, Spec]:
    """Shape and dtype of every result, by name."""
    match problem.operation:
        case "forward":
            return {"output": problem.output} | ({"lse": problem.lse} if asked.wants_lse else {})
        case "qk":
            return {"logits": problem.logits}
        case "av":
            return {"output": problem.output}
    own = problem.specs._asdict() | {
        "weights": problem.logits if problem.operation == "av_backward" else None
    }
    return {f"grad {name}": spec for name, spec in own.items() if spec is not None}


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_without_keys_is_zero(is_causal):
    tokens = 0 if is_causal else 5
    query, nothing = unit(2, tokens, 3, 4), unit(2, 0, 3, 4)
    with NO_BACKEND:
        output, lse = cuneigh.attention(query, nothing, nothing, is_causal, return_lse=True)
    assert output.shape == (2, tokens, 3, 4)
    assert lse.shape == (2, tokens, 3)
    assert (output == 0).all()
    assert (lse == -math.inf).all()


# How arguments may be given


def test_defaults_are_those_of_the_specification():
    query, key, value = unit(3, 1, 6, 7, 2, 4)
    plain = cuneigh.na2d(query, key, value, 3)
    spelled_out = cuneigh.na2d(
        query,
        key,
        value,
        (3, 3),
        (1, 1),
        (1, 1),
        (False, False),
        0.5,
        None,
        None,
        None,
        False,
        None,
    )
    np.testing.assert_array_equal(plain, spelled_out)
    logits = cuneigh.na2d_qk(query, key, 3)
    np.testing.assert_array_equal(logits, cuneigh.na2d_qk(query, key, 3, scale=1.0))


def test_window_arguments_may_be_lists_and_numpy_scalars():
    query = unit(1, 9, 9, 1, 4)
    plain = cuneigh.na2d(query, query, query, (4, 3), (2, 1), (2, 3), (True, False))
    numpy_arguments = cuneigh.na2d(
        query,
        query,
        query,
        [np.int32(4), 3],
        np.array([2, 1]).tolist(),
        (np.uint8(2), np.int64(3)),
        [np.True_, np.False_],
    )
    np.testing.assert_array_equal(plain, numpy_arguments)


def test_scale_may_be_any_finite_real_number():
    query = unit(1, 9, 1, 4)
    for scale in (0, -2, np.float32(0.25), np.int64(3)):
        result = cuneigh.na1d(query, query, query, 3, scale=scale)
        np.testing.assert_array_equal(
            result, cuneigh.na1d(query, query, query, 3, scale=float(scale))
        )


def test_memory_maps_are_arrays(tmp_path):
    query = unit(1, 9, 1, 4)
    mapped = np.memmap(tmp_path / "query", np.float32, "w+", shape=query.shape)
    mapped[...] = query
    result = cuneigh.na1d(mapped, mapped, mapped, 3)
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, cuneigh.na1d(query, query, query, 3))


def test_read_only_and_unaligned_arrays_are_read_where_they_are():
    query = unit(1, 9, 1, 4)
    expected = cuneigh.na1d(query, query, query, 3)
    unaligned = np.zeros(query.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(query.shape)
    unaligned[...] = query
    unaligned.flags.writeable = False
    np.testing.assert_array_equal(cuneigh.na1d(unaligned, unaligned, unaligned, 3), expected)


# What they return


def test_lse_is_returned_when_asked_for():
    query = unit(1, 9, 1, 4)
    assert isinstance(cuneigh.na1d(query, query, query, 3), np.ndarray)
    assert isinstance(cuneigh.attention(query, query, query), np.ndarray)
    for function, window in ((cuneigh.na1d, (3,)), (cuneigh.attention, ())):
        output, lse = function(query, query, query, *window, return_lse=np.True_)
        assert output.shape == query.shape
        assert lse.shape == query.shape[:-1]


def test_gradients_are_named_and_none_where_nothing_was_given():
    query, key, value, grad = unit(4, 1, 9, 1, 4)
    output, lse = cuneigh.na1d(query, key, value, 3, return_lse=True)
    gradients = cuneigh.na1d_backward(grad, query, key, value, output, lse, 3)
    assert isinstance(gradients, cuneigh.Gradients)
    assert gradients._fields == DIFFERENTIATED
    assert gradients.additional_keys is gradients.additional_values is gradients.rpb is None
    logits = cuneigh.na1d_qk(query, key, 3)
    of_logits = cuneigh.na1d_qk_backward(logits, query, key, 3)
    assert of_logits._fields == ("query", "key", "additional_keys", "rpb")
    assert of_logits.additional_keys is of_logits.rpb is None
    of_output = cuneigh.na1d_av_backward(grad, logits, value, 3)
    assert of_output._fields == ("weights", "value", "additional_values")
    assert of_output.additional_values is None


# Which backend


def test_a_backend_can_be_forced():
    query = unit(1, 9, 1, 4)
    np.testing.assert_array_equal(
        cuneigh.na1d(query, query, query, 3, backend="cpu"), cuneigh.na1d(query, query, query, 3)
    )


def test_an_unknown_backend_is_an_error():
    query = unit(1, 9, 1, 4)
    with pytest.raises(ValueError, match=r"na1d: backend='fast' is not one of .*'cpu'"):
        cuneigh.na1d(query, query, query, 3, backend="fast")


@pytest.mark.parametrize("length", [0, 9])
def test_a_gpu_backend_says_what_a_numpy_array_lacks(length):
    query = unit(1, length, 1, 4)
    with pytest.raises(RuntimeError, match=r"naive: .*CUDA.*cuneigh\[cuda1"):
        cuneigh.na1d(query, query, query, 3, backend="naive")


# Merging


@st.composite
def split_attentions(draw):
    """Specs of a query, and of keys and values in some parts, of which some may be empty."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    batch, tokens, kv_heads, group = (draw(st.integers(1, most)) for most in (2, 9, 2, 3))
    head_dim, value_dim = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    return (
        Spec((batch, tokens, kv_heads * group, head_dim), dtype),
        [Spec((batch, length, kv_heads, head_dim), dtype) for length in lengths],
        [Spec((batch, length, kv_heads, value_dim), dtype) for length in lengths],
    )


@given(split_attentions(), generators())
def test_merged_attentions_are_the_attention_to_all_keys(specs, rng):
    query = array(specs[0], rng)
    keys, values = ([array(spec, rng) for spec in parts] for parts in specs[1:])
    parts = [
        cuneigh.attention(query, key, value, return_lse=True)
        for key, value in zip(keys, values, strict=True)
    ]
    merged, merged_lse = cuneigh.merge_attentions(*zip(*parts, strict=True))

    whole = Operands(query, np.concatenate(keys, 1), np.concatenate(values, 1))
    if whole.key.shape[1] == 0:
        assert (merged == 0).all()
        assert (merged_lse == -math.inf).all()
        return
    own = [Spec(each.shape, specs[0].dtype) for each in whole[:3]]
    problem = dense_problem("attention", "forward", *own, False, None)
    expected, max_logit = expect(problem, Inputs(whole))
    for name, got in (("output", merged), ("lse", merged_lse)):
        wanted = expected[name]
        assert_close(
            name,
            got,
            wanted.oracle,
            wanted.obvious,
            wanted.term_bound,
            wanted.dtype,
            max_logit,
            accumulator=problem.accumulator,
            context=problem,
        )


def test_an_lse_of_minus_infinity_contributes_nothing():
    outputs, lses = unit(2, 1, 5, 2, 3), unit(2, 1, 5, 2, seed=1)
    lses[1, 0, 2:] = -math.inf
    outputs[1, 0, 2:] = np.nan
    output, lse = cuneigh.merge_attentions(list(outputs), list(lses))
    np.testing.assert_array_equal(output[0, 2:], outputs[0, 0, 2:])
    np.testing.assert_array_equal(lse[0, 2:], lses[0, 0, 2:])
    assert np.isfinite(output).all()


def test_merging_keeps_what_is_not_a_number():
    outputs, lses = unit(2, 1, 5, 2, 3), unit(2, 1, 5, 2, seed=1)
    lses[0, 0, 0, 0] = np.nan
    output, lse = cuneigh.merge_attentions(tuple(outputs), tuple(lses))
    assert np.isnan(output[0, 0, 0]).all()
    assert np.isnan(lse[0, 0, 0])
    assert np.isnan(output).sum() == 3


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_merging_does_not_overflow(far):
    outputs, lses = unit(2, 1, 5, 2, 3), np.full((2, 1, 5, 2), far, np.float32)
    output, lse = cuneigh.merge_attentions(tuple(outputs), tuple(lses))
    np.testing.assert_allclose(output, outputs.mean(0), rtol=np.finfo(np.float32).eps * 4)
    np.testing.assert_array_equal(lse, np.float32(far + math.log(2)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_no_call_raises_where_numpy_does(dtype):
    """Underflow is harmless, infinities are legal, and both are told by the results."""
    tiny = (unit(1, 9, 2, 4) * 1e-30).astype(dtype)
    lse = np.ones(tiny.shape[:-1], "float64" if dtype == "float64" else "float32")
    weights = np.full((1, 9, 2, 3), 1e-5, dtype)
    with np.errstate(all="raise"):
        cuneigh.na1d(tiny, tiny, tiny, 3)
        cuneigh.na1d_backward(tiny, tiny, tiny, tiny, tiny, lse, 3)
        cuneigh.na1d_qk_backward(weights, tiny, tiny, 3)
        cuneigh.na1d_av_backward(tiny, weights, tiny, 3)
        for far in (110, 1e4, np.inf, -np.inf):
            output, _ = cuneigh.merge_attentions([tiny, tiny], [lse, lse + lse.dtype.type(far)])
            assert np.isnan(output).all() == (far == np.inf)


# What they say of themselves


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_examples_in_the_documentation_run(name):
    function = getattr(cuneigh, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, module=False)
    assert example.examples
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("suffix", ["", "_backward", "_qk", "_qk_backward", "_av", "_av_backward"])
def test_the_documentation_is_that_of_the_rank(rank, suffix):
    name = f"na{rank}d{suffix}"
    documentation = inspect.getdoc(getattr(cuneigh, name))
    axes = range(1, rank + 1)
    tokens = ", ".join(f"X{axis}" for axis in axes)
    shapes = re.findall(r"\[B, (X[^\]]*)\]", documentation)
    assert all(re.match(rf"{tokens}(, H|$)", shape) for shape in shapes)
    assert shapes
    for slots in re.findall(r"\[[^\]]*, ([K\d* ]+) \(\+ n\)\]", documentation):
        assert slots == " * ".join(f"K{axis}" for axis in axes)
    for bias in re.findall(r"rpb : array \[H, (.*)\]", documentation):
        assert bias == ", ".join(f"2 * K{axis} - 1" for axis in axes)
    assert f"cuneigh.{name}(" in documentation
    assert (f"`na2d{suffix}` for arrays with" in documentation) == (rank != 2)


def test_every_backend_has_its_name_in_types_and_documentation():
    names = sorted(get_args(BackendName))
    assert names == sorted(backend.NAME for backend in BACKENDS)
    for name in set(FUNCTIONS) - {"merge_attentions"}:
        function = getattr(cuneigh, name)
        backend = inspect.signature(function, eval_str=True).parameters["backend"]
        assert backend.annotation == BackendName | None
        _, paragraph = inspect.getdoc(function).split("backend : str, optional\n    ")
        paragraph = re.split(r"\n\n|\n\w", paragraph)[0]
        if name == "na2d":
            assert sorted(re.findall(r'"(\w+)"', paragraph)) == names
        else:
            assert paragraph.startswith("As in `na2d`"), name


WINDOW = ("kernel_size", "stride", "dilation", "is_causal")
ADDITIONAL = ("additional_keys", "additional_values")
LAST = ("backend", *OF_LAYOUT, "key_mask")
SIGNATURES = {
    "": ("query", "key", "value", *WINDOW, "scale", *ADDITIONAL, "rpb", "return_lse", *LAST),
    "_backward": (
        *("grad_output", "query", "key", "value", "output", "lse"),
        *(*WINDOW, "scale", *ADDITIONAL, "rpb", "grad_lse", *LAST),
    ),
    "_qk": ("query", "key", *WINDOW, "scale", "rpb", "additional_keys", *LAST),
    "_qk_backward": (
        *("grad_logits", "query", "key"),
        *(*WINDOW, "scale", "rpb", "additional_keys", *LAST),
    ),
    "_av": ("weights", "value", *WINDOW, "additional_values", *LAST),
    "_av_backward": ("grad_output", "weights", "value", *WINDOW, "additional_values", *LAST),
}


@pytest.mark.parametrize("suffix", SIGNATURES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_signatures_are_those_of_the_specification(rank, suffix):
    function = getattr(cuneigh, f"na{rank}d{suffix}")
    assert function.__name__ == function.__qualname__ == f"na{rank}d{suffix}"
    assert tuple(inspect.signature(function).parameters) == SIGNATURES[suffix]
