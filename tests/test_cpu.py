"""The CPU backend: its cut into tiles, every operation against the oracle, and how it behaves."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.brute_force import relative, seers, slots_along, visible_keys
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
    token_counts,
    windows,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_window import parts
from threadpoolctl import threadpool_info

import cuneigh
from cuneigh._backends import cpu
from cuneigh._backends.cpu import gradients as gradient_sums
from cuneigh._backends.cpu import strips as cpu_strips
from cuneigh._backends.cpu import tiles
from cuneigh._backends.cpu.halves import assign
from cuneigh._device import CPU, Device
from cuneigh._parameters import neighborhood_axes, window_arguments
from cuneigh._problem import ARRAYS, Operands, Spec
from cuneigh._programs import perform
from cuneigh._validate import attention_problem, av_problem, qk_problem

CUTS = {
    "usual": {},
    "many boxes": {"MOST_LOGITS": 300, "FEWEST_LOGITS": 1},
    "many small tiles": {"MOST_LOGITS": 100, "FEWEST_LOGITS": 1, "LARGEST_TILE": 3},
}
"""Small problems are usually one box; these limits cut them up as large ones are."""


@contextmanager
def cut(name, threads=2):
    """Problems are cut up in the way called `name` and run on so many threads."""
    with pytest.MonkeyPatch.context() as patch:
        for limit, value in CUTS[name].items():
            patch.setattr(tiles, limit, value)
        patch.setenv("CUNEIGH_NUM_THREADS", str(threads))
        for cached in (tiles.cut, tiles.shape_of_tiles, tiles._kept_boxes):
            cached.cache_clear()
        yield
    for cached in (tiles.cut, tiles.shape_of_tiles, tiles._kept_boxes):
        cached.cache_clear()


def cuts():
    return st.sampled_from(list(CUTS))


def attention(tokens, dims, dtype="float32", kernel_size=3, operation="forward", heads=2, **window):
    """A plain problem with these token counts and (head_dim, value_dim)."""
    query, value = (Spec((1, *tokens, heads, dim), dtype) for dim in dims)
    arguments = {"stride": 1, "dilation": 1, "is_causal": False} | window
    return attention_problem(
        "test",
        operation,
        query,
        query,
        value,
        window_arguments("test", len(tokens), kernel_size, **arguments),
        None,
    )


def assert_same_bits(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        bits = f"u{array.itemsize}"
        both_nan = np.isnan(got[name].astype(float)) & np.isnan(array.astype(float))
        assert ((got[name].view(bits) == array.view(bits)) | both_nan).all(), name


# The cut


@given(data=st.data(), queries=st.integers(1, 20), biased=st.booleans())
def test_strips_hold_every_query_once_and_all_that_it_sees(data, queries, biased):
    tokens = data.draw(token_counts(1, 60))
    (axis,) = neighborhood_axes("test", tokens, data.draw(windows(tokens, rpb=biased)))
    check_strips(axis, queries, biased)


@given(axis=parts(), queries=st.integers(1, 20), placed=st.booleans())
def test_strips_of_parts(axis, queries, placed):
    assume(axis.length)
    check_strips(axis, queries, placed)


def check_strips(axis, queries, placed):
    tokens = []
    for strip in cpu_strips.strips(axis, queries, placed):
        assert 1 <= strip.queries <= queries
        visible, offsets = strip.visible(), strip.offsets
        slots = strip.slot_keys() if placed else None
        for query, key in zip(strip.first_query, strip.first_key, strict=True):
            xs = query + np.arange(strip.queries) * axis.dilation
            tokens += xs.tolist()
            for i, x in enumerate(xs.tolist()):
                seen = (key + offsets[visible[:, i]]).tolist()
                assert sorted(seen) == sorted(visible_keys(axis, x)), axis
                if placed:
                    held = [(a, key + offsets[j]) for a, j in enumerate(slots[i]) if j >= 0]
                    assert held == slots_along(axis, x), axis
                if placed and axis.stride == 1 and not axis.is_causal:
                    index = strip.bias_index()[slots[i][slots[i] >= 0], i]
                    wanted = [relative(axis, x, a) for a, _ in slots_along(axis, x)]
                    np.testing.assert_array_equal(index, wanted)
    assert sorted(tokens) == list(range(axis.length))


@given(problem=problems(), name=cuts())
def test_boxes_hold_every_query_of_every_head_once(problem, name):
    count = np.zeros(problem.lse.shape, int)
    with cut(name):
        for box in tiles.boxes(problem)[0]:
            tokens = box.query_tokens
            along = [
                np.add.outer(first, offset)
                for first, offset in zip(tokens.first, tokens.offsets, strict=True)
            ]
            count[np.ix_(tokens.batch, *(each.ravel() for each in along), tokens.heads)] += 1
    assert (count == 1).all()


def test_tiles_of_a_long_problem_are_few_kinds():
    strips = cpu_strips.strips(neighborhood_axes("test", (4096,), window(129))[0], 64, False)
    assert len(strips) <= 3
    causal = cpu_strips.strips(
        neighborhood_axes("test", (4096,), window(129, causal=True))[0], 64, 0
    )
    assert max(strip.keys for strip in causal) == 129 + 63


def window(kernel_size, causal=False):
    return window_arguments("test", 1, kernel_size, 1, 1, causal)


# Results


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), rng=generators(), layout=layouts(), name=cuts())
def test_every_operation_agrees_with_the_oracle(operation, data, rng, layout, name):
    problem = data.draw(problems(operations=(operation,), ordinary=data.draw(st.booleans())))
    with cut(name):
        check_backend(cpu, problem, inputs(problem, rng, layout))


@pytest.mark.parametrize("operation", ["backward", "jvp", "hvp", "qk", "qk_backward"])
@settings(max_examples=8)
@given(data=st.data(), rng=generators(), name=cuts(), scale=st.sampled_from([1.2e-38, -1e-40]))
def test_tiny_scales_cost_no_digits(operation, data, rng, name, scale):
    """Results are subnormal numbers; terms that are, too, would add up their errors."""
    problem = data.draw(problems(operations=(operation,), dtypes=("float32",), budget=3_000))
    problem = replace(problem, scale=float(np.float32(scale)))
    with cut(name):
        check_backend(cpu, problem, inputs(problem, rng))


# The cut does not depend on the dtype: any dtype of sums will do.
@pytest.mark.parametrize(("operation", "dtype"), [("forward", "float64"), ("backward", "float32")])
@pytest.mark.parametrize(
    ("tokens", "kernel_size", "window"),
    [
        ((500,), 65, {}),
        ((300,), 280, {"is_causal": True, "stride": 3}),
        ((40, 44), 7, {}),
        ((40, 44), (8, 5), {"dilation": (2, 8), "is_causal": (False, True)}),
        ((9, 12, 14), (3, 5, 4), {"stride": (1, 2, 4)}),
        ((8, 9, 10), 3, {}),
        ((70,), 1, {}),
    ],
)
def test_problems_of_many_tiles_agree_with_the_oracle(
    tokens, kernel_size, window, operation, dtype
):
    problem = attention(tokens, (24, 16), dtype, kernel_size, operation, **window)
    check_backend(cpu, problem, inputs(problem, np.random.default_rng(0)))


# Here and below, cuts are to be many, for which small problems will do.
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=settings().max_examples // 2)  # of each of many layouts
@given(problem=problems(budget=5_000), rng=generators(), name=cuts())
def test_memory_layout_changes_no_bit(layout, problem, rng, name):
    strided = inputs(problem, rng, layout)
    contiguous = Inputs(
        Operands(*map(contiguous_copy, strided.operands)),
        *map(contiguous_copy, strided[1:5]),
        wants_lse=strided.wants_lse,
    )
    with cut(name):
        assert_same_bits(run_backend(cpu, problem, strided), run_backend(cpu, problem, contiguous))


def contiguous_copy(array):
    return None if array is None else np.ascontiguousarray(array)


@given(problem=problems(budget=5_000), rng=generators(), name=cuts(), threads=st.integers(2, 4))
def test_the_number_of_threads_changes_no_bit(problem, rng, name, threads):
    given_inputs = inputs(problem, rng)
    with cut(name, threads=1):
        expected = run_backend(cpu, problem, given_inputs)
    with cut(name, threads):
        assert_same_bits(run_backend(cpu, problem, given_inputs), expected)


@pytest.mark.parametrize("name", ["usual", "many boxes"])
@pytest.mark.parametrize(("tokens", "kernel_size"), [((90,), 9), ((10, 11), 5), ((5, 6, 6), 3)])
def test_other_entries_of_a_batch_change_no_bit(tokens, kernel_size, name):
    def results(*arrays):
        rank = len(tokens)
        forward, backward = (getattr(cuneigh, f"na{rank}d{end}") for end in ("", "_backward"))
        output, lse = forward(*arrays[1:], kernel_size, return_lse=True)
        gradients = backward(*arrays, output, lse, kernel_size)[:3]
        return dict(enumerate((output, lse, *gradients)))

    arrays = np.random.default_rng(0).standard_normal((4, 3, *tokens, 2, 8), dtype="float32")
    with cut(name):
        together, alone = results(*arrays), results(*arrays[:, 1:2])
    assert_same_bits({key: array[1:2] for key, array in together.items()}, alone)


# The numbers of elements where heads are many and tiny: one of each is in a product.
@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize("dims", [(1, 1), (1, 3), (3, 1)])
def test_tiny_heads_agree_with_the_oracle(dims, operation):
    problem = attention((12, 13), dims, "float32", 5, operation, heads=24)
    check_backend(cpu, problem, inputs(problem, np.random.default_rng(0)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened_exactly(dtype):
    every = np.arange(1 << 16, dtype="uint16").view(numpy_dtype(dtype)).reshape(256, 256)
    for numbers in (every, every[np.isfinite(every.astype("float32")).all(1)], every[::-3, 5:].T):
        out = np.empty(numbers.shape, "float32")
        assign(out, numbers)
        expected = numbers.astype("float32")
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))


@given(firsts=st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=1, max_size=12))
def test_runs_of_even_steps_hold_every_position_once(firsts):
    positions = np.cumsum(firsts, 0).T
    runs = cpu_strips.even_runs(*positions)
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(len(firsts)))
    for run in runs:
        assert (np.diff(positions[:, run], 2) == 0).all()


# What reaches whom


@given(
    data=st.data(),
    rng=generators(),
    name=cuts(),
    poison=st.sampled_from([np.nan, np.inf, -np.inf, 1e3, 1e34]),
    what=st.sampled_from(["key", "value"]),
)
def test_a_token_reaches_only_the_queries_that_see_it(data, rng, name, poison, what):
    dtypes = ("float32", "float64") if np.isfinite(poison) else tuple(DTYPES)
    operations = "forward", "backward"
    problem = data.draw(problems(operations, dtypes, budget=20_000, cross=False))
    plain = inputs(problem, rng)._replace(wants_lse=True)
    token = tuple(data.draw(st.integers(0, length - 1)) for length in problem.tokens)
    changed = getattr(plain.operands, what).copy()
    changed[(slice(None), *token)] = poison
    touched = plain._replace(operands=plain.operands._replace(**{what: changed}))
    with cut(name):
        before, after = (run_backend(cpu, problem, each) for each in (plain, touched))
    blind = ~seers(problem, token)
    for result in ("output", "lse", "grad query"):
        if result in before:
            bits = {result: before[result][:, blind]}
            assert_same_bits({result: after[result][:, blind]}, bits)
    if np.isnan(poison) and problem.operation == "forward":
        assert np.isnan(after["output"][:, ~blind].astype(float)).any(-1).all()


@given(data=st.data(), rng=generators(), poison=st.sampled_from([np.nan, np.inf, 1e3]))
def test_a_query_and_its_gradient_reach_only_what_it_sees(data, rng, poison):
    problem = data.draw(problems(operations=("backward",), budget=20_000, cross=False))
    plain = inputs(problem, rng)
    token = tuple(data.draw(st.integers(0, length - 1)) for length in problem.tokens)
    here = (slice(None), *token)
    query, grad_output = plain.operands.query.copy(), plain.grad_output.copy()
    query[here] = grad_output[here] = poison
    touched = plain._replace(operands=plain.operands._replace(query=query), grad_output=grad_output)
    before, after = (run_backend(cpu, problem, each) for each in (plain, touched))
    seen = np.zeros(problem.tokens, bool)
    for key in np.ndindex(*problem.tokens):
        seen[key] = seers(problem, key)[token]
    for name in ("grad key", "grad value"):
        assert_same_bits({name: after[name][:, ~seen]}, {name: before[name][:, ~seen]})
    others = np.ones(problem.tokens, bool)
    others[token] = False
    name = "grad query"
    assert_same_bits({name: after[name][:, others]}, {name: before[name][:, others]})


# Ranges of numbers


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_large_logits(magnitude, dtype, operation):
    problem = attention((40,), (4, 8), dtype, 9, operation)
    rng = np.random.default_rng(0)
    drawn = inputs(problem, rng)
    query = np.full(problem.specs.query.shape, np.sqrt(abs(magnitude)) / 2)
    key = np.copysign(query * 4 * np.abs(rng.normal(size=query.shape)), magnitude)
    query[0, ::2] /= 1e3  # among rows of large logits, rows that need no maximum
    changed = drawn.operands._replace(
        query=query.astype(numpy_dtype(dtype)), key=key.astype(numpy_dtype(dtype))
    )
    check_backend(cpu, problem, drawn._replace(operands=changed))


@pytest.mark.parametrize("threads", [1, 2])
def test_boxes_of_large_logits_among_others(threads):
    problem = attention((400,), (4, 8), "float32", 9)
    drawn = inputs(problem, np.random.default_rng(0))
    query, key, value = (array.copy() for array in drawn.operands[:3])
    for large in (slice(100, 150), slice(250, 300)):
        query[:, large] *= 100
    value[:, 130] = np.inf
    changed = drawn._replace(operands=drawn.operands._replace(query=query, key=key, value=value))
    with cut("many boxes"):
        expected = run_backend(cpu, problem, changed)
    with cut("many boxes", threads):
        assert_same_bits(run_backend(cpu, problem, changed), expected)
    finite = drawn._replace(operands=drawn.operands._replace(query=query))
    with cut("many boxes", threads):
        check_backend(cpu, problem, finite)


@pytest.mark.parametrize("size", [1e-36, 1e36])
def test_values_near_the_ends_of_the_range(size):
    problem = attention((40,), (4, 8), "float32", 9)
    drawn = inputs(problem, np.random.default_rng(0))
    query, key, value = drawn.operands[:3]
    changed = drawn.operands._replace(query=query * 8, key=key * 4, value=value * np.float32(size))
    check_backend(cpu, problem, drawn._replace(operands=changed))


# Cost and company


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_memory_beyond_the_results_is_bounded(operation):
    problem = attention((65536,), (64, 64), "float32", 129, operation, heads=4)
    shape = problem.output.shape
    query, key, value, grad_output = np.random.default_rng(0).standard_normal(
        (4, *shape), dtype="float32"
    )
    operands = Operands(query, key, value)
    output, lse = np.empty(shape, "float32"), np.empty(shape[:-1], "float32")
    gradients = Operands(*(np.empty_like(query) for _ in range(3)))
    tracemalloc.start()
    if operation == "forward":
        cpu.forward(problem, operands, output, lse, np.empty)
    else:
        output[...], lse[...] = value, 5.0  # any numbers do
        cpu.backward(problem, operands, grad_output, output, lse, None, gradients, np.empty)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 256 * 2**20


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_workspace_is_bounded_in_bytes(operation, monkeypatch):
    """Of short windows of long vectors, of which few logits need much."""
    monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", "3MiB")
    monkeypatch.setenv("CUNEIGH_NUM_THREADS", "8")
    make = {"qk": qk_problem, "av": av_problem}.get(operation[:2])
    query = Spec((1, 2048, 1, 256), "float32")
    axes = window_arguments("test", 1, 3, 1, 1, False)
    if make is None:
        problem = attention((2048,), (256, 256), "float32", 3, operation, heads=1)
    elif make is qk_problem:
        problem = make("test", operation, query, query, axes, 1.0)
    else:
        problem = make("test", operation, query._replace(shape=(1, 2048, 1, 3)), query, axes)
    given = inputs(problem, np.random.default_rng(0))
    results = [None if spec is None else np.empty(*spec) for spec in problem.results]
    made = dict(zip(ARRAYS[operation].results, results, strict=True))
    arguments = given.operands._asdict() | given._asdict()
    arguments |= {"output": given.operands.value, "lse": np.zeros(problem.lse.shape, "float32")}
    tracemalloc.start()
    perform(cpu, problem, arguments, made, np.empty)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 3 << 20


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_the_workspace_for_a_photograph_is_bounded_in_bytes(operation, monkeypatch):
    """Of the demo's non-local means, in which query and key are much longer than values."""
    monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", "6MiB")
    monkeypatch.setenv("CUNEIGH_NUM_THREADS", "8")
    problem = attention((64, 60), (76, 3), "float32", 13, operation, heads=1)
    query, key, value, grad_output = (
        np.random.default_rng(0).standard_normal(shape, dtype="float32")
        for shape in (*(spec.shape for spec in problem.specs[:3]), problem.output.shape)
    )
    output, lse = np.empty_like(value), np.empty(problem.lse.shape, "float32")
    gradients = Operands(*map(np.empty_like, (query, key, value)))
    tracemalloc.start()
    if operation == "forward":
        cpu.forward(problem, Operands(query, key, value), output, lse, np.empty)
    else:
        output[...], lse[...] = value, 5.0  # any numbers do
        given = problem, Operands(query, key, value), grad_output, output, lse
        cpu.backward(*given, None, gradients, np.empty)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 6 << 20


