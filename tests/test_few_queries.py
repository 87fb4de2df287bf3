"""The kernels of `fused` for few queries: planned anywhere, emulated, and run on a GPU."""

from __future__ import annotations

import itertools
import platform

import numpy as np
import pytest
from helpers import emulated
from helpers.accuracy import check_backend
from helpers.few_queries import few_queries, plans
from helpers.gpu_arrays import NATIVE, to_cupy
from helpers.strategies import inputs

import cuneigh
from cuneigh import _backends, _device, _jit, _programs
from cuneigh._backends import fused
from cuneigh._backends.fused import choice, launch
from cuneigh._backends.fused.split import launch as split_launch
from cuneigh._backends.fused.split import plan as split_plan
from cuneigh._backends.fused.split.plan import SplitPlan
from cuneigh._problem import Problem
from cuneigh._window import Axis
from cuneigh.cli.devices import device_of

H200 = device_of("sm_90")
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
DEVICES = [_device.of_capability(capability) for capability in CAPABILITIES]


def decoding(batch: int, queries: int, scale: float = 0.1) -> Problem:
    """A window of 4096 keys behind the queries; 32 heads on 8 key heads."""
    keys = 4095 + queries
    axis = Axis(queries, keys, 4096, 1, 1, True, "shift", 1 << 16, 40_000, 40_001 - 4096)
    return Problem("forward", "bfloat16", batch, 32, 8, 128, 128, (axis,), scale)


# Planning


def test_decoding_is_split_as_the_gpu_asks_for():
    """All heads that share a key read it together, and all multiprocessors have work."""
    for batch, queries in itertools.product((1, 2, 8, 32), (1, 4, 64)):
        problem = decoding(batch, queries)
        assert problem.anywhere.visible_pairs() == problem.visible_pairs()
        plan = choice.choose_plan(problem.anywhere, H200)
        assert isinstance(plan, SplitPlan)
        assert plan.heads == 4
        assert split_plan.blocks(problem, plan) >= 64
        if batch == 32:
            assert plan.splits == 1
        chosen = _backends.choose(problem, H200, None).NAME
        assert chosen == ("hopper" if queries == 64 else "fused")
    # What else there is to do takes as long as it ever did
    other = decoding(1, 1, scale=1e-38).anywhere
    assert not isinstance(choice.choose_plan(other, H200), SplitPlan)
    long = Axis(4096, 4096, 2048, 1, 1, True)
    other = Problem("forward", "bfloat16", 1, 32, 8, 128, 128, (long,), 0.1)
    assert not isinstance(choice.choose_plan(other, H200), SplitPlan)
    misaligned = choice.choose_plan(decoding(1, 1).anywhere, H200, few_queries=False)
    assert not isinstance(misaligned, SplitPlan)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.arch)
def test_a_plan_fits_and_its_kernels_are_among_those_of_the_problem(device):
    rng, found = np.random.default_rng(0), 0
    dims = [(128, 128), (64, 40), (256, 200)]
    for given, dtype in itertools.product(dims, ("float16", "bfloat16")):
        problem = few_queries(rng, dtype, given)
        for plan in plans(problem, device):
            found += 1
            form = plan.form
            assert split_plan.shared_bytes(problem, form) <= device.shared_memory
            assert plan.heads * plan.queries <= form.rows
            assert form.columns % (16 * form.key_warps) == 0
            assert plan.splits <= split_plan.MOST_SPLITS
            assert form.cluster in (1, plan.splits)
            assert split_plan.predicted_ms(problem, plan, device) > 0
            kernel = split_launch.kernel(problem, form)
            assert kernel in fused.kernels(problem, device)
    assert bool(found) == (device.capability >= (8, 0))


