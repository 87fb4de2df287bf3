"""The kernels for small windows: their planning anywhere, the kernels on a GPU in any plan."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.brute_force import seers
from helpers.gpu_arrays import NATIVE
from helpers.strategies import generators, inputs, layouts, problems
from hypothesis import assume, given
from hypothesis import strategies as st

from cuneigh import _device, _jit, _programs
from cuneigh._backends import fused
from cuneigh._backends.fused import launch
from cuneigh._backends.fused.choice import choose_plan
from cuneigh._backends.fused.passes import passes
from cuneigh._backends.fused.plan import make_plan
from cuneigh._backends.fused.small import forms as small_forms
from cuneigh._backends.fused.small import launch as small_launch
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._gpu.arrays import contiguous
from cuneigh._gpu.boxes import count_unions
from cuneigh._gpu.passes import DQ, FORWARD, JVP
from cuneigh._gpu.program import Launch, Program
from cuneigh._parameters import window_arguments
from cuneigh._problem import ARRAYS, Problem, Spec
from cuneigh._validate import attention_problem
from cuneigh._window import Axis

H200 = replace(_device.of_capability((9, 0)), sm_count=132)


@st.composite
def small(draw, operations=("forward", "backward", "jvp", "hvp"), **arguments):
    """Problems that the kernels take, but for some that have no plan."""
    problem = draw(
        problems(operations=operations, dtypes=("float16", "bfloat16"), budget=20_000, **arguments)
    )
    longest = min(small_plan.LONGEST[pass_] for pass_ in passes(problem))
    dims = st.sampled_from([dim for dim in small_forms.DIMS if dim <= longest])
    head_dim, value_dim = draw(dims), draw(dims)
    return replace(
        problem,
        head_dim=head_dim,
        value_dim=value_dim,
        additional=None,
        rpb_dtype=None,
        scale=abs(problem.scale) or 1.0,
        has_key_mask=draw(st.booleans()),
    )


def plans(problem, pass_):
    """Every plan that fits an H200, with every number of batch-heads a block."""
    length, _ = small_plan.sizes(problem, pass_)
    return [
        replace(candidate, batch_heads=batch_heads)
        for candidate in small_plan.candidates(problem, H200, pass_)
        if small_plan.resident(problem, candidate, H200, pass_)
        for batch_heads in range(1, length + 1)
    ]


def takes(patch, plans):
    """Make `fused` take these plans, by pass, where the kernels can read the arrays."""

    def choose_plan(problem, device, pass_, small_windows=True, *_):
        if small_windows and pass_ in plans:
            return plans[pass_]
        return make_plan(problem, device, pass_)

    patch.setattr(launch, "choose_plan", choose_plan)


# Planning


@given(problem=small(), data=st.data())
def test_tiles_hold_every_visible_pair_once(problem, data):
    """Along every axis, by the kernel's own rules."""
    pass_ = data.draw(st.sampled_from(passes(problem)))
    choices = list(small_plan.candidates(problem, H200, pass_))
    assume(choices)
    plan = data.draw(st.sampled_from(choices))
    assert math.prod(plan.tile) <= plan.columns
    for r, axis in enumerate(problem.axes):
        size = plan.warp_box[r] * plan.warps[r]
        window = pass_.window(axis)
        blocks = warps = 0
        for group in range(axis.dilation):
            length = pass_.group_length(axis, group)
            for first in range(0, length, size):
                blocks += 1
                rows = range(first, min(first + size, length))
                block_union = window(first, group)[0], window(rows[-1], group)[1]
                for start in range(first, rows.stop, plan.warp_box[r]):
                    warps += 1
                    mine = range(start, min(start + plan.warp_box[r], rows.stop))
                    check_tiles(plan, r, block_union, [window(row, group) for row in mine])
        count = count_unions(axis, plan.warp_box[r], plan.warps[r], pass_)
        assert (count.blocks, count.warps) == (blocks, warps)


