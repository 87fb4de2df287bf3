"""Key masks and parts in the Hopper kernels on a GPU, with tiles one after another in a block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.gpu_arrays import NATIVE
from helpers.hopper import supported
from helpers.strategies import Inputs, generators, inputs
from hypothesis import given
from hypothesis import strategies as st

from cuneigh import _device
from cuneigh._backends import hopper
from cuneigh._backends.hopper import launch
from cuneigh._backends.hopper.plan import ways
from cuneigh._parameters import Part, window_arguments
from cuneigh._problem import Operation, Spec
from cuneigh._validate import attention_problem

OPERATIONS: tuple[Operation, ...] = ("forward", "backward")


@pytest.fixture(scope="module")
def hopper_gpu() -> None:
    device = _device.cuda(0)
    if device.capability != hopper.CAPABILITY:
        pytest.skip(f"needs compute capability 9.0, not {device.arch}")


@pytest.fixture
def one_block(monkeypatch) -> None:
    """One block takes all tiles."""
    few = replace(_device.cuda(0), sm_count=1)
    monkeypatch.setattr(_device, "cuda", lambda index: few)


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper_gpu")]


def with_mask(given_inputs: Inputs, mask: np.ndarray) -> Inputs:
    """The same with this key mask; what it hides is NaN."""
    operands = given_inputs.operands._replace(key_mask=mask)
    for name in ("key", "value"):
        tokens = np.where(mask[..., None, None], getattr(operands, name), np.nan)
        operands = operands._replace(**{name: tokens.astype(operands.query.dtype)})
    return given_inputs._replace(operands=operands)


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), rng=generators())
def test_parts_and_masks_agree_with_the_oracle(operation, data, rng):
    problem = data.draw(supported((operation,), ordinary=False))
    check_backend(hopper, problem, inputs(problem, rng), **NATIVE)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 96), (256, 192)])
@pytest.mark.parametrize(
    ("tokens", "kernel_size", "dilation"),
    [((400,), 150, 1), ((300,), 120, 2), ((20, 22), (9, 10), 1), ((6, 9, 10), (3, 5, 5), 1)],
)
def test_boxes_of_hidden_keys_are_passed_over(
    operation, dims, tokens, kernel_size, dilation, one_block, monkeypatch
):
    """As padding has them, and holes of all sizes elsewhere."""
    query, key, value = (
        Spec((2, *tokens, heads, dim), "bfloat16")
        for heads, dim in ((2, dims[0]), (1, dims[0]), (1, dims[1]))
    )
    window = window_arguments("test", len(tokens), kernel_size, 1, dilation, False)
    shown = attention_problem("test", operation, query, key, value, window, None)
    problem = replace(shown, has_key_mask=True)
    rng = np.random.default_rng(0)
    mask = rng.random((2, *tokens)) < 0.9
    mask[0] = False
    mask[(0, *(slice(length // 3) for length in tokens))] = True
    mask[1, tokens[0] // 4 : tokens[0] // 2] = False
    given_inputs = with_mask(inputs(shown, rng), mask)
    for way in ways(problem):
        monkeypatch.setattr(launch, "passes", lambda problem, device, way=way: way)
        check_backend(hopper, problem, given_inputs, **NATIVE)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("rest", [True, False], ids=["whole", "empty"])
def test_a_box_with_holes_may_be_followed_by_one_without(operation, rest):
    """Which takes its place in shared memory, and is not waited for."""
    query = Spec((1, 900, 2, 64), "float16")
    window = window_arguments("test", 1, 451, 1, 1, False)
    mask_spec = Spec((1, 900), "bool")
    problem = attention_problem(
        "test", operation, query, query, query, window, *(None,) * 5, mask_spec
    )
    mask = np.full((1, 900), rest)
    mask[0, ::331] ^= True  # in some of the boxes of 128 keys
    shown = replace(problem, has_key_mask=False)
    given_inputs = with_mask(inputs(shown, np.random.default_rng(0)), mask)
    for way in ways(problem):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "passes", lambda problem, device, way=way: way)
            check_backend(hopper, problem, given_inputs, **NATIVE)
            first, *others = (
                run_backend(hopper, problem, given_inputs, **NATIVE) for _ in range(20)
            )
            for other in others:
                for name, array in first.items():
                    np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), rng=generators())
def test_a_mask_that_hides_nothing_changes_no_bits(operation, data, rng):
    problem = replace(data.draw(supported((operation,))), has_key_mask=False)
    plain = inputs(problem, rng)
    mask = np.ones((problem.batch, *problem.key_tokens), bool)
    masked = plain._replace(operands=plain.operands._replace(key_mask=mask))
    wanted = run_backend(hopper, problem, plain, **NATIVE)
    got = run_backend(hopper, replace(problem, has_key_mask=True), masked, **NATIVE)
    for name, array in wanted.items():
        np.testing.assert_array_equal(array, got[name])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("has_mask", [False, True])
def test_tiles_that_see_nothing_follow_others(operation, has_mask, one_block):
    """Queries far from the keys that are given: a block goes on to other tiles."""
    query, key = Spec((1, 900, 2, 64), "float16"), Spec((1, 200, 2, 64), "float16")
    window = window_arguments("test", 1, 101, 1, 1, False)
    for start in (0, 400, 700):
        part = Part(("cut",), (900,), (0,), (start,))
        mask = Spec(key.shape[:2], "bool") if has_mask else None
        absent = (None,) * 4  # scale, additional keys and values, rpb
        problem = attention_problem("test", operation, query, key, key, window, *absent, part, mask)
        assert hopper.unsupported(problem, _device.cuda(0)) is None
        check_backend(hopper, problem, inputs(problem, np.random.default_rng(start)), **NATIVE)