@pytest.mark.parametrize("stride", [0, 8, -4])
def test_an_array_with_gaps_is_not_copied_as_a_whole(stride, monkeypatch):
    """Rows of one element that is repeated, of every second element, and reversed ones."""
    numbers = np.random.default_rng(0).standard_normal((1, 1024, 4, 128), dtype="float32")
    array = {
        0: np.broadcast_to(numbers[..., :1], numbers.shape),
        8: numbers.repeat(2, -1)[..., ::2],
        -4: numbers[..., ::-1],
    }[stride]
    assert array.strides[-1] == stride
    expected = cuneigh.na1d(*(np.ascontiguousarray(array),) * 3, 5)
    monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", "1MiB")
    tracemalloc.start()
    output = cuneigh.na1d(array, array, array, 5)
    peak = tracemalloc.get_traced_memory()[1] - output.nbytes
    tracemalloc.stop()
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    assert peak < array.nbytes


def test_calls_from_several_threads_do_not_disturb_each_other():
    problem = attention((30, 31), (8, 8), "float32", 7, "backward")
    given_inputs = [inputs(problem, np.random.default_rng(seed)) for seed in range(8)]
    limits = blas_threads()
    with cut("many boxes"):
        expected = [run_backend(cpu, problem, each) for each in given_inputs]
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda each: run_backend(cpu, problem, each), given_inputs))
    for ours, alone in zip(got, expected, strict=True):
        assert_same_bits(ours, alone)
    assert blas_threads() == limits