def check_tiles(plan, r, block_union, windows):
    """What the rows of a warp, with these windows, find in its tiles of all stages."""
    (first, last), stage, tile = block_union, plan.stage[r], plan.tile[r]
    assert r == 0 or last - first <= stage
    seen = [[] for _ in windows]
    for begin in range(first, last, stage):
        base = min(begin, max(last - stage, first))
        low = max(min(window[0] for window in windows), begin)
        high = min(max(window[1] for window in windows), begin + stage)
        if low >= high:
            continue
        origin = base + min(max(low - base, 0), stage - tile)
        assert base <= origin
        assert origin + tile <= base + stage
        for window, columns in zip(windows, seen, strict=True):
            columns += [
                column
                for column in range(origin, origin + tile)
                if max(window[0], begin) <= column < window[1]
            ]
    for window, columns in zip(windows, seen, strict=True):
        assert columns == list(range(*window))


@given(problem=small(), device=st.sampled_from([(8, 0), (8, 6), (9, 0), (12, 0)]))
def test_a_plan_fits_the_device(problem, device):
    device = replace(_device.of_capability(device), sm_count=100)
    for pass_ in passes(problem):
        plan = small_plan.make_plan(problem, device, pass_)
        if plan is not None:
            taken = small_plan.shared_bytes(problem, plan, pass_)
            assert taken + small_plan.static_bytes(problem, plan, pass_) <= device.shared_memory
            assert 1 <= plan.batch_heads <= small_plan.sizes(problem, pass_)[0]
            assert math.prod(plan.warp_box) <= small_forms.ROWS


@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9, 13])
def test_small_windows_are_planned_so(kernel_size):
    query = Spec((8, 64, 64, 4, 32), "float16")
    window = window_arguments("test", 2, kernel_size, 1, 1, False)
    problem = attention_problem("test", "forward", query, query, query, window, None)
    assert isinstance(choose_plan(problem, H200), small_plan.SmallPlan)
    tangents = choose_plan(problem.but("jvp"), H200, JVP)
    assert isinstance(tangents, small_plan.SmallPlan) == (kernel_size < 13)  # in one stage


@pytest.mark.long
@pytest.mark.skipif(_jit.unavailable() is not None, reason=str(_jit.unavailable()))
@pytest.mark.parametrize(
    ("capability", "rank", "dim", "has_mask"),
    [
        ((8, 0), 1, 64, True),
        ((9, 0), 2, 64, False),
        ((10, 0), 2, 128, False),
        ((12, 0), 1, 64, True),
    ],
)
def test_kernels_do_not_spill(capability, rank, dim, has_mask, tmp_path):
    """Those with the largest tiles, which take the most registers, in blocks that leave the fewest.

    Without lse they do a part of what they do with it, which one device has to show, with TMA where
    they have it.
    """
    axes = (Axis(1, 1, 1, 1, 1, False),) * rank
    kernels = []
    for operation in ("forward", "backward", "jvp"):
        problem = Problem(
            operation, "bfloat16", 1, 1, 1, dim, dim, axes, 1.0, has_key_mask=has_mask
        )
        with_lse = (True, False) if capability == (9, 0) else (True,)
        flags = [*itertools.product((True, False), with_lse)]
        for pass_ in passes(problem):
            if not small_plan.takes(problem, pass_):
                continue
            others = [(True, True)] if pass_ == JVP else [(False, False)]
            for one_stage, lse in flags if pass_ == FORWARD else others:
                forms = small_forms.forms(problem, capability, pass_, one_stage)
                by_blocks = sorted(forms.items(), key=lambda item: item[0].blocks)
                fullest = {max(slots): form for form, slots in by_blocks}
                for columns, form in fullest.items():
                    has_tma = small_forms.has_tma(problem, capability, pass_, form, columns)
                    ways = {False, has_tma} if lse or pass_ != FORWARD else {has_tma}
                    kernels += [
                        small_launch.kernel(problem, pass_, form, columns, one_stage, lse, by_tma)
                        for by_tma in ways
                    ]
    arch = _device.of_capability(capability).arch
    for (kernel, _), compiled in _jit.precompile(kernels, [arch], tmp_path).items():
        spilled = compiled.resources.spill_stores + compiled.resources.spill_loads
        assert spilled == 0, f"{kernel.name} spills {spilled} on {arch}:\n{kernel.plan}"


