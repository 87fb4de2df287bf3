"""All gradients of whole dilation groups in one launch: planning, and the kernel in any plan."""

from __future__ import annotations

import math
import platform
from dataclasses import replace

import pytest
from helpers.accuracy import check_backend
from helpers.emulated import H100, Emulator, compiler
from helpers.gpu_arrays import NATIVE
from helpers.strategies import generators, inputs, problems
from hypothesis import assume, given
from hypothesis import strategies as st

from cuneigh import _device, _jit
from cuneigh._backends import fused
from cuneigh._backends.fused import choice, launch
from cuneigh._backends.fused.small import launch as small_launch
from cuneigh._backends.fused.small import whole
from cuneigh._backends.fused.small.whole import WholePlan
from cuneigh._gpu.passes import DKV, DQ
from cuneigh._gpu.program import Program
from cuneigh._parameters import window_arguments
from cuneigh._problem import Operands, Problem, Spec
from cuneigh._validate import attention_problem
from cuneigh._window import Axis

H200 = replace(_device.of_capability((9, 0)), sm_count=132)


def problem_of(tokens, kernel_size, dilation=1, dim=32, batch=2, heads=2, kv_heads=2):
    query, key = (Spec((batch, *tokens, each, dim), "bfloat16") for each in (heads, kv_heads))
    window = window_arguments("test", len(tokens), kernel_size, 1, dilation, False)
    return attention_problem("test", "backward", query, key, key, window, None)


@st.composite
def small(draw):
    problem = draw(
        problems(operations=("backward",), dtypes=("float16", "bfloat16"), budget=20_000)
    )
    return replace(
        problem,
        head_dim=32,
        value_dim=32,
        additional=None,
        rpb_dtype=None,
        has_key_mask=False,
        scale=abs(problem.scale) or 1.0,
    )


@given(small())
def test_a_block_has_room_for_a_group_and_its_windows(problem):
    for plan in whole.plans_to_try(problem, H200, 100):
        form = plan.form
        groups = [-(-axis.length // axis.dilation) for axis in problem.axes]
        assert all(map(int.__ge__, plan.stage, groups))
        rows = [number * size for number, size in zip(plan.boxes, plan.box, strict=True)]
        assert all(map(int.__ge__, rows, groups))
        assert math.prod(plan.boxes) <= form.boxes
        assert math.prod(plan.box) <= whole.ROWS
        assert plan.form.contiguous == (plan.query_tile[1:] == plan.stage[1:])
        for pass_ in (DQ, DKV):
            tile = plan.of_pass(pass_).tile
            assert all(map(int.__ge__, tile, whole.tile_of(problem, plan.box, pass_)))
            assert math.prod(tile) <= form.columns
        taken = whole.shared_bytes(problem, plan)
        assert whole.resident(problem, plan, H200) * taken <= H200.shared_memory


def test_groups_that_fit_are_planned_so():
    fitting = [problem_of((14, 14), 7, batch=128), problem_of((56, 56), 7, dilation=8, batch=128)]
    for problem in fitting:
        assert isinstance(choice.choose_plan(problem, H200, DQ), WholePlan)
        assert not isinstance(choice.choose_plan(problem, H200, DQ, whole_groups=False), WholePlan)
        assert list(choice.plans(problem, H200)) == ["dq"]
    others = [
        problem_of((56, 56), 7),
        problem_of((14, 14), 7, dim=64),
        problem_of((14, 14), 7, heads=4),
        replace(fitting[0], has_key_mask=True),
        fitting[0].but("forward"),
    ]
    assert not any(whole.make_plan(other, H200) for other in others)
    assert whole.make_plan(fitting[0], _device.of_capability((8, 0))) is None


def test_what_tma_cannot_read_takes_two_passes():
    problem = problem_of((14, 14), 7, batch=128)
    shape = problem.specs.query.shape

    def launches(strides):
        program = Program(H200)
        given = program.array(problem.specs.query, strides)
        arrays = [program.array(problem.specs.query) for _ in range(7)]
        lse = program.array(Spec(shape[:-1], "float32"))
        operands, gradients = Operands(given, *arrays[:2]), Operands(*arrays[2:5])
        fused.backward(problem, operands, *arrays[5:], lse, None, gradients, program)
        return [kernel.name for kernel in program.kernels]

    assert launches(None) == ["fused/small/whole"]
    contiguous = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    assert launches((0, *contiguous[1:])) == ["fused/small/backward"] * 2


@pytest.mark.skipif(
    compiler() is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="needs g++ on x86-64 Linux",
)
@pytest.mark.parametrize(
    ("problem", "contiguous"),
    [
        (problem_of((8, 14), 3, batch=1), False),
        (problem_of((9, 14), (3, 7), dilation=(2, 2), batch=3, heads=1, kv_heads=1), True),
    ],
    ids=["boxes", "contiguous"],
)
def test_groups_agree_with_the_oracle(problem, contiguous, tmp_path, monkeypatch):
    plans = whole.plans_to_try(problem, H100, 100)
    plan = next(plan for plan in plans if plan.form.contiguous == contiguous)
    monkeypatch.setattr(launch, "choose_plan", lambda *_: replace(plan, batch_heads=2))
    Emulator(tmp_path).check(fused, problem, seed=0)


@pytest.mark.skipif(_jit.unavailable() is not None, reason=str(_jit.unavailable()))
def test_the_fullest_kernel_does_not_spill(tmp_path):
    axes = (Axis(1, 1, 1, 1, 1, False),) * 3
    problem = Problem("backward", "bfloat16", 1, 1, 1, 32, 32, axes, 1.0)
    kernel = small_launch.whole_kernel(problem, max(whole.FORMS))
    ((_, compiled),) = _jit.precompile([kernel], ["sm_90"], tmp_path).items()
    assert compiled.resources.spill_stores + compiled.resources.spill_loads == 0


@pytest.mark.gpu
@given(problem=small(), data=st.data(), rng=generators())
def test_any_plan_agrees_with_the_oracle(problem, data, rng):
    plans = whole.plans_to_try(problem, _device.cuda(0), 100)
    assume(plans)
    plan = data.draw(st.sampled_from(plans))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "choose_plan", lambda *_: plan)
        check_backend(fused, problem, inputs(problem, rng), **NATIVE)
