"""How the gradients of attention change along tangents: the oracle, and backends against it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.calls import framework
from helpers.expected import forward_results
from helpers.gpu_arrays import NATIVE
from helpers.illegal import call_of
from helpers.strategies import array, generators, inputs, layouts, numpy_dtype, problems
from helpers.tensors import DEVICES
from helpers.toy_kernel import needs_nvrtc
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cuneigh
from cuneigh import _device, _jit, reference
from cuneigh._backends import cpu, fused, gemm, naive, serving
from cuneigh._backends.fused.small import launch as small_launch
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._gpu.passes import HVP_DQ
from cuneigh._problem import DIFFERENTIATED, OfResults, Operands, Problem, Spec
from cuneigh._programs import rehearse
from cuneigh._window import Axis

hvps = partial(problems, operations=("hvp",))


def moved(arrays: tuple, tangents: tuple, step: float) -> tuple:
    pairs = zip(arrays, tangents, strict=True)
    return type(arrays)(*(x if t is None else x + step * t for x, t in pairs))


def hvp_of(problem: Problem, asked) -> tuple[Operands, OfResults]:
    incoming = OfResults(asked.grad_output, asked.grad_lse)
    return reference.hvp(problem, asked.operands, incoming, asked.tangents, asked.tangents_incoming)


@settings(max_examples=20)
@given(problem=hvps(dtypes=("float64",), budget=500), rng=generators())
def test_the_oracle_agrees_with_finite_differences(problem, rng):
    problem = replace(problem, rpb_dtype=problem.rpb_dtype and "float64")
    asked = inputs(problem, rng)
    gradients, of_results = hvp_of(problem, asked)
    made = reference.jvp(problem, asked.operands, asked.tangents)
    np.testing.assert_allclose(of_results.output, made.tangent_output, atol=1e-12)
    np.testing.assert_allclose(of_results.lse, made.tangent_lse, atol=1e-12)
    specs = problem.output, problem.lse
    incoming, turned = (
        OfResults(*(np.zeros(s.shape) if x is None else x for x, s in zip(of, specs, strict=True)))
        for of in ((asked.grad_output, asked.grad_lse), asked.tangents_incoming)
    )
    above, below = (
        reference.backward(
            problem, moved(asked.operands, asked.tangents, step), *moved(incoming, turned, step)
        )
        for step in (1e-6, -1e-6)
    )
    for tangent, higher, lower in zip(gradients, above, below, strict=True):
        if tangent is not None:
            np.testing.assert_allclose(tangent, (higher - lower) / 2e-6, rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(problem=hvps(budget=500), rng=generators())
def test_the_hessian_is_symmetric(problem, rng):
    asked, other = inputs(problem, rng), inputs(problem, rng)
    other = other._replace(operands=asked.operands)
    other = other._replace(grad_output=asked.grad_output, grad_lse=asked.grad_lse)
    products = []
    for one, two in ((asked, other), (other, asked)):
        gradients, of_results = hvp_of(problem, one)
        ways = [*two.tangents[: len(DIFFERENTIATED)], *two.tangents_incoming]
        made = [*gradients[: len(DIFFERENTIATED)], *of_results]
        pairs = zip(made, ways, strict=True)
        products.append(sum((x * y.astype(float)).sum() for x, y in pairs if y is not None))
    assert products[0] == pytest.approx(products[1], rel=1e-8, abs=1e-7)


@pytest.mark.parametrize("ordinary", [True, False])
@settings(max_examples=20)
@given(data=st.data(), rng=generators(), layout=layouts())
def test_the_cpu_backend(ordinary, data, rng, layout):
    problem = data.draw(hvps(budget=5_000, ordinary=ordinary))
    check_backend(cpu, problem, inputs(problem, rng, layout))


def line(length: int, kernel_size: int) -> Problem:
    """A plain problem along one axis."""
    axis = Axis(length, length, kernel_size, 1, 1, False)
    return Problem("hvp", "float32", 1, 1, 1, 8, 8, (axis,), 0.3)


def test_the_workspace_bounds_the_cpu_backend(monkeypatch):
    problem = line(4096, 65)
    asked = inputs(problem, np.random.default_rng(0))
    whole = run_backend(cpu, problem, asked)
    monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", "1000000")
    for name, made in run_backend(cpu, problem, asked).items():
        np.testing.assert_allclose(made, whole[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15)
@given(data=st.data(), ordinary=st.booleans(), rng=generators())
def test_the_gradients_of_gradients_are_those_of_the_oracle(device, data, ordinary, rng):
    """PyTorch's, with every feature: of the product of gradients with tangents."""
    torch = pytest.importorskip("torch")
    problem = data.draw(hvps(dtypes=("float64",), budget=500, ordinary=ordinary))
    problem = replace(problem, rpb_dtype=problem.rpb_dtype and "float64")
    own = framework("torch" if device == "cpu" else "torch-cuda")
    asked = inputs(problem, rng)._replace(tangents_incoming=OfResults())
    asked = asked._replace(grad_lse=array(problem.lse, rng))
    call = call_of(problem.but("forward"))
    arguments = {
        name: own.of(asked.operands._asdict()[name]) if isinstance(value, Spec) else value
        for name, value in call.arguments.items()
    }
    names = [name for name in DIFFERENTIATED if arguments.get(name) is not None]
    leaves = [arguments[name].requires_grad_() for name in names]
    incoming = [own.of(each).requires_grad_() for each in (asked.grad_output, asked.grad_lse)]
    results = getattr(cuneigh, call.function)(**arguments, return_lse=True)
    grads = torch.autograd.grad(results, leaves, incoming, create_graph=True)
    ways = [own.of(asked.tangents._asdict()[name]) for name in names]
    made = torch.autograd.grad(grads, [*leaves, *incoming], ways)
    gradients, of_results = hvp_of(problem, asked)
    wanted = [*(gradients._asdict()[name] for name in names), *of_results]
    for name, one, other in zip([*names, "output", "lse"], made, wanted, strict=True):
        np.testing.assert_allclose(own.numpy(one), other, rtol=1e-8, atol=1e-8, err_msg=name)


