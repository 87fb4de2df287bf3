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

from cuneigh import _device, _jit
from cuneigh._backends import fused
from cuneigh._backends.fused import plan as _fused_plan
from cuneigh._backends.fused.small import launch as _halo
from cuneigh._backends.fused.small import plan as _halo_plan
from cuneigh._problem import Problem, Spec
from cuneigh._validate import attention_problem, window_arguments
from cuneigh._window import Axis

H200 = replace(_device.of_capability((9, 0)), sm_count=132)


@st.composite
def small(draw, operations=("forward", "backward"), **arguments):
    """Problems that the kernels take, but for some that have no plan."""
    problem = draw(
        problems(operations=operations, dtypes=("float16", "bfloat16"), budget=20_000, **arguments)
    )
    role = _fused_plan.roles(problem)[0]
    head_dim, value_dim = (draw(st.sampled_from(_halo_plan.dims(role))) for _ in range(2))
    return replace(
        problem,
        head_dim=head_dim,
        value_dim=value_dim,
        additional=None,
        rpb_dtype=None,
        scale=abs(problem.scale) or 1.0,
    )


def plans(problem, role):
    """Every plan that fits an H200, with every part."""
    length, _ = _halo_plan.sizes(problem, role)
    return [
        replace(candidate, part=part)
        for candidate in _halo_plan.candidates(problem, H200, role)
        if _halo_plan.resident(problem, candidate, H200, role)
        for part in range(1, length + 1)
    ]


# Planning


@given(problem=small(), data=st.data())
def test_slabs_and_lists_meet_every_visible_pair_once(problem, data):
    """Along every axis, by the kernel's own rules."""
    role = data.draw(st.sampled_from(_fused_plan.roles(problem)))
    choices = list(_halo_plan.candidates(problem, H200, role))
    assume(choices)
    plan = data.draw(st.sampled_from(choices))
    by_keys = _fused_plan.rows_are_keys(role)
    assert math.prod(plan.list) <= plan.columns
    for r, axis in enumerate(problem.axes):
        size = plan.warp_box[r] * plan.warps[r]
        blocks = warps = 0
        for group in range(axis.dilation):
            length = axis.key_group_length(group) if by_keys else axis.group_length(group)
            meets = axis.inverse if by_keys else axis.window
            for first in range(0, length, size):
                blocks += 1
                rows = range(first, min(first + size, length))
                reach = meets(first, group)[0], meets(rows[-1], group)[1]
                for start in range(first, rows.stop, plan.warp_box[r]):
                    warps += 1
                    mine = range(start, min(start + plan.warp_box[r], rows.stop))
                    check_lists(plan, r, reach, [meets(row, group) for row in mine])
        count = _halo_plan.count_axis(axis, plan.warp_box[r], plan.warps[r], by_keys)
        assert (count.blocks, count.warps) == (blocks, warps)


def check_lists(plan, r, reach, windows):
    """What the rows of a warp, with these windows, find in the lists of all slabs."""
    slab, size = plan.slab[r], plan.list[r]
    assert r == 0 or reach[1] - reach[0] <= slab
    seen = [[] for _ in windows]
    for begin in range(reach[0], reach[1], slab):
        base = min(begin, max(reach[1] - slab, reach[0]))
        low = max(min(window[0] for window in windows), begin)
        high = min(max(window[1] for window in windows), begin + slab)
        if low >= high:
            continue
        origin = base + min(max(low - base, 0), slab - size)
        assert base <= origin
        assert origin + size <= base + slab
        for window, columns in zip(windows, seen, strict=True):
            columns += [
                column
                for column in range(origin, origin + size)
                if max(window[0], begin) <= column < window[1]
            ]
    for window, columns in zip(windows, seen, strict=True):
        assert columns == list(range(*window))


@given(problem=small(), device=st.sampled_from([(8, 0), (8, 6), (9, 0), (12, 0)]))
def test_a_plan_fits_the_device(problem, device):
    device = replace(_device.of_capability(device), sm_count=100)
    for role in _fused_plan.roles(problem):
        plan = _halo_plan.make_plan(problem, device, role)
        if plan is not None:
            taken = _halo_plan.shared_bytes(problem, plan, role)
            assert taken + _halo_plan.static_bytes(plan, role) <= device.shared_memory
            assert 1 <= plan.part <= _halo_plan.sizes(problem, role)[0]
            assert math.prod(plan.warp_box) <= _halo_plan.ROWS


@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9, 13])
def test_small_windows_are_planned_so(kernel_size):
    query = Spec((8, 64, 64, 4, 32), "float16")
    window = window_arguments("test", 2, kernel_size, 1, 1, False)
    problem = attention_problem("test", "forward", query, query, query, window, None)
    assert _halo_plan.make_plan(problem, H200) is not None


@pytest.mark.skipif(_jit.unavailable() is not None, reason=str(_jit.unavailable()))
@pytest.mark.parametrize(
    ("capability", "rank", "dim"),
    [((8, 0), 1, 64), ((9, 0), 2, 64), ((10, 0), 2, 128), ((12, 0), 1, 64)],
)
def test_kernels_do_not_spill(capability, rank, dim, tmp_path):
    """Those with the longest lists, which take the most registers."""
    axes = (Axis(1, 1, 1, 1, 1, False),) * rank
    kernels = []
    for operation in ("forward", "backward"):
        problem = Problem(operation, "bfloat16", 1, 1, 1, dim, dim, axes, 1.0)
        flags = [*itertools.product((True, False), repeat=2)]
        for role in _fused_plan.roles(problem):
            if not _halo_plan.takes(problem, role):
                continue
            for whole, lse in flags if role == "forward" else [(False, False)]:
                for form, places in _halo_plan.forms(problem, capability, role, whole).items():
                    kernels.append(_halo.kernel(problem, role, form, max(places), whole, lse))
    arch = _device.of_capability(capability).arch
    for (kernel, _), compiled in _jit.precompile(kernels, [arch], tmp_path).items():
        spilled = compiled.resources.spill_stores + compiled.resources.spill_loads
        assert spilled == 0, f"{kernel.name} spills {spilled} on {arch}:\n{kernel.plan}"


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-46, 1e39])
def test_only_scales_that_float32_has_are_taken(scale):
    query = Spec((1, 16, 16, 1, 32), "float16")
    window = window_arguments("test", 2, 3, 1, 1, False)
    problem = attention_problem("test", "forward", query, query, query, window, scale)
    assert not _halo_plan.takes(problem, "forward")
    assert _halo_plan.make_plan(problem, H200) is None


# Kernels


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["forward", "backward"])
@given(data=st.data(), rng=generators(), layout=layouts())
def test_any_plan_agrees_with_the_oracle(operation, data, rng, layout):
    problem = data.draw(small(operations=(operation,)))
    chosen = {}
    for role in _fused_plan.roles(problem):
        choices = plans(problem, role)
        assume(choices)
        chosen[role] = data.draw(st.sampled_from(choices))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_halo_plan, "make_plan", lambda problem, device, role: chosen[role])
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
    choices = plans(problem, "forward")
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
        patch.setattr(_halo_plan, "make_plan", lambda problem, device, role: chosen)
        plain = run_backend(fused, problem, given_inputs, **NATIVE)
        touched = run_backend(fused, problem, touched_inputs, **NATIVE)
    blind = ~seers(problem, token)
    for name in plain:
        np.testing.assert_array_equal(plain[name][:, blind], touched[name][:, blind])
