"""The fused backend: its planning anywhere, its kernels on a GPU against the oracle."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.brute_force import seers
from helpers.cubin import code_of
from helpers.gpu_arrays import NATIVE
from helpers.strategies import generators, inputs, layouts, problems
from hypothesis import assume, given
from hypothesis import strategies as st

import cuneigh
from cuneigh import _device, _jit
from cuneigh._backends import fused
from cuneigh._backends.fused import launch
from cuneigh._backends.fused import plan as fused_plan
from cuneigh._backends.fused.choice import choose_plan, predicted_ms
from cuneigh._backends.fused.passes import passes
from cuneigh._backends.fused.small import launch as small_launch
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._backends.fused.small.plan import SmallPlan
from cuneigh._gpu.announce import announce
from cuneigh._gpu.boxes import count_walk
from cuneigh._gpu.passes import DKV, FORWARD
from cuneigh._parameters import window_arguments
from cuneigh._problem import Problem, Spec
from cuneigh._validate import attention_problem
from cuneigh._window import Axis

H200 = _device.Device("cuda", 0, "NVIDIA H200", (9, 0), 132, 227 * 1024)


def supported(operations=("forward", "backward"), **arguments):
    """Problems that this backend runs on some GPU."""
    return problems(operations=operations, dtypes=fused.DTYPES, **arguments)


# Planning


def pairs_of_a_walk(axis, warp_box, warps, column_box, pass_):
    """The counts and the visible pairs, by walking as the kernel does."""
    blocks = loads = visits = full = longest = 0
    seen = {}
    window = pass_.window(axis)
    for group in range(min(axis.dilation, axis.length)):
        length = pass_.group_length(axis, group)
        for first in range(0, length, warp_box * warps):
            blocks += 1
            rows = range(first, min(first + warp_box * warps, length))
            windows = {i: window(i, group) for i in rows}
            low = min(begin for begin, _ in windows.values())
            high = max(end for _, end in windows.values())
            walk = range(low, high, column_box)
            longest = max(longest, len(walk))
            for start in walk:
                loads += 1
                columns = range(start, min(start + column_box, high))
                for warp in range(warps):
                    mine = [i for i in rows if (i - first) // warp_box == warp]
                    pairs = [(i, j) for i in mine for j in columns if j in range(*windows[i])]
                    for pair in pairs:
                        seen[group, pair] = seen.get((group, pair), 0) + 1
                    visits += bool(pairs)
                    full += bool(mine) and len(pairs) == len(mine) * column_box
    return (blocks, loads, visits, full, longest), seen


@given(
    problem=problems(operations=("forward",), ranks=(1,), most_tokens=60),
    sizes=st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 2, st.integers(1, 9)),
    pass_=st.sampled_from([FORWARD, DKV]),
)
def test_counts_and_coverage_by_enumeration(problem, sizes, pass_):
    counts, seen = pairs_of_a_walk(problem.axes[0], *sizes, pass_)
    assert tuple(count_walk(problem.axes[0], *sizes, pass_)) == counts
    # Every visible pair is visited exactly once.
    assert set(seen.values()) <= {1}
    assert len(seen) == problem.axes[0].visible_pairs()


CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
DEVICES = [_device.of_capability(capability) for capability in CAPABILITIES]


@given(problem=supported(), device=st.sampled_from(DEVICES))
def test_a_plan_fits_the_kernel(problem, device):
    assume(fused.unsupported(problem, device) is None)
    for pass_ in passes(problem):
        plan = fused_plan.make_plan(problem, device, pass_)
        area = plan.area
        assert area in fused_plan.areas(problem, device, pass_)
        assert fused_plan.shared_bytes(problem, area, pass_) <= device.shared_memory
        assert np.prod(plan.warp_box) == 16 * area.row_tiles
        assert np.prod(plan.warps) == area.warps
        assert np.prod(plan.column_box) <= area.columns <= 64
        assert area.columns % (8 if problem.dtype == "float32" else 16) == 0
        most = problem.batch * problem.heads if pass_ == FORWARD else 1
        assert 1 <= plan.batch_heads <= most


def test_a_head_that_is_shared_is_walked_for_all_that_share_it():
    """Gradients of keys cost what they would for a key head each, but for fewer blocks."""
    query, shared = (Spec((2, 4096, heads, 64), "bfloat16") for heads in (8, 2))
    window = window_arguments("test", 1, 1000, 1, 1, False)
    own, grouped = (
        attention_problem("test", "backward", query, key, key, window, None)
        for key in (query, shared)
    )
    plan = fused_plan.make_plan(own, H200, DKV)
    costs = [fused_plan.cost(each, plan, DKV) * each.kv_heads for each in (own, grouped)]
    assert 0.9 * costs[0] < costs[1] < costs[0]
    assert predicted_ms(grouped, H200) < predicted_ms(own, H200)


@given(problem=supported(most_tokens=60), data=st.data())
def test_the_plan_is_the_cheapest_of_all_candidates(problem, data):
    pass_ = data.draw(st.sampled_from(passes(problem)))
    area = data.draw(st.sampled_from(fused_plan.areas(problem, H200, pass_)))
    costs = [
        fused_plan.cost(problem, candidate, pass_)
        for candidate in fused_plan.candidates(problem, area, pass_)
    ]
    chosen = fused_plan.cheapest_shapes(problem, area, pass_)
    assert fused_plan.cost(problem, chosen, pass_) == pytest.approx(min(costs), rel=1e-12)


@given(
    tokens=st.integers(1, 20_000),
    kernel_size=st.integers(1, 3000),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    head_dim=st.sampled_from([64, 128]),
)
def test_batch_heads_of_a_block_keep_multiprocessors_busy(tokens, kernel_size, sizes, head_dim):
    """Several batch-heads a block never make more rounds of work than one each by much."""
    batch, heads = sizes
    spec = Spec((batch, tokens, heads, head_dim), "bfloat16")
    window = window_arguments("test", 1, min(kernel_size, tokens), 1, 1, False)
    problem = attention_problem("test", "forward", spec, spec, spec, window, None)
    plan = fused_plan.make_plan(problem, H200)
    boxes = fused_plan.count(problem, plan).blocks
    at_once = fused_plan.resident(problem, plan.area, H200, FORWARD) * H200.sm_count
    rounds, of_one = (
        count * -(-boxes * -(-batch * heads // count) // at_once) for count in (plan.batch_heads, 1)
    )
    assert rounds <= 1.5 * of_one


@given(problem=supported(), device=st.sampled_from(DEVICES))
def test_what_is_refused(problem, device):
    """bfloat16 before sm_80, and long vectors in the float32 backward with little memory."""
    longest = max(problem.head_dim, problem.value_dim)
    old = problem.dtype == "bfloat16" and device.capability < (8, 0)
    long = (
        (problem.dtype, problem.operation) == ("float32", "backward")
        and longest > 128
        and device.shared_memory < 100 * 1024
    )
    if old or not long:
        assert (fused.unsupported(problem, device) is not None) == old


def test_few_kernels_serve_all_layouts_and_windows():
    rng = np.random.default_rng(0)
    chosen = set()
    for _ in range(25):
        tokens, batch = rng.integers(8, 200, 2), rng.integers(1, 9)
        kernel_size = [int(rng.integers(2, length + 1)) for length in tokens]
        dilation = [
            int(rng.integers(1, length // size + 1))
            for length, size in zip(tokens, kernel_size, strict=True)
        ]
        stride = [int(rng.integers(1, size + 1)) for size in kernel_size]
        spec = Spec((int(batch), *map(int, tokens), 2, 64), "bfloat16")
        sizes = tuple(kernel_size), tuple(stride), tuple(dilation)
        window = window_arguments("test", 2, *sizes, False)
        problem = attention_problem("test", "forward", spec, spec, spec, window, None)
        plan = choose_plan(problem, H200)
        if isinstance(plan, SmallPlan):
            sizes = plan.form, plan.columns, plan.one_stage
            kernel = small_launch.kernel(problem, FORWARD, *sizes)
        else:
            many = fused_plan.many_batch_heads(problem, FORWARD, plan.batch_heads)
            kernel = launch.kernel(problem, H200.capability, FORWARD, plan.area, many, 16, 16)
        assert kernel in fused.kernels(problem, H200)
        chosen.add(kernel)
    assert len(chosen) <= 6


def test_each_plan_is_printed_once(monkeypatch, capsys):
    spec = Spec((1, 30, 48, 4, 64), "float16")
    window = window_arguments("test", 2, (7, 9), 1, (2, 1), (True, False))
    problem = attention_problem("test", "forward", spec, spec, spec, window, None)
    plan = fused_plan.make_plan(problem, H200)
    announce("fused", "forward", problem, plan)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("CUNEIGH_PRINT_PLANS", "1")
    for _ in range(2):
        announce("fused", "forward", problem, plan)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "cuneigh: fused forward of float16, 30x48 tokens, kernel_size 7x9, dilation 2x1, "
        f"causal 1x0, batch 1, 4 heads, head_dim 64: {plan}"
    )
    assert "columns in" in str(plan)


OLDEST, AMPERE, SMALL, ADA, LARGE = DEVICES[:5]
COMPILED = [
    # 120, 24 and 56 are padded, to 128, 32 and 64: their kernels hold all that those of the whole
    # lengths do, and take as many registers or a few more, but for two that took 1 of 242 less. 120
    # takes the most with the largest boxes. For sm_89 the kernels are those of sm_86, of which the
    # assembler makes the same: `test_code_for_sm_89_is_that_for_sm_86`. sm_80 has those of sm_86 in
    # half types, too, and takes as many registers or fewer.
    *itertools.product([each for each in DEVICES if each != ADA], (120,), ("float32",)),
    *itertools.product(
        [each for each in DEVICES if each not in (ADA, AMPERE)], (120,), ("float16",)
    ),
    # Longer vectors and little shared memory make other boxes. At 256 it is the whole length that
    # takes the most.
    *itertools.product((OLDEST, SMALL, LARGE), (256,), ("float16", "float32")),
    *itertools.product((OLDEST, LARGE), (24,), ("float16",)),
    *itertools.product((OLDEST, LARGE), (56,), ("float32",)),
]


def problems_of(device, head_dim, dtype, operation):
    """Those of three axes, whose kernels hold the most, without a bias and with one."""
    # Adding the bias is the same code on all devices. The one on which most kinds of boxes may be
    # taken has it at every length, the oldest, which multiplies otherwise, where it leaves the
    # fewest registers.
    biased = device == LARGE or (device, head_dim, dtype) == (OLDEST, 120, "float32")
    axes = (Axis(1, 1, 1, 1, 1, False),) * 3
    plain = Problem(operation, dtype, 1, 1, 1, head_dim, head_dim, axes, 1.0)
    return [plain, replace(plain, rpb_dtype="float32")] if biased else [plain]


def kernels_of(problem, device):
    """Those for several batch-heads a block, of which those for one are a part."""
    return [
        kernel
        for kernel in fused.kernels(problem, device)
        if kernel.name == f"fused/{problem.operation}"
        and "kManyBatchHeads = false" not in kernel.plan
    ]


def sizes_of(kernel):
    """The integers that are compiled into a kernel, and what else is."""
    sizes = {name: int(value) for name, value in re.findall(r"int (\w+) = (\d+);", kernel.plan)}
    del sizes["kSharedBytes"]  # follows from the others
    return sizes, re.sub(r".* int .*\n", "", kernel.plan)


def is_part_of(kernel, other, device):
    """Whether `kernel` does a part of what `other` does, with as many registers or more.

    It has shorter loops over rows, columns or dimensions, adds no bias, or has the sums of one
    gradient, that of queries, where `other` has those of keys and of values; and no other
    difference. It may have more columns for fewer rows, but on the device for which boxes of every
    size are compiled. On every device it then takes as many registers or fewer.
    """
    (sizes, rest), (others, rest_of_other) = sizes_of(kernel), sizes_of(other)
    if device != LARGE:
        for each in (sizes, others):
            each["logits"] = each.pop("kColumns") * each["kRowTiles"]
    parts = {rest_of_other, re.sub(r"using Bias = \w+;", "using Bias = void;", rest_of_other)}
    if "kGradQk = true" in rest_of_other and "kGradV = true" in rest_of_other:
        parts |= {re.sub(r"(kRowsAreKeys|kGradV) = true", r"\1 = false", part) for part in parts}
    shorter = {"kRowTiles", "kColumns", "logits", "kHeadDim", "kValueDim", "kBlocks"}
    return (
        kernel.name == other.name
        and rest in parts
        and (sizes, rest) != (others, rest_of_other)
        and all(
            size <= others[name] if name in shorter else size == others[name]
            for name, size in sizes.items()
        )
    )


def kernels_to_compile(device, dtype, operation):
    """The kernels of all lengths in COMPILED, and those of them that are to be compiled."""
    every = [
        kernel
        for of_device, head_dim, of_dtype in COMPILED
        if (of_device, of_dtype) == (device, dtype)
        for problem in problems_of(device, head_dim, dtype, operation)
        for kernel in kernels_of(problem, device)
    ]
    largest = [
        kernel
        for kernel in every
        if is_full(kernel, device) and not any(is_part_of(kernel, other, device) for other in every)
    ]
    return every, largest


# `kRowsAreKeys` and `kGradQk` of the gradients of 256 elements in half types, all three of which
# have 30 registers left: each is compiled for one of the devices that have boxes of their own.
IN_TURN = {OLDEST: (False, True), SMALL: (True, False), LARGE: (True, True)}


ROOMY = {
    # device, dtype, operation, longest vector, columns, blocks
    (OLDEST, "float16", "forward", 128, 32, 1),
    (OLDEST, "float16", "backward", 128, 16, 1),
    (OLDEST, "float32", "forward", 64, 16, 3),
    (SMALL, "float32", "forward", 128, 16, 1),
    (LARGE, "float16", "forward", 32, 32, 3),
    (LARGE, "float16", "forward", 32, 64, 2),
    (LARGE, "float16", "forward", 128, 64, 1),
}
"""Kernels that have 48 registers left or more: others of the same device, dtype and operation have
fewer, and would spill first."""


def is_full(kernel, device):
    """Whether `kernel` may use up the registers of `device` where others like it do not."""
    sizes, rest = sizes_of(kernel)
    longest = max(sizes["kHeadDim"], sizes["kValueDim"])
    dtype, operation = re.search(r"Element = (\w+)", rest)[1], kernel.name.removeprefix("fused/")
    boxes = longest, sizes["kColumns"], sizes["kBlocks"]
    if (device, dtype, operation, *boxes) in ROOMY and sizes["kRowTiles"] == 1:
        return False
    if kernel.name == "fused/backward" and longest == 256 and "float16" in rest:
        return all(
            f"{flag} = {str(value).lower()}" in rest
            for flag, value in zip(("kRowsAreKeys", "kGradQk"), IN_TURN[device], strict=True)
        )
    # Short vectors do where several blocks share a multiprocessor.
    return longest > 64 or sizes["kBlocks"] > 1 or device == LARGE


OPERATIONS = ("forward", "backward")
GROUPS = dict.fromkeys(
    (device, dtype, operation)
    for (device, _, dtype), operation in itertools.product(COMPILED, OPERATIONS)
)


def test_boxes_of_every_size_are_compiled_for_some_device():
    """So that what is wrong with a size is seen though parts of other kernels are left out."""

    def boxes_of(kernels):
        for kernel in kernels:
            sizes, rest = sizes_of(kernel)
            dtype = re.search(r"Element = (\w+)", rest)[1]
            yield kernel.name, dtype, sizes["kRowTiles"], sizes["kColumns"], sizes["kWarps"]

    possible, compiled = set(), set()
    for group in GROUPS:
        every, largest = kernels_to_compile(*group)
        possible.update(boxes_of(every))
        compiled.update(boxes_of(largest))
    assert compiled == possible


def test_lengths_without_kernels_are_refused():
    for (device, head_dim, dtype), operation in itertools.product(COMPILED, OPERATIONS):
        for problem in problems_of(device, head_dim, dtype, operation):
            refused = fused.unsupported(problem, device) is not None
            assert bool(kernels_of(problem, device)) != refused


needs_nvrtc = pytest.mark.skipif(_jit.unavailable() is not None, reason=str(_jit.unavailable()))


@pytest.mark.long
@needs_nvrtc
@pytest.mark.parametrize(
    ("device", "dtype", "operation"), GROUPS, ids=lambda value: getattr(value, "arch", str(value))
)
def test_kernels_do_not_spill(device, dtype, operation, tmp_path):
    _, kernels = kernels_to_compile(device, dtype, operation)
    assert kernels
    for (kernel, _), compiled in _jit.precompile(kernels, [device.arch], tmp_path).items():
        resources = compiled.resources
        spilled = resources.spill_stores + resources.spill_loads
        assert resources.registers > 0, "the log of NVRTC was not understood"
        assert spilled == 0, f"{kernel.name} spills {spilled} on {device.arch}:\n{kernel.plan}"


@needs_nvrtc
def test_code_for_sm_89_is_that_for_sm_86(tmp_path):
    """Byte for byte, which is why kernels are compiled for one of them."""
    (problem,) = problems_of(ADA, 120, "float32", "forward")
    kernel = kernels_of(problem, ADA)[0]
    assert kernel in kernels_of(problem, SMALL)
    compiled = _jit.precompile([kernel], [SMALL.arch, ADA.arch], tmp_path).values()
    first, second = (code_of(each.cubin.read_bytes()) for each in compiled)
    assert first
    assert first == second


# Kernels


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["forward", "backward"])
@given(data=st.data(), rng=generators(), layout=layouts())
def test_both_operations_agree_with_the_oracle(operation, data, rng, layout):
    problem = data.draw(supported(operations=(operation,)))
    assume(fused.unsupported(problem, H200) is None)
    check_backend(fused, problem, inputs(problem, rng, layout), **NATIVE)


@pytest.mark.gpu
@given(data=st.data(), rng=generators(), layout=layouts())
def test_blocks_that_go_through_several_batch_heads(data, rng, layout):
    problem = data.draw(supported(operations=("forward",)))
    assume(fused.unsupported(problem, H200) is None and not problem.is_empty)
    batch_heads = data.draw(st.integers(1, problem.batch * problem.heads + 1))

    def choose_plan(problem, device, pass_, *readable_by):
        return replace(fused_plan.make_plan(problem, device, pass_), batch_heads=batch_heads)

    with mock.patch.object(launch, "choose_plan", choose_plan):
        check_backend(fused, problem, inputs(problem, rng, layout), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(head_dim):
    value_dim = head_dim * 7 % fused.LONGEST + 1
    for dtype, operation in itertools.product(("bfloat16", "float32"), ("forward", "backward")):
        for dims in ((head_dim, head_dim), (head_dim, value_dim)):
            query, value = (Spec((1, 9, 10, 2, dim), dtype) for dim in dims)
            window = window_arguments("test", 2, (5, 4), 1, (1, 2), False)
            problem = attention_problem("test", operation, query, query, value, window, None)
            check_backend(fused, problem, inputs(problem, np.random.default_rng(0)), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", fused.DTYPES)
@pytest.mark.parametrize(
    ("tokens", "kernel_size"),
    [
        ((1,), 1),
        ((131,), 1),
        ((97,), 97),
        ((521,), 13),
        ((3, 5), (3, 5)),
        ((31, 37), (5, 7)),
        ((2, 3, 2), 1),
        ((5, 7, 11), (5, 3, 11)),
    ],
)
def test_windows_and_layouts_of_extreme_sizes(dtype, tokens, kernel_size):
    query, value = (Spec((1, *tokens, 2, dim), dtype) for dim in (24, 40))
    window = window_arguments("test", len(tokens), kernel_size, 1, 1, False)
    for operation in ("forward", "backward"):
        problem = attention_problem("test", operation, query, query, value, window, None)
        check_backend(fused, problem, inputs(problem, np.random.default_rng(0)), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", fused.DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(dtype, sign):
    """They are all near 1e4 or all near -1e4."""
    spec = Spec((1, 200, 2, 64), dtype)
    window = window_arguments("test", 1, 40, 1, 1, False)
    for operation in ("forward", "backward"):
        problem = attention_problem("test", operation, spec, spec, spec, window, sign * 1e4 / 64)
        given_inputs = inputs(problem, np.random.default_rng(0))
        near_one = {
            name: (1 + array / 256).astype(array.dtype)
            for name, array in given_inputs.operands._asdict().items()
            if name in ("query", "key")
        }
        operands = given_inputs.operands._replace(**near_one)
        check_backend(fused, problem, given_inputs._replace(operands=operands), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("small_windows", [False, True])
def test_more_elements_than_32_bits_count(small_windows, monkeypatch):
    """The end of a long sequence is that of a short one, bit for bit: they are cut alike."""
    import cupy

    dtype, dim, kernel_size = "float16", 128, 5
    tail = 4 * 16 * 13 * 4  # a multiple of what any block covers: four warps of 13 or 16 rows, say
    tokens = ((1 << 31) // dim // tail + 4) * tail
    if cupy.cuda.runtime.memGetInfo()[0] < 12 * 2 * tokens * dim:
        pytest.skip("not enough memory on the GPU")
    window = window_arguments("test", 1, kernel_size, 1, 1, False)
    spec = Spec((1, tokens, 1, dim), dtype)
    long = {
        operation: attention_problem("test", operation, spec, spec, spec, window, None)
        for operation in ("forward", "backward")
    }

    def choose_plan(problem, device, pass_, small_can_read, *_):
        if small_windows and small_can_read:
            plan = small_plan.make_plan(long[problem.operation], device, pass_)
            assert tail % math.prod((*plan.warp_box, *plan.warps)) == 0
            return plan
        return fused_plan.make_plan(long[problem.operation], device, pass_)

    monkeypatch.setattr(launch, "choose_plan", choose_plan)
    rng = cupy.random.default_rng(0)
    pattern = rng.standard_normal((1 << 15, dim), dtype=np.float32).astype(dtype)
    arrays = [cupy.resize(cupy.roll(pattern, i, 0), spec.shape) for i in range(4)]

    def results(query, key, value, grad_output):
        window = {"kernel_size": kernel_size, "backend": "fused"}
        output, lse = cuneigh.na1d(query, key, value, return_lse=True, **window)
        gradients = cuneigh.na1d_backward(grad_output, query, key, value, output, lse, **window)
        return output, lse, *gradients[:3]

    whole = results(*arrays)
    end = results(*(array[:, -2 * tail :] for array in arrays))
    for long_result, short_result in zip(whole, end, strict=True):
        cupy.testing.assert_array_equal(long_result[:, -tail:], short_result[:, -tail:])


@pytest.mark.gpu
@given(data=st.data(), rng=generators())
def test_two_runs_give_the_same_bits(data, rng):
    problem = data.draw(supported())
    assume(fused.unsupported(problem, H200) is None)
    given_inputs = inputs(problem, rng)
    first, second = (run_backend(fused, problem, given_inputs, **NATIVE) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


@pytest.mark.gpu
@given(data=st.data(), rng=generators(), poison=st.sampled_from([np.nan, np.inf, 1e3]))
def test_a_key_reaches_only_the_queries_that_see_it(data, rng, poison):
    problem = data.draw(supported(operations=("forward",), cross=False))
    given_inputs = inputs(problem, rng)._replace(wants_lse=True)
    plain = run_backend(fused, problem, given_inputs, **NATIVE)
    token = tuple(data.draw(st.integers(0, length - 1)) for length in problem.tokens)
    names = ("key", "value") if np.isfinite(poison) else ("key",)
    changed = {name: getattr(given_inputs.operands, name).copy() for name in names}
    for array in changed.values():
        array[(slice(None), *token)] = poison
    touched_inputs = given_inputs._replace(operands=given_inputs.operands._replace(**changed))
    touched = run_backend(fused, problem, touched_inputs, **NATIVE)
    blind = ~seers(problem, token)
    for name in plain:
        np.testing.assert_array_equal(plain[name][:, blind], touched[name][:, blind])