def test_an_error_ends_all_threads_and_gives_the_blas_threads_back(monkeypatch):
    problem = attention((64, 64), (8, 8), "float32", 7, "backward")
    limits, parts, add = blas_threads(), [], gradient_sums.Sums.add

    def fail_at_the_third(sums, part):
        parts.append(part)
        if len(parts) == 3:
            raise MemoryError("enough")
        add(sums, part)

    monkeypatch.setattr(gradient_sums.Sums, "add", fail_at_the_third)
    with cut("many boxes", threads=3), pytest.raises(MemoryError, match="enough"):
        run_backend(cpu, problem, inputs(problem, np.random.default_rng(0)))
    assert len(parts) == 3
    assert blas_threads() == limits


def blas_threads() -> list[int]:
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_computes():
    script = """if True:
        import os, signal
        import numpy as np
        import cuneigh

        array = np.random.default_rng(0).standard_normal((4, 64, 64, 2, 16), dtype="float32")
        expected = cuneigh.na2d(array, array, array, 7)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            same = np.array_equal(cuneigh.na2d(array, array, array, 7), expected)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    environment = os.environ | {"CUNEIGH_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_arrays_on_a_gpu_are_refused_with_the_reason():
    problem = attention((8,), (4, 4))
    assert cpu.unsupported(problem, CPU) is None
    assert "CUDA" in cpu.unsupported(problem, Device("cuda"))


def test_a_tile_of_a_very_long_window_is_small():
    problem = attention((1 << 20,), (64, 64), kernel_size=1 << 20)
    box = next(iter(tiles.boxes(problem)[0]))
    assert math.prod((*box.lead, box.tile.keys, box.tile.width)) <= 1 << 24
