"""The naive backend: its planning anywhere, its kernels on a GPU against the oracle."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.gpu_arrays import NATIVE, allocate, on_arrays, to_numpy
from helpers.strategies import (
    DTYPES,
    LAYOUTS,
    OPERATIONS,
    Inputs,
    generators,
    inputs,
    layouts,
    numpy_dtype,
    problems,
)
from hypothesis import given
from hypothesis import strategies as st

from cuneigh import _jit, _programs
from cuneigh._backends import naive
from cuneigh._device import cuda, of_capability
from cuneigh._gpu import rows
from cuneigh._parameters import window_arguments
from cuneigh._problem import Operands, Problem, Spec
from cuneigh._validate import attention_problem
from cuneigh._window import Axis


def attention(tokens, dims, dtype="float32", kernel_size=3, operation="forward", heads=2, batch=1):
    """A plain problem with these token counts and (head_dim, value_dim)."""
    query, value = (Spec((batch, *tokens, heads, dim), dtype) for dim in dims)
    window = window_arguments("test", len(tokens), kernel_size, 1, 1, False)
    return attention_problem("test", operation, query, query, value, window, None)


# Planning


@given(problem=problems(), area=st.sampled_from([1, 4, 16, 32, 128]), keys=st.booleans())
def test_a_box_fits_the_block_and_the_layout(problem, area, keys):
    box = rows.box_of(problem, keys, area)
    assert math.prod(box) <= area
    counts = problem.key_tokens if keys else problem.tokens
    assert all(1 <= size <= count for size, count in zip(box, counts, strict=True))


@given(
    dtype=st.sampled_from(list(DTYPES)),
    dims=st.tuples(st.integers(0, 1100), st.integers(1, 1100)),
    widths=st.tuples(*[st.sampled_from([2, 4, 8, 16])] * 2),
)
def test_a_row_plan_covers_its_vectors(dtype, dims, widths):
    widths = [max(width, DTYPES[dtype]) for width in widths]
    plan = rows.row_plan(2, dtype, None, *dims, *widths)
    for dim, vector, chunks, exact, capacity, width in (
        (dims[0], plan.key_vector, plan.key_chunks, plan.key_exact, plan.key_capacity, widths[0]),
        (
            dims[1],
            plan.value_vector,
            plan.value_chunks,
            plan.value_exact,
            plan.value_capacity,
            widths[1],
        ),
    ):
        assert vector * DTYPES[dtype] <= width
        assert dim % vector == 0
        assert exact == (dim == capacity)
        assert plan.wide or dim <= capacity
        assert vector * chunks <= rows.MOST_ELEMENTS_PER_LANE[dtype]
    assert plan.lanes in (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize(("rank", "size"), [(1, 64), (2, 96), (3, 128)])
def test_the_problem_record_has_the_size_that_the_kernels_assert(rank, size):
    problem = attention((4,) * rank, (8, 8))
    plan = rows.row_plan(rank, "float32", None, 8, 8)
    assert rows.record_of(problem, plan, keys=False).itemsize == size


# Kernels


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), rng=generators(), layout=layouts())
def test_every_operation_agrees_with_the_oracle(operation, data, rng, layout):
    problem = data.draw(problems(operations=(operation,)))
    check_backend(naive, problem, inputs(problem, rng, layout), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data(), rng=generators())
def test_memory_layout_changes_no_bit(layout, data, rng):
    problem = data.draw(problems())
    strided = inputs(problem, rng, layout)
    contiguous = Inputs(
        Operands(*(contiguous_copy(array) for array in strided.operands)),
        *(contiguous_copy(array) for array in strided[1:5]),
        wants_lse=strided.wants_lse,
    )
    assert_same_bits(
        run_backend(naive, problem, strided, **NATIVE),
        run_backend(naive, problem, contiguous, **NATIVE),
    )


def contiguous_copy(array):
    return None if array is None else np.ascontiguousarray(array)


@pytest.mark.gpu
@given(problem=problems(), rng=generators())
def test_two_runs_give_the_same_bits(problem, rng):
    given_inputs = inputs(problem, rng)
    first = run_backend(naive, problem, given_inputs, **NATIVE)
    assert_same_bits(first, run_backend(naive, problem, given_inputs, **NATIVE))


def assert_same_bits(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        bits = f"u{array.itemsize}"
        both_nan = np.isnan(got[name].astype(float)) & np.isnan(array.astype(float))
        assert ((got[name].view(bits) == array.view(bits)) | both_nan).all(), name


@pytest.mark.gpu
@given(data=st.data(), rng=generators(), poison=st.sampled_from([np.nan, np.inf, 1e3]))
def test_a_key_reaches_only_the_queries_that_see_it(data, rng, poison):
    problem = data.draw(problems(operations=("forward",), cross=False))
    given_inputs = inputs(problem, rng)._replace(wants_lse=True)
    plain = run_backend(naive, problem, given_inputs, **NATIVE)
    token = tuple(data.draw(st.integers(0, length - 1)) for length in problem.tokens)
    changed = {
        name: getattr(given_inputs.operands, name).copy()
        for name in (("key", "value") if np.isfinite(poison) else ("key",))
    }
    for array in changed.values():
        array[(slice(None), *token)] = poison
    touched = run_backend(
        naive,
        problem,
        given_inputs._replace(operands=given_inputs.operands._replace(**changed)),
        **NATIVE,
    )
    sees = np.ones((1,) * problem.rank, bool)
    for axis, (window, y) in enumerate(zip(problem.axes, token, strict=True)):
        start, end = window.windows()
        x = np.arange(window.length)
        index, group = y // window.dilation, y % window.dilation
        along = (x % window.dilation == group) & (start <= index) & (index < end)
        sees = sees & along.reshape(*(-1 if r == axis else 1 for r in range(problem.rank)))
    blind = np.broadcast_to(~sees, problem.tokens)
    for name in plain:
        np.testing.assert_array_equal(plain[name][:, blind], touched[name][:, blind])
    if np.isnan(poison):  # an infinite key may well have the logit -inf
        assert np.isnan(touched["lse"][:, ~blind].astype(float)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_large_logits(magnitude, dtype):
    problem = attention((40,), (4, 8), dtype, kernel_size=9)
    rng = np.random.default_rng(0)
    drawn = inputs(problem, rng)
    query = np.full(problem.specs.query.shape, np.sqrt(abs(magnitude)) / 2).astype(
        numpy_dtype(dtype)
    )
    key = np.copysign(query.astype(float) * 4 * np.abs(rng.normal(size=query.shape)), magnitude)
    changed = drawn.operands._replace(query=query, key=key.astype(numpy_dtype(dtype)))
    check_backend(naive, problem, drawn._replace(operands=changed), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("dims", [(513, 8), (8, 521), (1030, 1026), (3, 1)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_head_dims_of_any_length(operation, dims, dtype):
    rng = np.random.default_rng(0)
    tokens = (4, 5)
    query, value = (Spec((1, *tokens, 2, dim), dtype) for dim in dims)
    extra = [Spec((1, 2, 2, dim), dtype) for dim in dims]
    window = window_arguments("test", 2, (3, 2), 1, 1, False)
    problem: Problem
    if operation in ("forward", "backward"):
        problem = attention_problem(
            "test", operation, query, query, value, window, 0.05, *extra, None
        )
    else:
        from cuneigh._validate import av_problem, qk_problem

        if operation[:2] == "qk":
            problem = qk_problem("test", operation, query, query, window, 0.05, None, extra[0])
        else:
            weights = Spec((1, *tokens, 2, 8), dtype)
            problem = av_problem("test", operation, weights, value, window, extra[1])
    check_backend(naive, problem, inputs(problem, rng), **NATIVE)


@pytest.mark.gpu
@given(problem=problems())
def test_kernels_names_what_a_contiguous_call_loads(problem):
    loaded = set()
    load = _jit.load

    def recording(kernel, device):
        loaded.add(kernel)
        return load(kernel, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "load", recording)
        run_backend(naive, problem, inputs(problem, np.random.default_rng(0)), **NATIVE)
    assert loaded == set(naive.kernels(problem, cuda(0)))


@pytest.mark.gpu
def test_more_than_two_billion_elements():
    """Offsets beyond 2^31 elements, seen by the first and the last tokens of the last batch."""
    import cupy

    for rank in (1, 2, 3):
        check_huge(rank)
        cupy.get_default_memory_pool().free_all_blocks()


def check_huge(rank):
    import cupy

    tokens = {1: (1 << 21,), 2: (1 << 11, 1 << 10), 3: (1 << 7, 1 << 7, 1 << 7)}[rank]
    batch, heads, dim = 2**32 // (math.prod(tokens) * 8 * 64) // 2 + 1, 8, 64
    problem = attention(tokens, (dim, dim), "float16", 3, "backward", heads, batch)
    shape = problem.specs.query.shape
    assert math.prod(shape) > 2**31
    rng = cupy.random.default_rng(0)

    def normal():
        array = cupy.empty(shape, "float16")
        for part in array:  # float32 numbers of one batch entry at a time
            part[...] = rng.standard_normal(part.shape, dtype="float32")
        return array

    operands = Operands(*(normal() for _ in range(3)))
    output, lse = cupy.empty(shape, "float16"), cupy.empty(shape[:-1], "float32")
    backend = on_arrays(naive)
    backend.forward(problem, operands, output, lse, allocate)
    grad_output = normal()
    gradients = Operands(*(cupy.empty(shape, "float16") for _ in range(3)))
    backend.backward(problem, operands, grad_output, output, lse, None, gradients, allocate)
    # The corners of the layout as small problems of their own: two windows wide, so that what
    # touches the corner token is all there.
    for corner in itertools.product((0, -1), repeat=rank):
        for b in (0, batch - 1):
            near = tuple(slice(0, 8) if end == 0 else slice(-8, None) for end in corner)
            cut = [to_numpy(a[(slice(b, b + 1), *near)].copy()) for a in operands[:3]]
            small = attention((8,) * rank, (dim, dim), "float16", 3, "backward", heads)
            grad = to_numpy(grad_output[(slice(b, b + 1), *near)].copy())
            expected = run_backend(naive, small, Inputs(Operands(*cut), grad_output=grad), **NATIVE)
            for name, whole in zip(("query", "key", "value"), gradients[:3], strict=True):
                got = to_numpy(whole[(b, *corner)].copy()).astype(float)
                want = expected[f"grad {name}"][(0, *corner)].astype(float)
                np.testing.assert_allclose(got, want, atol=2**-8 * np.abs(want).max())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_without_keys_only_blocks_of_queries_are_launched(operation):
    axes = Axis(3, 3, 1, 1, 1, False), Axis(3, 0, 2, 1, 1, False, layout=3)
    problem = Problem(operation, "float16", 1, 2, 1, 8, 8, axes, 1.0, additional=2)
    _programs.rehearse(problem, of_capability((9, 0)), "naive")
