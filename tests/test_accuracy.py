"""The tolerance itself: what is right passes and what is a little wrong does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.accuracy import assert_close, check_backend, ulp
from helpers.expected import expect
from helpers.strategies import generators, inputs, layouts, problems
from hypothesis import given

from cuneigh._problem import Operands


class Perfect:
    """A backend whose results are the oracle's, rounded, with one of them changed."""

    NAME = "perfect"

    def __init__(self, inputs, change=lambda array: None):
        self.inputs, self.change = inputs, change

    def fill(self, problem, **results):
        expected, _ = expect(problem, self.inputs)
        for name, array in results.items():
            if array is not None:
                array[...] = expected[name.replace("_", " ", 1)].oracle.astype(array.dtype)
        self.change(next(array for array in results.values() if array is not None and array.size))

    def gradients(self, problem, gradients: Operands, **results):
        self.fill(
            problem, **{f"grad_{name}": a for name, a in gradients._asdict().items()}, **results
        )

    def forward(self, problem, operands, output, lse, allocate):
        self.fill(problem, output=output, lse=lse)

    def backward(self, problem, operands, grad_output, output, lse, grad_lse, gradients, allocate):
        self.gradients(problem, gradients)

    def qk(self, problem, operands, logits, allocate):
        self.fill(problem, logits=logits)

    def qk_backward(self, problem, operands, grad_logits, gradients, allocate):
        self.gradients(problem, gradients)

    def av(self, problem, weights, operands, output, allocate):
        self.fill(problem, output=output)

    def av_backward(
        self, problem, weights, operands, grad_output, grad_weights, gradients, allocate
    ):
        self.gradients(problem, gradients, grad_weights=grad_weights)


@given(problems(), generators(), layouts())
def test_the_rounded_oracle_passes(problem, rng, layout):
    given_inputs = inputs(problem, rng, layout)
    check_backend(Perfect(given_inputs), problem, given_inputs)


@given(problems(), generators())
def test_an_element_left_unwritten_fails(problem, rng):
    given_inputs = inputs(problem, rng)

    def forget(array):
        array.flat[rng.integers(array.size)] = np.nan

    with pytest.raises(AssertionError, match="wrongly finite or not"):
        check_backend(Perfect(given_inputs, forget), problem, given_inputs)


@given(problems(operations=("forward", "qk", "av"), dtypes=("float32", "float64")), generators())
def test_a_wrong_element_fails(problem, rng):
    """An error of a thousandth of the largest value is far above any tolerance."""
    given_inputs = inputs(problem, rng)

    def nudge(array):
        finite = np.flatnonzero(np.isfinite(array))
        if finite.size:
            array.flat[rng.choice(finite)] += 1e-3 * max(np.abs(array.flat[finite]).max(), 1)
        else:
            array.flat[0] = 0

    with pytest.raises(
        AssertionError, match=(problem.operation[:2] == "qk" and "logits") or "output"
    ):
        check_backend(Perfect(given_inputs, nudge), problem, given_inputs)


@given(problems(), generators())
def test_the_obvious_computation_is_near_the_oracle(problem, rng):
    """Were it not, nothing would fail. No sum has more terms than there are pairs or channels."""
    given_inputs = inputs(problem, rng)
    expected, max_logit = expect(problem, given_inputs)
    pairs = problem.batch * problem.heads * problem.slots * math.prod(problem.tokens)
    terms = pairs + problem.head_dim + problem.value_dim
    for name, result in expected.items():
        finite = np.isfinite(result.oracle)
        np.testing.assert_array_equal(np.isfinite(result.obvious), finite, err_msg=name)
        obvious = result.obvious[finite].astype(np.float64)
        error = np.abs(obvious - result.oracle[finite]).max(initial=0)
        epsilon = max(ulp(1.0, problem.dtype), ulp(1.0, result.dtype))
        assert error <= terms * epsilon * (1 + result.term_bound) * (1 + max_logit), name


@pytest.mark.parametrize(
    ("magnitude", "dtype", "expected"),
    [
        (1.0, "float32", 2.0**-23),
        (1.99, "float16", 2.0**-10),
        (2.0, "bfloat16", 2.0**-6),
        (0.75, "float64", 2.0**-53),
        (0.0, "float16", 2.0**-24),
        (1e-7, "float16", 2.0**-24),
    ],
)
def test_ulp(magnitude, dtype, expected):
    assert ulp(magnitude, dtype) == expected


def test_infinities_must_match():
    oracle = np.array([-np.inf, 1.0, np.nan, np.inf])
    arguments = {"term_bound": 1.0, "dtype": "float64", "max_logit": 0.0}
    assert_close("x", np.array([-np.inf, 1.0, np.inf, np.nan]), oracle, oracle, **arguments)
    for wrong in ([0.0, 1, np.nan, np.inf], [-np.inf, np.inf, np.nan, np.inf], [-np.inf, 1, 0, 0]):
        with pytest.raises(AssertionError, match="wrongly finite"):
            assert_close("x", np.array(wrong), oracle, oracle, **arguments)