@needs_nvrtc
@pytest.mark.parametrize(("capability", "dtype", "dim"), [((9, 0), "bfloat16", 128)])
def test_the_kernels_of_fused_keep_all_in_registers(capability, dtype, dim, tmp_path):
    device = _device.of_capability(capability)
    problem = replace(
        line(70, 9), dtype=dtype, head_dim=dim, value_dim=dim, has_key_mask=True, additional=1
    )
    kernels = [each for each in fused.kernels(problem, device) if each.name == "fused/hvp"]
    moving = [each for each in kernels if "kGradMoves = true" in each.plan]
    for compiled in _jit.precompile(moving[-1:], [device.arch], tmp_path).values():
        resources = compiled.resources
        assert resources.registers > 0
        assert resources.spill_stores + resources.spill_loads == 0


@needs_nvrtc
def test_the_fullest_kernel_for_small_windows_does_not_spill(tmp_path):
    problem = replace(line(70, 9), dtype="bfloat16", head_dim=64, value_dim=64, has_key_mask=True)
    problem = replace(problem, axes=problem.axes * 3)
    form, columns = small_plan.Form(4, 2, 2), small_plan.MOST_KEPT
    assert columns in small_plan.forms(problem, (9, 0), HVP_DQ, True)[form]
    kernel = small_launch.kernel(problem, HVP_DQ, form, columns, one_stage=True, grad_moves=True)
    ((_, compiled),) = _jit.precompile([kernel], ["sm_90"], tmp_path).items()
    assert compiled.resources.spill_stores + compiled.resources.spill_loads == 0


@given(problem=hvps(budget=500), rng=generators())
@settings(max_examples=20)
def test_tangents_of_results_are_made_where_they_are_wanted(problem, rng):
    asked = inputs(problem, rng)
    whole = run_backend(cpu, problem, asked)
    specs = problem.gradient_specs
    gradients = Operands(*(s and np.empty(s.shape, numpy_dtype(s.dtype)) for s in specs))
    results = OfResults(*forward_results(problem, asked.operands))
    incoming = OfResults(asked.grad_output, asked.grad_lse)
    given = problem, asked.operands, results, incoming, asked.tangents, asked.tangents_incoming
    cpu.hvp(*given, gradients, OfResults(), np.empty)
    for name, gradient in gradients._asdict().items():
        if gradient is not None:
            np.testing.assert_array_equal(gradient, whole[f"grad {name}"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "ordinary"),
    [(naive, True), (naive, False), (fused, True), (fused, False)],
    ids=lambda of: getattr(of, "NAME", "ordinary" if of else "parts"),
)
@given(data=st.data(), rng=generators(), layout=layouts())
def test_the_backends_of_the_gpu(backend, ordinary, data, rng, layout):
    problem = data.draw(hvps(ordinary=ordinary))
    assume(backend.unsupported(problem, _device.cuda(0)) is None)
    check_backend(backend, problem, inputs(problem, rng, layout), **NATIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", range(8, fused.LONGEST_OF_HVP + 1, 24))
def test_every_head_dim_of_fused(head_dim):
    value_dim = head_dim * 7 % fused.LONGEST_OF_HVP + 1
    for dtype in ("float16", "bfloat16", "float32"):
        for value in (head_dim, value_dim):
            problem = replace(
                line(70, 9), dtype=dtype, head_dim=head_dim, value_dim=value, heads=2,
                kv_heads=1, additional=3,
            )  # fmt: skip
            check_backend(fused, problem, inputs(problem, np.random.default_rng(0)), **NATIVE)


@pytest.mark.parametrize("backend", ["naive", "fused"])
def test_nothing_of_the_size_of_the_logits_is_allocated(backend):
    problem = replace(line(4096, 1001), additional=3, head_dim=64, value_dim=64)
    program, _ = rehearse(problem, _device.of_capability((9, 0)), backend)
    taken = sum(math.prod(spec.shape) for spec in program.workspace)
    assert 0 < taken < math.prod(problem.output.shape)


def test_a_backend_without_the_operation_leaves_it_to_others():
    problem = line(70, 9)
    assert serving("fused", problem) == "fused"
    assert serving("hopper", problem) is None
    assert serving("gemm", problem) is None
    device = _device.of_capability((9, 0))
    assert "second order" in gemm.unsupported(problem, device)
    long = replace(problem, head_dim=fused.LONGEST_OF_HVP + 1)
    assert "head dimensions up to 128, not head_dim=129" in fused.unsupported(long, device)
    assert naive.unsupported(long, device) is None
