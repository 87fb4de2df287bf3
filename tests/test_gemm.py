"""The batched-GEMM backend: its planning anywhere, its kernels on a GPU against the oracle."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.brute_force import seers
from helpers.gpu_arrays import NATIVE, on_arrays, to_cupy
from helpers.strategies import (
    DTYPES,
    LAYOUTS,
    OPERATIONS,
    Inputs,
    array,
    empty_problems,
    generators,
    inputs,
    layouts,
    problems,
)
from hypothesis import given
from hypothesis import strategies as st

from cuneigh import _backends, _jit
from cuneigh._backends import fused, gemm, naive
from cuneigh._backends.gemm import launch, sources
from cuneigh._backends.gemm import plan as gemm_plan
from cuneigh._backends.gemm.plan import cut_axis
from cuneigh._device import CPU, Device, cuda
from cuneigh._gpu.arrays import Array, Pointer
from cuneigh._parameters import window_arguments
from cuneigh._problem import Operands, Spec
from cuneigh._validate import attention_problem, dense_problem
from cuneigh._window import Axis

GPU = Device("cuda", 0, "a GPU", (9, 0), 132, 227 * 1024)


def attention(
    tokens,
    kernel_size=3,
    dims=(16, 16),
    dtype="float32",
    operation="forward",
    heads=2,
    batch=1,
    stride=1,
    dilation=1,
    is_causal=False,
):
    """A problem with these token counts and (head_dim, value_dim)."""
    query, value = (Spec((batch, *tokens, heads, dim), dtype) for dim in dims)
    window = window_arguments("test", len(tokens), kernel_size, stride, dilation, is_causal)
    return attention_problem("test", operation, query, query, value, window, None)


# Planning


@st.composite
def axes(draw):
    length = draw(st.integers(1, 60))
    dilation = draw(st.integers(1, length))
    kernel_size = draw(st.integers(1, length // dilation))
    stride = draw(st.integers(1, kernel_size))
    return Axis(length, length, kernel_size, stride, dilation, draw(st.booleans()))


def boxes_of(axis, size):
    """The queries of every box along an axis, as (group, indices)."""
    for group in range(axis.dilation):
        length = axis.group_length(group)
        for first in range(0, length, size):
            yield group, range(first, min(first + size, length))


@given(axis=axes(), size=st.integers(1, 64))
def test_a_cut_counts_boxes_and_holds_their_windows(axis, size):
    unions = []
    for group, box in boxes_of(axis, size):
        windows = [axis.window(index, group) for index in box]
        unions.append(max(end for _, end in windows) - min(begin for begin, _ in windows))
    assert cut_axis(axis, size) == (size, len(unions), max(unions))


@given(length=st.integers(1, 60), key_length=st.integers(1, 60), size=st.integers(1, 64))
def test_a_cut_of_cross_attention_holds_all_keys(length, key_length, size):
    axis = Axis(length, key_length, key_length, 1, 1, False)
    assert cut_axis(axis, size) == (size, math.ceil(length / size), key_length)


LIMITS = st.sampled_from([1, 1 << 12, 1 << 16, 1 << 20, gemm_plan.WORKSPACE_BYTES])


@given(problem=problems(), limit=LIMITS, contiguous=st.booleans())
def test_a_plan_covers_the_problem(problem, limit, contiguous):
    plan = gemm_plan.make_plan(problem, limit, contiguous=contiguous)
    assert plan.rows == problem.group_size * math.prod(plan.box)
    assert plan.columns >= plan.keys + (problem.additional or 0)
    assert plan.columns % 8 == 0
    assert plan.tiles == problem.batch * problem.kv_heads * math.prod(plan.boxes)
    for axis, cut in zip(problem.axes, plan.cuts, strict=True):
        counted = cut_axis(axis, cut.size)
        assert (cut.size, cut.boxes) == (counted.size, counted.boxes)
        assert cut.halo >= counted.halo
        assert plan.direct or cut.halo == counted.halo
    if plan.direct:
        assert contiguous
        assert plan.columns == plan.keys
        axis, *inner = problem.axes
        lengths = {axis.group_length(group) for group in range(axis.dilation)}
        assert len(lengths) == 1
        assert lengths.pop() % plan.box[0] == 0
        whole = tuple(other.length for other in inner)
        assert plan.box[1:] == plan.halo[1:] == whole


@given(problem=problems(), limit=LIMITS)
def test_chunks_take_every_tile_once_and_split_pairs_cleanly(problem, limit):
    plan = gemm_plan.make_plan(problem, limit)
    chunks = plan.chunks()
    assert list(itertools.chain(*chunks)) == list(range(plan.tiles))
    for chunk in chunks:
        assert 1 <= len(chunk) <= min(plan.chunk, gemm_plan.MOST_TILES)
        pairs = {tile // plan.pair_tiles for tile in chunk}
        whole = chunk.start % plan.pair_tiles == chunk.stop % plan.pair_tiles == 0
        assert whole or len(pairs) == 1


@given(problem=problems(), limit=LIMITS)
def test_a_plan_stays_within_the_limit_or_takes_the_least_there_is(problem, limit):
    plan = gemm_plan.make_plan(problem, limit)
    if plan.chunk_bytes > limit:
        assert plan.chunk == 1
        least = min(
            made.tile_bytes
            for cuts in gemm_plan.candidates(problem)
            if (made := gemm_plan.make(problem, cuts, limit, False, False))
        )
        assert plan.chunk_bytes <= least


def test_a_large_gradient_needs_no_more_than_the_sums_of_one_head_on_top():
    for dtype, on_top in (("float16", 4 * 2**20 * 128), ("float32", 0)):
        problem = attention((1024, 1024), 13, (64, 64), dtype, "backward", heads=8)
        plan = gemm_plan.make_plan(problem)
        assert plan.bytes <= gemm_plan.WORKSPACE_BYTES + on_top
        assert len(plan.chunks()) < 1000


def test_what_does_not_fit_is_refused_with_the_number_of_bytes(monkeypatch):
    problem = attention((64,), 9)
    assert gemm.unsupported(problem, GPU) is None
    monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", "100")
    plan = gemm_plan.make_plan(problem, 100)
    assert str(plan.bytes) in gemm.unsupported(problem, GPU)
    assert "CUNEIGH_WORKSPACE_BYTES" in gemm.unsupported(problem, GPU)
    monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", str(plan.bytes))
    assert gemm.unsupported(problem, GPU) is None


def test_the_choice_of_a_backend_is_by_predicted_time():
    small = attention((56, 56), 3, (64, 64), heads=8, batch=64)
    large = attention((2048,), 511, (64, 64), heads=8, batch=32)
    double = replace(large, dtype="float64")
    for problem, expected in ((small, naive), (large, fused), (double, gemm)):
        can = [each for each in (fused, naive, gemm) if each.unsupported(problem, GPU) is None]
        fastest = min(can, key=lambda backend: backend.predicted_ms(problem, GPU))
        assert _backends.choose(problem, GPU, None) is fastest is expected
    assert _backends.choose(large, GPU, "naive") is naive


def test_what_gemm_refuses_is_for_naive(monkeypatch):
    monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", "100")
    assert _backends.choose(attention((2048,), 511, dtype="float64"), GPU, None) is naive


@given(problem=empty_problems(budget=500))
def test_an_empty_problem_needs_no_prediction(problem):
    assert _backends.choose(problem, GPU, None) in _backends.BACKENDS


def test_the_cpu_is_refused():
    assert "CUDA" in gemm.unsupported(attention((8,)), CPU)


@pytest.mark.parametrize(
    ("tokens", "kernel_size", "dilation", "direct"),
    [
        ((2048,), 7, 1, True),
        ((2048,), 7, 4, True),
        ((2048,), 2047, 1, True),
        ((2039,), 7, 1, False),  # a prime: no box of a useful size divides it
        ((2048,), 7, 3, False),  # groups of two lengths
        ((28, 28), 7, 1, True),
        ((28, 28), 7, 2, False),  # the tokens of a halo do not lie at one step
        ((8, 8, 8), 3, 1, True),
    ],
)
def test_tokens_are_multiplied_in_place_where_they_lie_at_one_stride(
    tokens, kernel_size, dilation, direct
):
    problem = attention(tokens, kernel_size, (64, 64), "float16", dilation=dilation)
    assert gemm_plan.make_plan(problem).direct == direct
    assert not gemm_plan.make_plan(problem, contiguous=False).direct
    assert not gemm_plan.make_plan(replace(problem, additional=2)).direct


@pytest.mark.parametrize(
    ("view", "one_stride"),
    [
        (lambda a: a, True),
        (lambda a: a[:, :, :, :, ::2], True),  # every second head
        (lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, -2, 1)), 1, -2), True),
        (lambda a: a[:, :, :, 1:], False),  # a part of the last token axis
        (lambda a: a[:, ::2], False),
        (lambda a: a[:, ::-1, ::-1, ::-1], False),
        (lambda a: np.broadcast_to(a[:, :1, :1, :1], a.shape), False),
    ],
)
def test_whether_tokens_lie_at_one_stride(view, one_stride):
    seen = view(np.zeros((2, 3, 4, 5, 6, 8), np.float32))
    strides = tuple(stride // seen.itemsize for stride in seen.strides)
    array = Array(Pointer(0), seen.shape, "float32", strides, 0)
    assert launch._one_stride((array,)) == one_stride


@given(problem=problems(), repeats=st.sampled_from([1, 10, 100, 1000]))
def test_a_row_is_held_by_its_lanes(problem, repeats):
    plan = gemm_plan.make_plan(problem)
    plan = replace(plan, columns=plan.columns * repeats)
    assert plan.lanes(problem) in (4, 8, 16, 32)
    lines = sources.softmax_source(problem, plan).splitlines()
    constants = dict(re.findall(r"int (\w+) = (\d+);", "\n".join(lines)))
    lanes, packets = int(constants["kLanes"]), int(constants["kPackets"])
    packet = 16 // DTYPES[problem.accumulator]
    if packets:
        assert packets * lanes * packet >= plan.columns
    else:
        assert plan.columns > sources.HELD_PACKETS[-1] * sources.THREADS * packet


# Kernels


@pytest.fixture
def workspace(monkeypatch):
    """Sets the limit of the workspace."""
    return lambda limit: monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", str(limit))


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), rng=generators(), layout=layouts())
def test_every_operation_agrees_with_the_oracle(operation, data, rng, layout):
    problem = data.draw(problems(operations=(operation,)))
    check_backend(gemm, problem, inputs(problem, rng, layout), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), rng=generators(), tiles=st.integers(1, 5))
def test_any_number_of_chunks_agrees_with_the_oracle(operation, data, rng, tiles):
    problem = data.draw(problems(operations=(operation,)))
    least = gemm_plan.make_plan(problem, 1)
    limit = tiles * least.tile_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUNEIGH_WORKSPACE_BYTES", str(limit))
        check_backend(gemm, problem, inputs(problem, rng), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("limit", [gemm_plan.WORKSPACE_BYTES, 1 << 18])
@pytest.mark.parametrize("dilation", [1, 4])
@pytest.mark.parametrize("window", [(7, 1, False), (31, 3, False), (32, 5, True), (48, 1, False)])
def test_tokens_in_place_agree_with_the_oracle(
    operation, dtype, limit, dilation, window, workspace
):
    kernel_size, stride, is_causal = window
    problem = attention(
        (192,), kernel_size, (16, 32), dtype, operation, 2, 2, stride, dilation, is_causal
    )
    workspace(limit)
    assert gemm.plan_of(problem, GPU, contiguous=True).direct
    check_backend(gemm, problem, inputs(problem, np.random.default_rng(0)), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), rng=generators(), layout=layouts())
def test_every_operation_in_place_agrees_with_the_oracle(operation, data, rng, layout):
    """Problems drawn so that tokens can be multiplied in place if the layout allows it."""
    rank = data.draw(st.integers(1, 3))
    tokens = (data.draw(st.sampled_from([8, 16, 24])), *(4, 6)[: rank - 1])
    dilation = data.draw(st.sampled_from([1, 2])) if rank == 1 else 1
    causal = data.draw(st.booleans())
    dtype, dims = data.draw(st.sampled_from(list(DTYPES))), data.draw(st.sampled_from([8, 16]))
    axes = []
    for length in tokens:
        kernel_size = data.draw(st.integers(1, length // dilation))
        stride = data.draw(st.integers(1, kernel_size))
        axes.append(Axis(length, length, kernel_size, stride, dilation, causal))
    base = attention(tokens, 1, (dims, dims), dtype, "forward", heads=2, batch=2)
    scale = 1.0 if operation[:2] == "av" else base.scale
    problem = replace(base, operation=operation, axes=tuple(axes), scale=scale)
    check_backend(gemm, problem, inputs(problem, rng, layout), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data(), rng=generators())
def test_memory_layout_changes_nothing_beyond_rounding(layout, data, rng):
    problem = data.draw(problems(ranks=(1,), most_tokens=64))
    check_backend(gemm, problem, inputs(problem, rng, layout), **NATIVE)


@pytest.mark.gpu
@given(problem=problems(), rng=generators())
def test_two_runs_give_the_same_bits(problem, rng):
    given_inputs = inputs(problem, rng)
    first = run_backend(gemm, problem, given_inputs, **NATIVE)
    second = run_backend(gemm, problem, given_inputs, **NATIVE)
    for name, results in first.items():
        assert results.tobytes() == second[name].tobytes(), name


@pytest.mark.gpu
@given(data=st.data(), rng=generators(), poison=st.sampled_from([np.nan, np.inf]))
def test_a_non_finite_key_reaches_only_the_queries_that_see_it(data, rng, poison):
    problem = data.draw(problems(operations=("forward",), cross=False))
    given_inputs = inputs(problem, rng)._replace(wants_lse=True)
    plain = run_backend(gemm, problem, given_inputs, **NATIVE)
    token = tuple(data.draw(st.integers(0, length - 1)) for length in problem.tokens)
    key = given_inputs.operands.key.copy()
    key[(slice(None), *token)] = poison
    touched = run_backend(
        gemm,
        problem,
        given_inputs._replace(operands=given_inputs.operands._replace(key=key)),
        **NATIVE,
    )
    blind = ~seers(problem, token)
    for name in plain:
        np.testing.assert_array_equal(plain[name][:, blind], touched[name][:, blind])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_large_logits(magnitude, dtype):
    problem = attention((40,), 9, (4, 8), dtype)
    drawn = inputs(problem, np.random.default_rng(0))
    query = np.full(problem.specs.query.shape, np.sqrt(abs(magnitude)) / 2)
    key = np.copysign(
        query * 4 * np.abs(np.random.default_rng(1).normal(size=query.shape)), magnitude
    )
    cast = drawn.operands.query.dtype
    changed = drawn.operands._replace(query=query.astype(cast), key=key.astype(cast))
    check_backend(gemm, problem, drawn._replace(operands=changed), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize("keys", [5000, 13000])
def test_rows_longer_than_a_warp_or_a_block_holds(operation, dtype, keys):
    spec = [Spec((1, count, 1, 8), dtype) for count in (40, keys)]
    problem = dense_problem("test", operation, spec[0], spec[1], spec[1], False, None)
    check_backend(gemm, problem, inputs(problem, np.random.default_rng(0)), **NATIVE)


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
        run_backend(gemm, problem, inputs(problem, np.random.default_rng(0)), **NATIVE)
    assert loaded == set(gemm.kernels(problem, cuda(0)))


@pytest.mark.gpu
def test_float32_is_exact_unless_tf32_is_allowed(monkeypatch):
    problem = attention((256,), 31, (64, 64), heads=8)
    given_inputs = inputs(problem, np.random.default_rng(0))
    check_backend(gemm, problem, given_inputs, **NATIVE)
    exact = run_backend(gemm, problem, given_inputs, **NATIVE)["output"]
    monkeypatch.setenv("CUNEIGH_ALLOW_TF32", "1")
    rounded = run_backend(gemm, problem, given_inputs, **NATIVE)["output"]
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 0 < error < 2**-8


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [(128,), (12, 13)])
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_a_call_can_be_captured_into_a_graph(tokens, operation):
    import cupy

    problem = attention(tokens, 5, (16, 16), "float16", operation)
    rng = np.random.default_rng(0)
    operands = Operands(*(to_cupy(array(problem.specs.query, rng)) for _ in range(3)))
    output, lse = (cupy.empty(spec.shape, spec.dtype) for spec in (problem.output, problem.lse))
    gradients = Operands(*(cupy.empty_like(operand) for operand in operands[:3]))
    forward = replace(problem, operation="forward")
    backend = on_arrays(gemm)

    def call():
        backend.forward(forward, operands, output, lse, cupy.empty)
        if operation == "backward":
            backend.backward(
                problem, operands, operands.value, output, lse, None, gradients, cupy.empty
            )

    results = (output, lse) if operation == "forward" else gradients[:3]
    cupy.cuda.Device().synchronize()  # the stream below does not wait for that of the uploads
    with cupy.cuda.Stream(non_blocking=True) as stream:
        call()
        expected = [result.copy() for result in results]
        stream.begin_capture()
        call()
        graph = stream.end_capture()
        for result in results:
            result.fill(0)
        graph.launch(stream)
        for result, before in zip(results, expected, strict=True):
            cupy.testing.assert_array_equal(result, before)


@pytest.mark.gpu
def test_a_workspace_smaller_than_the_problem_is_enough(workspace):
    """Attention whose dense products would take 3 GiB."""
    problem = attention((4096,), 2047, (32, 32), "float16", heads=32, batch=2)
    workspace(8 << 20)
    plan = gemm.plan_of(problem, GPU, contiguous=True)
    assert plan.chunk_bytes == plan.bytes <= 8 << 20
    assert len(plan.chunks()) > 100
    small = replace(problem, batch=1, heads=1, kv_heads=1)
    rng = np.random.default_rng(0)
    operands = Operands(*(array(small.specs.query, rng) for _ in range(3)))
    repeated = Operands(*(np.repeat(np.repeat(a, 2, 0), 32, 2) for a in operands[:3]))
    whole = run_backend(gemm, problem, Inputs(repeated), **NATIVE)
    part = run_backend(gemm, small, Inputs(operands), **NATIVE)
    for name, result in part.items():
        got = whole[name].astype(float)
        np.testing.assert_array_equal(got[0, :, 0], got[1, :, 31])
        np.testing.assert_allclose(
            got[0, :, 0], result.astype(float)[0, :, 0], atol=2**-9 * np.abs(got).max()
        )
