"""The tangents of attention: the oracle, and every backend against it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.gpu_arrays import NATIVE
from helpers.strategies import generators, inputs, layouts, problems
from helpers.toy_kernel import needs_nvrtc
from hypothesis import assume, given
from hypothesis import strategies as st

from cuneigh import _device, _jit, reference
from cuneigh._backends import choose, cpu, fused, gemm, naive, serving
from cuneigh._problem import JvpResults, Operands, Problem
from cuneigh._window import Axis

tangents = partial(problems, operations=("jvp",))


def moved(operands: Operands, tangents: Operands, step: float) -> Operands:
    pairs = zip(operands, tangents, strict=True)
    return Operands(*(x if t is None else x + step * t for x, t in pairs))


@given(problem=tangents(dtypes=("float64",), budget=1_000), rng=generators())
def test_the_oracle_agrees_with_finite_differences(problem, rng):
    problem = replace(problem, rpb_dtype=problem.rpb_dtype and "float64")
    asked = inputs(problem, rng)
    made = reference.jvp(problem, asked.operands, asked.tangents)
    output, lse = reference.forward(problem, asked.operands)
    np.testing.assert_array_equal(made.output, output)
    np.testing.assert_array_equal(made.lse, lse)
    (above, higher), (below, lower) = (
        reference.forward(problem, moved(asked.operands, asked.tangents, step))
        for step in (1e-6, -1e-6)
    )
    with np.errstate(invalid="ignore"):
        grown = np.where(np.isfinite(lse), (higher - lower) / 2e-6, 0)
    np.testing.assert_allclose(made.tangent_output, (above - below) / 2e-6, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(made.tangent_lse, grown, rtol=1e-5, atol=1e-5)


@given(problem=tangents(budget=3_000), rng=generators())
def test_the_gradient_is_the_transpose(problem, rng):
    """The product of the tangents of the results and their gradients is that of the operands'."""
    asked = inputs(problem, rng)
    made = reference.jvp(problem, asked.operands, asked.tangents)
    grad_output, grad_lse = map(rng.standard_normal, (problem.output.shape, problem.lse.shape))
    gradients = reference.backward(problem.but("backward"), asked.operands, grad_output, grad_lse)
    right = sum(
        (gradient * tangent.astype(float)).sum()
        for gradient, tangent in zip(gradients, asked.tangents, strict=True)
        if gradient is not None
    )
    left = (made.tangent_output * grad_output).sum() + (made.tangent_lse * grad_lse).sum()
    assert left == pytest.approx(right, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("ordinary", [True, False])
@given(data=st.data(), rng=generators(), layout=layouts())
def test_the_cpu_backend(ordinary, data, rng, layout):
    problem = data.draw(tangents(budget=10_000, ordinary=ordinary))
    check_backend(cpu, problem, inputs(problem, rng, layout))


def test_the_workspace_bounds_the_cpu_backend(monkeypatch):
    problem = line(4096, 65)
    asked = inputs(problem, np.random.default_rng(0))
    whole = run_backend(cpu, problem, asked)
    monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", "1000000")
    for name, array in run_backend(cpu, problem, asked).items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-4, atol=1e-5)


def line(length: int, kernel_size: int) -> Problem:
    """A plain problem along one axis."""
    axis = Axis(length, length, kernel_size, 1, 1, False)
    return Problem("jvp", "float32", 1, 1, 1, 8, 8, (axis,), 0.3)


@given(problem=tangents(dtypes=("float32",), budget=500), rng=generators())
def test_only_what_is_wanted_is_computed(problem, rng):
    asked = inputs(problem, rng)
    whole = run_backend(cpu, problem, asked)
    for name in JvpResults._fields:
        wanted = JvpResults(**{name: np.full_like(whole[name], np.nan)})
        cpu.jvp(problem, asked.operands, asked.tangents, wanted, np.empty)
        np.testing.assert_array_equal(getattr(wanted, name), whole[name])


@pytest.mark.parametrize(
    ("tokens", "kernel_size", "dim", "backend"),
    [
        ((4096,), 65, 64, "fused"),
        ((56, 56), 7, 32, "fused"),
        ((128, 128), 7, 64, "fused"),
        ((64, 64), 13, 64, "hopper"),
        ((256, 256), 80, 128, "hopper"),
    ],
)
def test_the_faster_kernel_is_chosen(tokens, kernel_size, dim, backend):
    """As they were measured on an H200 (bench/NOTES.md)."""
    axes = tuple(Axis(length, length, kernel_size, 1, 1, False) for length in tokens)
    problem = Problem("jvp", "bfloat16", 8, 8, 8, dim, dim, axes, dim**-0.5)
    device = replace(_device.of_capability((9, 0)), sm_count=132)
    assert backend == choose(problem, device, None).NAME


@needs_nvrtc
@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "parts"),
    [((7, 5), "float16", 64, False), ((9, 0), "bfloat16", 128, True)],
)
def test_the_kernels_of_fused_keep_all_in_registers(capability, dtype, dim, parts, tmp_path):
    device = _device.of_capability(capability)
    problem = replace(
        line(70, 9), dtype=dtype, head_dim=dim, value_dim=dim, has_key_mask=parts, additional=1
    )
    for compiled in _jit.precompile(
        fused.kernels(problem, device), [device.arch], tmp_path
    ).values():
        resources = compiled.resources
        assert resources.registers > 0
        assert resources.spill_stores + resources.spill_loads == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "ordinary"),
    [(naive, True), (naive, False), (gemm, True), (fused, True), (fused, False)],
    ids=lambda of: getattr(of, "NAME", "ordinary" if of else "parts"),
)
@given(data=st.data(), rng=generators(), layout=layouts())
def test_the_backends_of_the_gpu(backend, ordinary, data, rng, layout):
    problem = data.draw(tangents(ordinary=ordinary))
    assume(backend.unsupported(problem, _device.cuda(0)) is None)
    check_backend(backend, problem, inputs(problem, rng, layout), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", range(8, 257, 24))
def test_every_head_dim_of_fused(head_dim):
    value_dim = head_dim * 7 % fused.LONGEST + 1
    for dtype in ("float16", "bfloat16", "float32"):
        for value in (head_dim, value_dim):
            problem = replace(
                line(70, 9), dtype=dtype, head_dim=head_dim, value_dim=value, heads=2,
                kv_heads=1, additional=3,
            )  # fmt: skip
            check_backend(fused, problem, inputs(problem, np.random.default_rng(0)), **NATIVE)


def test_a_backend_without_the_operation_leaves_it_to_others():
    jvp = line(70, 9)
    assert serving("fused", jvp) == "fused"
    assert serving("fused", jvp.but("qk")) is None
    assert serving("hopper", jvp) == "hopper"
    assert serving("hopper", replace(jvp, has_key_mask=True)) is None
    assert serving("hopper", jvp.but("hvp")) is None
    assert serving("cpu", jvp.but("qk_backward")) == "cpu"
    assert serving(None, jvp) is None
