"""The Hopper kernels on a GPU: against the oracle, against `fused`, and against themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.brute_force import seers
from helpers.gpu_arrays import NATIVE, on_arrays, to_cupy, to_numpy
from helpers.hopper import H200, assert_agree, plans, refusal, supported
from helpers.strategies import generators, inputs, layouts
from hypothesis import assume, given
from hypothesis import strategies as st

import cuneigh
from cuneigh import _device
from cuneigh._backends import choose, fused, hopper
from cuneigh._backends.hopper import launch
from cuneigh._backends.hopper.choice import make_plan
from cuneigh._backends.hopper.plan import HopperPlan, ways
from cuneigh._call import WITH_KEY_GRADIENTS
from cuneigh._gpu.passes import DKV, DQ, FORWARD, Pass
from cuneigh._gpu.tensor_map import KEPT
from cuneigh._parameters import window_arguments
from cuneigh._problem import Operands, Problem, Spec
from cuneigh._validate import attention_problem
from cuneigh._window import Axis


@pytest.fixture(scope="module")
def hopper_gpu() -> None:
    device = _device.cuda(0)
    if device.capability != hopper.CAPABILITY:
        pytest.skip(f"needs compute capability 9.0, not {device.arch}")


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper_gpu")]


OPERATIONS = tuple(hopper.LONGEST)


def problem_of(
    tokens, kernel_size, dims=(64, 64), dtype="bfloat16", operation="forward", **window
) -> Problem:
    """Four query heads on two key heads."""
    query, key, value = (
        Spec((1, *tokens, heads, dim), dtype)
        for heads, dim in ((4, dims[0]), (2, dims[0]), (2, dims[1]))
    )
    arguments = {"stride": 1, "dilation": 1, "is_causal": False, **window}
    taken = window_arguments("test", len(tokens), kernel_size, *arguments.values())
    return attention_problem("test", operation, query, key, value, taken, None)


def takes(patch: pytest.MonkeyPatch, plans: Mapping[Pass, HopperPlan]) -> None:
    """Make the backend take these passes, with these plans."""
    patch.setattr(launch, "passes", lambda problem, device: tuple(plans))
    patch.setattr(launch, "make_plan", lambda problem, device, pass_: plans[pass_])


def any_plans(data, problem: Problem) -> dict[Pass, HopperPlan]:
    way = data.draw(st.sampled_from(ways(problem)))
    return {pass_: data.draw(st.sampled_from(plans(problem, pass_))) for pass_ in way}


# Against the oracle


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), rng=generators(), layout=layouts())
def test_results_agree_with_the_oracle(operation, data, rng, layout):
    """In every layout that TMA can read; others are for `fused`."""
    problem = data.draw(supported((operation,)))
    given_inputs = inputs(problem, rng, layout)
    if refusal(problem, given_inputs) is None:
        check_backend(hopper, problem, given_inputs, **NATIVE)
    else:
        assert layout not in ("contiguous", "packed", "heads_first"), refusal(problem, given_inputs)


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), rng=generators())
def test_any_plan_agrees_with_the_oracle(operation, data, rng):
    problem = data.draw(supported((operation,)))
    chosen = any_plans(data, problem)
    layout = data.draw(st.sampled_from(["contiguous", "packed", "heads_first"]))
    with pytest.MonkeyPatch.context() as patch:
        takes(patch, chosen)
        check_backend(hopper, problem, inputs(problem, rng, layout), **NATIVE)


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_every_plan_for_few_queries(group_size):
    """Tiles of several heads, with parts of a layout."""
    axis = Axis(40, 500, 300, 1, 1, True, "shift", 4000, 1000, 600)
    problem = Problem("forward", "bfloat16", 2, 2 * group_size, 2, 128, 128, (axis,), 0.1)
    for plan in plans(problem):
        with pytest.MonkeyPatch.context() as patch:
            takes(patch, {FORWARD: plan})
            check_backend(hopper, problem, inputs(problem, np.random.default_rng(0)), **NATIVE)


@pytest.mark.parametrize(
    ("operation", "head_dim"),
    [(name, dim) for name, most in hopper.LONGEST.items() for dim in range(8, most + 1, 8)],
)
def test_every_head_dim(operation, head_dim):
    value_dim = head_dim * 7 % hopper.LONGEST[operation] + 8
    dtype = "bfloat16" if head_dim % 16 else "float16"
    for dims in ((head_dim, head_dim), (head_dim, value_dim)):
        problem = problem_of((20, 12), (5, 9), dims, dtype, operation, dilation=(2, 1))
        check_backend(hopper, problem, inputs(problem, np.random.default_rng(0)), **NATIVE)


@pytest.mark.parametrize("dtype", hopper.DTYPES)
@pytest.mark.parametrize(
    ("tokens", "kernel_size"),
    [
        ((1,), 1),
        ((193,), 1),
        ((257,), 257),
        ((1000,), 65),
        ((3, 5), (3, 5)),
        ((31, 37), (5, 7)),
        ((1, 300), (1, 200)),
        ((300, 1), (200, 1)),
        ((2, 3, 2), 1),
        ((5, 7, 11), (5, 3, 11)),
        ((1, 1, 300), (1, 1, 30)),
    ],
)
def test_windows_and_layouts_of_extreme_sizes(dtype, tokens, kernel_size):
    for operation in OPERATIONS:
        problem = problem_of(tokens, kernel_size, (64, 128), dtype, operation)
        check_backend(hopper, problem, inputs(problem, np.random.default_rng(0)), **NATIVE)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("tokens", "kernel_size"),
    [((24, 64), (5, 41)), ((64, 24), (41, 5)), ((8, 8, 24), (3, 3, 17))],
)
def test_more_boxes_are_passed_over_than_memory_holds(tokens, kernel_size, is_causal):
    """By a warpgroup whose neighbor in the tile sees them: a whole line of boxes, or many lines."""
    along_first = (is_causal,) + (False,) * (len(tokens) - 1)
    problem = problem_of(
        tokens, kernel_size, (128, 128), operation="backward", is_causal=along_first
    )
    given_inputs = inputs(problem, np.random.default_rng(0))
    box = {2: (8, 8), 3: (4, 4, 4)}[problem.rank]
    of_keys = [each for each in plans(problem, DKV) if each.row_box == each.column_box == box]
    assert len(of_keys) == problem.rank  # warpgroups side by side along each axis
    for plan in of_keys:
        with pytest.MonkeyPatch.context() as patch:
            takes(patch, {DQ: make_plan(problem, _device.cuda(0), DQ), DKV: plan})
            check_backend(hopper, problem, given_inputs, **NATIVE)


@pytest.mark.parametrize("dtype", hopper.DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(dtype, sign):
    """They are all near 1e4 or all near -1e4."""
    spec = Spec((1, 400, 2, 64), dtype)
    window = window_arguments("test", 1, 200, 1, 1, False)
    for operation in OPERATIONS:
        problem = attention_problem("test", operation, spec, spec, spec, window, sign * 1e4 / 64)
        given_inputs = inputs(problem, np.random.default_rng(0))
        near_one = {
            name: (1 + array / 256).astype(array.dtype)
            for name, array in given_inputs.operands._asdict().items()
            if name in ("query", "key")
        }
        operands = given_inputs.operands._replace(**near_one)
        check_backend(hopper, problem, given_inputs._replace(operands=operands), **NATIVE)


@given(data=st.data(), rng=generators(), poison=st.sampled_from([np.nan, np.inf, 1e3]))
def test_a_key_reaches_only_the_queries_that_see_it(data, rng, poison):
    problem = data.draw(supported(("forward", "jvp"), cross=False))
    given_inputs = inputs(problem, rng)._replace(wants_lse=True)
    token = tuple(data.draw(st.integers(0, length - 1)) for length in problem.tokens)
    names = ("key", "value") if np.isfinite(poison) else ("key",)
    changed = {name: getattr(given_inputs.operands, name).copy() for name in names}
    for array in changed.values():
        array[(slice(None), *token)] = poison
    touched_inputs = given_inputs._replace(operands=given_inputs.operands._replace(**changed))
    with pytest.MonkeyPatch.context() as patch:
        takes(patch, any_plans(data, problem))
        plain = run_backend(hopper, problem, given_inputs, **NATIVE)
        touched = run_backend(hopper, problem, touched_inputs, **NATIVE)
    blind = ~seers(problem, token)
    for name in plain:
        np.testing.assert_array_equal(plain[name][:, blind], touched[name][:, blind])


# Against another backend


@given(
    problem=supported(("forward", "jvp"), most_tokens=5000, multiplications=2_000_000_000),
    rng=generators(),
    layout=st.sampled_from(["contiguous", "packed", "heads_first"]),
)
def test_larger_problems_agree_with_fused(problem, rng, layout):
    """Tiles, boxes and rounds by the hundred, where the oracle would take minutes."""
    assume(math.prod(problem.tokens) * problem.batch * problem.heads < 100_000)
    given_inputs = inputs(problem, rng, layout)._replace(wants_lse=True)
    wanted, got = (
        run_backend(backend, problem, given_inputs, **NATIVE) for backend in (fused, hopper)
    )
    assert_agree(problem, given_inputs, got, wanted)


# Against itself


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), rng=generators())
def test_two_runs_give_the_same_bits(operation, data, rng):
    problem = data.draw(supported((operation,), most_tokens=1000, multiplications=20_000_000))
    assume(math.prod(problem.tokens) * problem.batch * problem.heads < 100_000)
    given_inputs = inputs(problem, rng)
    first, second = (run_backend(hopper, problem, given_inputs, **NATIVE) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data(), rng=generators())
def test_the_number_of_blocks_changes_no_bits(operation, data, rng):
    """One block takes all tiles, or several take what is free; their order changes no sum.

    Those of the gradients of additional keys are divided by the number of multiprocessors.
    """
    problem = data.draw(supported((operation,), most_tokens=1000, multiplications=20_000_000))
    problem = replace(problem, additional=None)
    chosen, given_inputs = any_plans(data, problem), inputs(problem, rng)
    device = _device.cuda(0)
    results = []
    for blocks in (device.sm_count, 1, data.draw(st.integers(2, 20))):
        with pytest.MonkeyPatch.context() as patch:
            takes(patch, chosen)
            few = replace(device, sm_count=blocks)
            patch.setattr(_device, "cuda", lambda index, few=few: few)
            results.append(run_backend(hopper, problem, given_inputs, **NATIVE))
    for other in results[1:]:
        for name, array in results[0].items():
            np.testing.assert_array_equal(array, other[name])


def random(shape: tuple[int, ...], seed: int = 0, dtype: str = "float16") -> Any:
    import cupy

    return cupy.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(dtype)


@pytest.mark.parametrize("tokens", [(8192,), (96, 80), (16, 24, 24)])
def test_other_work_on_the_gpu_changes_no_bits(tokens):
    """Tiles go to whichever block is free, and how many blocks there are at once varies."""
    import cupy

    query, key, value, grad_output = (random((1, *tokens, 8, 128), seed) for seed in range(4))
    kernel_size = tuple(max(length // 3, 1) for length in tokens)
    name = f"na{len(tokens)}d"
    forward, backward = getattr(cuneigh, name), getattr(cuneigh, f"{name}_backward")

    def call(backend: str) -> Any:
        settings = {"kernel_size": kernel_size, "backend": backend}
        output, lse = forward(query, key, value, return_lse=True, **settings)
        gradients = backward(grad_output, query, key, value, output, lse, **settings)
        return output, lse, *gradients[:3]

    alone = call("hopper")
    call("fused")
    cupy.cuda.Device().synchronize()
    busy = cupy.cuda.Stream(non_blocking=True)
    for _ in range(50 if len(tokens) == 1 else 10):
        with busy:
            for _ in range(3):
                call("fused")
        beside = call("hopper")
        for one, other in zip(alone, beside, strict=True):
            cupy.testing.assert_array_equal(one, other)
    busy.synchronize()


# Calls of the public functions


@pytest.mark.parametrize("tokens", [(700,), (30, 40), (9, 10, 11)])
def test_views_with_heads_first_are_served(tokens):
    torch = pytest.importorskip("torch")
    function = getattr(cuneigh, f"na{len(tokens)}d")
    generator = torch.Generator("cuda").manual_seed(0)
    views = [
        torch.randn(
            (2, 4, *tokens, 64), device="cuda", dtype=torch.bfloat16, generator=generator
        ).movedim(1, -2)
        for _ in range(3)
    ]
    assert not views[0].is_contiguous()
    kernel_size = tuple(length // 2 for length in tokens)
    output = function(*views, kernel_size, backend="hopper")
    copies = [view.contiguous() for view in views]
    assert torch.equal(output, function(*copies, kernel_size, backend="hopper"))


def test_what_it_cannot_read_goes_to_another_backend():
    """An address at an odd multiple of 8: as when heads were split off a wider array."""
    import cupy

    memory = random((2 * 4096 * 4 * 128 + 4,))
    shifted = memory[4:].reshape(2, 4096, 4, 128)
    assert shifted.data.ptr % 16 == 8
    output = cuneigh.na1d(shifted, shifted, shifted, 1024)
    with pytest.raises(RuntimeError, match="hopper: needs query at an address"):
        cuneigh.na1d(shifted, shifted, shifted, 1024, backend="hopper")
    copy = shifted.copy()
    wanted = cuneigh.na1d(copy, copy, copy, 1024, backend="hopper")
    problem = problem_of((32768,), 2048, (128, 128))
    assert choose(problem, H200, None) is hopper
    cupy.testing.assert_allclose(output, wanted, atol=2**-6)


def test_a_call_can_be_captured_into_a_graph():
    """The tensor maps, and the counter of tiles that are taken, are right in every replay."""
    import cupy

    problem = problem_of((40, 50), (20, 30), (128, 128), "float16")
    rng = np.random.default_rng(0)
    sets = [[to_cupy(array) for array in inputs(problem, rng).operands[:3]] for _ in range(3)]
    operands = Operands(*(array.copy() for array in sets[0]))
    output, lse = (cupy.empty(*spec) for spec in (problem.output, problem.lse))
    forward: Callable[..., None] = on_arrays(hopper).forward

    def call() -> None:
        forward(problem, operands, output, lse, cupy.empty)

    expected = []
    for arrays in sets:
        for array, numbers in zip(operands[:3], arrays, strict=True):
            array[...] = numbers
        call()
        expected.append((output.copy(), lse.copy()))
    cupy.cuda.Device().synchronize()  # the stream below does not wait for the default one
    with cupy.cuda.Stream(non_blocking=True) as stream:
        call()  # after which there is memory for workspace
        stream.begin_capture()
        call()
        graph = stream.end_capture()
        for arrays, wanted in zip(sets, expected, strict=True):
            for array, numbers in zip(operands[:3], arrays, strict=True):
                array[...] = numbers
            output.fill(0)
            lse.fill(0)
            graph.launch(stream)
            for result, before in zip((output, lse), wanted, strict=True):
                cupy.testing.assert_array_equal(result, before)


def test_a_torch_graph_replays_a_call():
    torch = pytest.importorskip("torch")
    first, second = (torch.randn(1, 1000, 4, 64, device="cuda").half() for _ in range(2))
    query = first.clone()
    wanted = cuneigh.na1d(second, second, second, 300, backend="hopper")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = cuneigh.na1d(query, query, query, 300, backend="hopper")
    query.copy_(second)
    for _ in range(2):
        output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, wanted)


def test_every_call_reads_where_its_arrays_are():
    """More addresses than encoded maps are kept, twice around."""
    import cupy

    many = random((KEPT + 6, 1, 400, 2, 64))
    wanted = [cuneigh.na1d(query, query, query, 90, backend="fused") for query in many]
    for _ in range(2):
        for query, expected in zip(many, wanted, strict=True):
            output = cuneigh.na1d(query, query, query, 90, backend="hopper")
            cupy.testing.assert_allclose(output, expected, atol=2**-6)


# More elements than 32 bits count


def needs_memory(size: int) -> None:
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    if cupy.cuda.runtime.memGetInfo()[0] < size:
        pytest.skip("not enough memory on the GPU")


def filled(shape: tuple[int, ...], seed: int) -> Any:
    """A large array of numbers that repeat only after a prime number of head vectors."""
    import cupy

    period, dim = 32_749, shape[-1]
    pattern = random((period, dim), seed)
    array = cupy.empty(shape, pattern.dtype)
    vectors = array.reshape(-1, dim)
    for start in range(0, len(vectors), period):
        part = vectors[start : start + period]
        part[...] = pattern[: len(part)]
    return array


def test_the_end_of_a_long_sequence_is_that_of_a_short_one(monkeypatch):
    """Bit for bit: they are cut alike."""
    import cupy

    dim, kernel_size, tail = 128, 5, 1024
    tokens = (1 << 31) // dim + 4 * tail
    needs_memory(6 * 2 * tokens * dim)
    spec = Spec((1, tokens, 1, dim), "float16")
    window = window_arguments("test", 1, kernel_size, 1, 1, False)
    problem = attention_problem("test", "forward", spec, spec, spec, window, None)
    plan = make_plan(problem, _device.cuda(0))
    assert (tokens - 2 * tail) % plan.tile_box[0] == 0
    takes(monkeypatch, {FORWARD: plan})
    arrays = [filled(spec.shape, seed) for seed in range(3)]

    def results(*arrays: Any) -> Any:
        return cuneigh.na1d(*arrays, kernel_size, return_lse=True, backend="hopper")

    whole = results(*arrays)
    end = results(*(array[:, -2 * tail :] for array in arrays))
    for long_result, short_result in zip(whole, end, strict=True):
        cupy.testing.assert_array_equal(long_result[:, -tail:], short_result[:, -tail:])


def test_a_video_decoder_with_4_billion_elements():
    """Arrays of LTX's decoder; samples of tokens against float64, all corners among them."""
    tokens, heads, dim, kernel_size = (121, 272, 480), 4, 64, 11
    shape = (1, *tokens, heads, dim)
    needs_memory(72 << 30)
    query, key, value, grad_output = (filled(shape, seed) for seed in range(4))
    spec = Spec(shape, "float16")
    window = window_arguments("test", 3, kernel_size, 1, 1, False)
    problem = attention_problem("test", "forward", spec, spec, spec, window, None)
    settings = {"kernel_size": kernel_size, "backend": "hopper"}
    output, lse = cuneigh.na3d(query, key, value, return_lse=True, **settings)
    gradients = cuneigh.na3d_backward(grad_output, query, key, value, output, lse, **settings)

    def at(array: Any, where: tuple[Any, ...]) -> np.ndarray:
        """[tokens, heads, ..] in float64."""
        found = to_numpy(array[(0, *where)].copy()).astype(np.float64)
        return found.reshape(-1, *array.shape[4:])

    def check(result: Any, here: tuple[slice, ...], wanted: np.ndarray, name: str) -> None:
        # What a single wrong key adds or leaves out is several times as much
        np.testing.assert_allclose(
            at(result, here)[0], wanted, atol=1e-4, rtol=2**-9, err_msg=f"{name} of {here}"
        )

    rng = np.random.default_rng(0)
    corners = itertools.product(*((0, length - 1) for length in tokens))
    anywhere = (tuple(map(int, rng.integers(0, tokens))) for _ in range(200))
    for token in itertools.chain(corners, anywhere):
        here = tuple(slice(x, x + 1) for x in token)
        seen, seeing = (
            tuple(slice(*window(x, 0)) for window, x in zip(windows, token, strict=True))
            for windows in zip(*((axis.window, axis.inverse) for axis in problem.axes), strict=True)
        )
        # As a query
        keys, values = at(key, seen), at(value, seen)
        logits = np.einsum("hd,khd->hk", at(query, here)[0], keys) * problem.scale
        wanted_lse = np.logaddexp.reduce(logits, -1)
        weights = np.exp(logits - wanted_lse[:, None])
        check(output, here, np.einsum("hk,khd->hd", weights, values), "output")
        np.testing.assert_allclose(
            at(lse, here)[0], wanted_lse, atol=5e-5, err_msg=f"lse of {token}"
        )
        grad_weights = np.einsum("hd,khd->hk", at(grad_output, here)[0], values)
        delta = (weights * grad_weights).sum(-1, keepdims=True)
        grad_logits = weights * (grad_weights - delta) * problem.scale
        check(gradients[0], here, np.einsum("hk,khd->hd", grad_logits, keys), "grad query")
        # As a key
        queries, grad_outputs = at(query, seeing), at(grad_output, seeing)
        logits = np.einsum("qhd,hd->hq", queries, at(key, here)[0]) * problem.scale
        weights = np.exp(logits - at(lse, seeing).T)
        check(gradients[2], here, np.einsum("hq,qhd->hd", weights, grad_outputs), "grad value")
        grad_weights = np.einsum("qhd,hd->hq", grad_outputs, at(value, here)[0])
        delta = np.einsum("qhd,qhd->hq", grad_outputs, at(output, seeing))
        grad_logits = weights * (grad_weights - delta) * problem.scale
        check(gradients[1], here, np.einsum("hq,qhd->hd", grad_logits, queries), "grad key")


def test_gradients_of_keys_are_told_of_before_that_of_the_query():
    torch = pytest.importorskip("torch")
    query, key, value, grad_output = torch.randn(
        (4, 1, 24, 24, 2, 64), device="cuda", dtype=torch.bfloat16
    )
    output, lse = cuneigh.na2d(query, key, value, 9, return_lse=True, backend="hopper")
    told: list[Any] = []
    before = WITH_KEY_GRADIENTS.set(told.append)
    try:
        gradients = cuneigh.na2d_backward(
            grad_output, query, key, value, output, lse, 9, backend="hopper"
        )
    finally:
        WITH_KEY_GRADIENTS.reset(before)
    [(_, of_key, of_value, *_)] = told
    assert of_key is gradients.key
    assert of_value is gradients.value