def test_each_query_and_head_is_a_row_of_one_block():
    """As the kernel finds them, by the numbers of the record."""
    rng = np.random.default_rng(1)
    for _ in range(8):
        problem = few_queries(rng, "bfloat16", (128, 128))
        (axis,) = problem.axes
        for plan in plans(problem, H200):
            record = split_launch._record(problem, plan)
            rows = []
            groups = range(min(axis.dilation, axis.length))
            for group in groups:
                length = axis.group_length(group)
                for first in range(0, length, plan.queries):
                    for head_box, row in itertools.product(
                        range(int(record["head_boxes"][0])), range(plan.form.rows)
                    ):
                        index, head = first + row // plan.heads, row % plan.heads
                        head += head_box * plan.heads
                        is_mine = row // plan.heads < plan.queries and index < length
                        if is_mine and head < problem.group_size:
                            rows.append((index * axis.dilation + group, head))
            assert len(rows) == len(set(rows)) == axis.length * problem.group_size
            boxes = sum(-(-axis.group_length(group) // plan.queries) for group in groups)
            assert record["boxes"][0] == boxes


needs_nvrtc = pytest.mark.skipif(_jit.unavailable() is not None, reason=str(_jit.unavailable()))


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_largest_kernel_does_not_spill(arch, tmp_path):
    """It has registers for no more; others need fewer. (On sm_86 it has no room, and on sm_100 and
    sm_120 it takes fewer registers.)
    """
    device = device_of(arch)
    problem = decoding(32, 64)
    form = max(split_plan.forms(problem, device), key=lambda form: (form.rows, form.cluster))
    assert form.row_tiles == 2
    kernel = split_launch.kernel(problem, form)
    ((_, compiled),) = _jit.precompile([kernel], [arch], tmp_path).items()
    resources = compiled.resources
    assert resources.registers > 0, "the log of NVRTC was not understood"
    assert resources.spill_stores + resources.spill_loads == 0


# The kernels


def in_turn(monkeypatch, device, is_tried=lambda plan: True):
    """Has `fused` take all plans for few queries in turn; gives the number of those taken."""
    taken = []

    def choose(problem, *rest):
        found = [plan for plan in plans(problem, device) if is_tried(plan)]
        taken.append(found[len(taken) % len(found)])
        return taken[-1]

    monkeypatch.setattr(launch, "choose_plan", choose)
    return taken


@pytest.mark.skipif(
    emulated.compiler() is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="needs g++ on x86-64 Linux",
)
def test_emulated_kernels_agree_with_the_oracle(tmp_path, monkeypatch):
    """Those with the fewest rows, without a cluster and with one."""
    emulator = emulated.Emulator(tmp_path)
    taken = in_turn(
        monkeypatch,
        emulated.H100,
        lambda plan: plan.form.row_tiles * plan.form.row_warps == 1,
    )
    for seed in range(3):
        problem = few_queries(np.random.default_rng(seed), "float16", (40, 32), 300)
        emulator.check(fused, problem, seed)
    tried = [(plan.splits, plan.form.cluster, plan.form.warps) for plan in taken]
    assert tried == [(1, 1, 4), (3, 1, 4), (8, 8, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(128, 128), (64, 40), (256, 200)], ids=str)
def test_kernels_agree_with_the_oracle(dims, monkeypatch):
    device = _device.cuda(0)
    if device.capability < (8, 0):
        pytest.skip("needs compute capability 8.0")
    taken = in_turn(monkeypatch, device)
    for seed in range(36):
        rng = np.random.default_rng(seed)
        problem = few_queries(rng, str(rng.choice(["float16", "bfloat16"])), dims, 1000)
        check_backend(fused, problem, inputs(problem, rng), **NATIVE)
    assert {plan.form for plan in taken} >= {*split_plan.forms(problem, device)}


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 32])
def test_a_decoder_plans_nothing_anew_and_is_captured(batch):
    """Position after position, each time with the window of keys in the cache, as a graph, too."""
    import cupy

    if _device.cuda(0).capability < (8, 0):
        pytest.skip("needs compute capability 8.0")
    rng, window, layout = np.random.default_rng(0), 512, 4096
    query = to_cupy(rng.standard_normal((batch, 1, 8, 64)).astype("float16"))
    cache = [to_cupy(rng.standard_normal((batch, 1024, 2, 64)).astype("float16")) for _ in "kv"]

    def step(position: int, backend: str | None = None):
        return cuneigh.na1d(
            query,
            *cache,
            window,
            is_causal=True,
            layout=layout,
            query_start=position,
            key_start=1000,
            return_lse=True,
            backend=backend,
        )

    step(1600)
    before = _programs.program_for.cache_info().misses
    made = [step(position) for position in (1511, 1700, 2023)]
    assert _programs.program_for.cache_info().misses == before
    for position, results in zip((1511, 1700, 2023), made, strict=True):
        for got, wanted in zip(results, step(position, "naive"), strict=True):
            cupy.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        step(2023)
        stream.begin_capture()
        output, lse = step(2023)
        graph = stream.end_capture()
        for _ in range(3):
            output.fill(0)
            graph.launch(stream)
            cupy.testing.assert_array_equal(output, made[-1][0])  # in the same order each time
            cupy.testing.assert_array_equal(lse, made[-1][1])
