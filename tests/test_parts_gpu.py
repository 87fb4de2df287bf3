"""Borders, parts of a layout and key masks on a GPU: every backend against the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.gpu_arrays import NATIVE, to_cupy
from helpers.part_problems import FAMILIES, part_problem
from helpers.strategies import OPERATIONS, inputs

import cuneigh
from cuneigh import _device, _jit, _programs
from cuneigh._backends import BACKENDS
from cuneigh._backends.fused import launch
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._gpu.passes import FORWARD
from cuneigh._problem import Problem

ON_GPU = [backend for backend in BACKENDS if backend.NAME != "cpu"]
TAKING_PARTS = [backend for backend in ON_GPU if backend.NAME != "gemm"]
SEEDS = 6

pytestmark = pytest.mark.gpu


def cases(seeds: int = SEEDS):
    """Of every operation of every family, with a key mask and without."""
    kinds = itertools.product(FAMILIES, OPERATIONS, (False, True))
    for number, (family, operation, has_mask) in enumerate(kinds):
        yield family, operation, has_mask, range(number * seeds, (number + 1) * seeds)


@pytest.mark.parametrize("backend", ON_GPU, ids=lambda backend: backend.NAME)
@pytest.mark.parametrize(
    ("family", "operation", "has_mask", "seeds"),
    [
        pytest.param(*case, id=f"{case[0].dtype}-{case[0].rank}d-{case[0].head_dim}-{case[1]}-{m}")
        for case in cases()
        for m in [("shown", "masked")[case[2]]]
    ],
)
def test_parts_agree_with_the_oracle(backend, family, operation, has_mask, seeds):
    device = _device.cuda(0)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        problem = part_problem(rng, family, operation, has_mask)
        if backend.unsupported(problem, device) is None:
            check_backend(backend, problem, inputs(problem, rng), **NATIVE)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.additional and not f.rpb])
@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize("has_mask", [False, True])
def test_small_windows_of_parts_agree_with_the_oracle(family, operation, has_mask, monkeypatch):
    """The kernels for small windows, whatever the planner thinks of them."""
    from cuneigh._backends import fused

    chosen = launch.choose_plan

    def small(problem, device, pass_=FORWARD, small_windows=True, *others):
        plan = small_plan.make_plan(problem, device, pass_) if small_windows else None
        return plan or chosen(problem, device, pass_, small_windows, *others)

    monkeypatch.setattr(launch, "choose_plan", small)
    device = _device.cuda(0)
    for seed in range(10_000, 10_030):
        rng = np.random.default_rng(seed)
        problem = part_problem(rng, family, operation, has_mask)
        if fused.unsupported(problem, device) is None:
            check_backend(fused, problem, inputs(problem, rng), **NATIVE)


def other_starts(problem: Problem, rng: np.random.Generator) -> Problem:
    """Parts of the same sizes elsewhere in the layout."""

    def start(axis, length):
        return int(rng.integers(0, axis.layout - length + 1))

    return problem.at(
        [start(axis, axis.length) for axis in problem.axes],
        [start(axis, axis.key_length) for axis in problem.axes],
    )


@pytest.mark.parametrize("backend", TAKING_PARTS, ids=lambda backend: backend.NAME)
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_one_program_serves_other_starts(backend, operation):
    """What was recorded and compiled for one start computes others."""
    device, served = _device.cuda(0), 0
    for seed, family in itertools.product(range(20_000, 20_006), FAMILIES[:4]):
        rng = np.random.default_rng(seed)
        first = part_problem(rng, family, operation, has_mask=False)
        for problem in (first, other_starts(first, rng), other_starts(first, rng)):
            if backend.unsupported(problem, device) is None:
                served += problem.anywhere == first.anywhere
                check_backend(at_anywhere(backend), problem, inputs(problem, rng), **NATIVE)
    assert served


def at_anywhere(backend):
    """`backend`, asked about the problem that stands for all starts."""
    from types import SimpleNamespace

    def asked(function):
        return lambda problem, *rest: function(problem.anywhere, *rest)

    names = [name for name in OPERATIONS if hasattr(backend, name)]
    return SimpleNamespace(
        NAME=backend.NAME, **{name: asked(getattr(backend, name)) for name in names}
    )


def test_a_new_start_compiles_and_plans_nothing(monkeypatch):
    query, key = (
        to_cupy(np.random.default_rng(0).standard_normal((1, n, 2, 64)).astype("float16"))
        for n in (128, 160)
    )

    def tile(start: int):
        return cuneigh.na1d(
            query, key, key, 33, layout=4096, query_start=start, key_start=start - 16
        )

    tile(1024)
    monkeypatch.setattr(_jit, "load", None)
    before = _programs.program_for.cache_info().misses
    for start in (16, 1000, 1025, 3952):
        tile(start)
    assert _programs.program_for.cache_info().misses == before


@pytest.mark.parametrize("backend", ON_GPU, ids=lambda backend: backend.NAME)
def test_masked_numbers_change_no_bit(backend):
    """Whatever a hidden key and its value are."""
    device = _device.cuda(0)
    for seed, family in itertools.product(range(30_000, 30_004), FAMILIES):
        rng = np.random.default_rng(seed)
        problem = part_problem(rng, family, "forward", has_mask=True)
        if backend.unsupported(problem, device) is not None:
            continue
        given = inputs(problem, rng)  # hidden tokens are NaN
        hidden = ~given.operands.key_mask
        zeroed = {}
        for name in ("key", "value"):
            zeroed[name] = getattr(given.operands, name).copy()
            zeroed[name][hidden] = 0
        other = given._replace(operands=given.operands._replace(**zeroed))
        first = run_backend(backend, problem, given, **NATIVE)
        second = run_backend(backend, problem, other, **NATIVE)
        for name, array in first.items():
            assert array.tobytes() == second[name].tobytes(), (name, problem)