@pytest.mark.skipif(_jit.unavailable() is not None, reason=str(_jit.unavailable()))
def test_the_fullest_kernels_do_not_spill_with_a_mask(tmp_path):
    """Of short vectors, four blocks of which a multiprocessor works on."""
    axes = (Axis(1, 1, 1, 1, 1, False),) * 2
    problem = Problem("backward", "bfloat16", 1, 1, 1, 32, 32, axes, 1.0, has_key_mask=True)
    ((form, slots),) = small_forms.forms(problem, (9, 0), DQ, False).items()
    kernels = [
        small_launch.kernel(problem, DQ, form, max(slots)),
        small_launch.kernel(problem, DQ, form, 80, by_tma=True),
    ]
    for compiled in _jit.precompile(kernels, ["sm_90"], tmp_path).values():
        assert compiled.resources.spill_stores + compiled.resources.spill_loads == 0


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-46, 1e39])
def test_only_scales_that_float32_has_are_taken(scale):
    query = Spec((1, 16, 16, 1, 32), "float16")
    window = window_arguments("test", 2, 3, 1, 1, False)
    problem = attention_problem("test", "forward", query, query, query, window, scale)
    assert not small_plan.takes(problem, FORWARD)
    assert small_plan.make_plan(problem, H200) is None


@pytest.mark.parametrize("side", [14, 40])
@pytest.mark.parametrize("operation", ["backward", "hvp"])
def test_numbers_of_queries_may_lie_backwards_in_memory(operation, side):
    """The kernels count offsets from the first query, so that they get a copy."""
    window = window_arguments("test", 2, 7, 1, 1, False)
    query = Spec((8, side, side, 4, 32), "float16")
    problem = attention_problem("test", operation, query, query, query, window, 1.0)
    names = (*_programs.taken(problem), "grad_lse")
    strides = {name: contiguous(problem.spec(name).shape) for name in names}
    turned = {name: tuple(-step for step in steps) for name, steps in strides.items()}
    copies = []
    for layouts_of in (strides, strides | {"grad_lse": turned["grad_lse"]}):
        layouts = tuple((layouts_of[name], 0) for name in names)
        made = Program(H200)
        given = {n: made.array(problem.spec(n), *at) for n, at in zip(names, layouts, strict=True)}
        wanted = {
            name: None if spec is None else made.array(spec)
            for name, spec in zip(ARRAYS[operation].results, problem.results, strict=True)
        }
        _programs.perform(fused, problem, given, wanted, made)
        copies.append(sum(not isinstance(each, Launch) for each in made._recorded))
    assert copies == [0, 1]


# Kernels


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["forward", "backward", "jvp", "hvp"])
@given(data=st.data(), rng=generators(), layout=layouts())
def test_any_plan_agrees_with_the_oracle(operation, data, rng, layout):
    problem = data.draw(small(operations=(operation,)))
    chosen = {}
    for pass_ in passes(problem):
        choices = plans(problem, pass_)
        assume(choices)
        chosen[pass_] = data.draw(st.sampled_from(choices))
    with pytest.MonkeyPatch.context() as patch:
        takes(patch, chosen)
        check_backend(fused, problem, inputs(problem, rng, layout), **NATIVE)


@pytest.mark.gpu
@given(data=st.data(), rng=generators())
def test_two_runs_give_the_same_bits(data, rng):
    problem = data.draw(small())
    given_inputs = inputs(problem, rng)
    first, second = (run_backend(fused, problem, given_inputs, **NATIVE) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


@pytest.mark.gpu
@given(data=st.data(), rng=generators(), poison=st.sampled_from([np.nan, np.inf, 1e3]))
def test_a_key_reaches_only_the_queries_that_see_it(data, rng, poison):
    problem = data.draw(small(operations=("forward",), cross=False))
    choices = plans(problem, FORWARD)
    assume(choices)
    chosen = data.draw(st.sampled_from(choices))
    given_inputs = inputs(problem, rng)._replace(wants_lse=True)
    token = tuple(data.draw(st.integers(0, length - 1)) for length in problem.tokens)
    names = ("key", "value") if np.isfinite(poison) else ("key",)
    changed = {name: getattr(given_inputs.operands, name).copy() for name in names}
    for array in changed.values():
        array[(slice(None), *token)] = poison
    touched_inputs = given_inputs._replace(operands=given_inputs.operands._replace(**changed))
    with pytest.MonkeyPatch.context() as patch:
        takes(patch, {FORWARD: chosen})
        plain = run_backend(fused, problem, given_inputs, **NATIVE)
        touched = run_backend(fused, problem, touched_inputs, **NATIVE)
    blind = ~seers(problem, token)
    for name in plain:
        np.testing.assert_array_equal(plain[name][:, blind], touched[name][:, blind])
