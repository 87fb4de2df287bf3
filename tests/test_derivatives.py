"""Derivatives of every order and in both modes, of PyTorch's tensors and JAX's arrays."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.calls import framework
from helpers.illegal import call_of
from helpers.strategies import generators, inputs, problems
from helpers.tensors import DEVICES, WINDOW, everything, whole
from hypothesis import given, settings

import cuneigh
from cuneigh import reference
from cuneigh._backends import cpu
from cuneigh._problem import Spec

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

jnp, forward_ad = jax.numpy, torch.autograd.forward_ad
check, check_again = torch.autograd.gradcheck, torch.autograd.gradgradcheck
quickly = {"fast_mode": True, "nondet_tol": 1e-9}

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
"""PyTorch scripts its rules for forward mode when they are first used."""

PAGE = Path(__file__).parents[1] / "docs" / "derivatives.md"


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S))
def test_the_examples_run(example):
    exec(compile(example, str(PAGE), "exec"), {})


# PyTorch


def logits(query, key, extra_keys, rpb):
    return cuneigh.na2d_qk(query, key, **WINDOW, rpb=rpb, additional_keys=extra_keys)


def sums(weights, value, extra_values):
    return cuneigh.na2d_av(weights, value, **WINDOW, additional_values=extra_values)


def dense(query, key, value):
    flat = [tensor.flatten(1, 2) for tensor in (query, key, value)]
    return cuneigh.attention(flat[0], flat[1][:, :7], flat[2][:, :7], return_lse=True)


def causal(query, key, value):
    window = {"kernel_size": 3, "stride": (2, 1), "is_causal": (True, False)}
    return cuneigh.na2d(query, key, value, **window, return_lse=True)


def scaled(query, key, value, scale):
    return cuneigh.na2d(query, key, value, 3, scale=scale)


def merged(*given):
    return cuneigh.merge_attentions(given[:2], given[2:])


def explicit(grad_output, query, key, value, output, lse, extra_keys, extra_values, rpb, grad_lse):
    """The gradients as functions of all their arguments, `output` and `lse` too."""
    extra = {"additional_keys": extra_keys, "additional_values": extra_values, "rpb": rpb}
    given = grad_output, query, key, value, output, lse
    return tuple(cuneigh.na2d_backward(*given, **WINDOW, **extra, grad_lse=grad_lse))


def cases(device: str) -> dict[str, tuple[Any, list[Any]]]:
    """Functions and what they are differentiated at."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> Any:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return numbers.to(device).requires_grad_()

    query, key, value, extra_keys, extra_values, rpb = given = list(everything(device).values())
    return {
        "whole": (whole, given),
        "logits": (logits, [query, key, extra_keys, rpb]),
        "sums": (sums, [leaf(2, 4, 5, 2, 8), value, extra_values]),
        "dense": (dense, [query, key, value]),
        "causal": (causal, [query, key, value]),
        "scaled": (scaled, [query, key, value, leaf()]),
        "merged": (merged, [leaf(2, 3, 2), leaf(2, 3, 2), leaf(2, 3), leaf(2, 3)]),
        "explicit": (
            explicit,
            [leaf(2, 4, 5, 2, 2), *given[:3], leaf(2, 4, 5, 2, 2), leaf(2, 4, 5, 2), *given[3:],
             leaf(2, 4, 5, 2)],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", cases("cpu"))
def test_finite_differences_in_pytorch(name, device):
    function, given = cases(device)[name]
    is_whole = name == "whole"
    batched = {"check_batched_grad": is_whole, "check_batched_forward_grad": is_whole}
    assert check(function, given, check_forward_ad=True, **batched, **quickly)
    if name != "explicit":  # which is of second order already
        again = {"check_fwd_over_rev": True, "check_batched_grad": is_whole}
        assert check_again(function, given, **again, **quickly)


def cubed(query):
    return cuneigh.na1d(query, query * 2, query * query, 3).square().sum()


def test_batched_gradients_may_be_computed_in_another_thread():
    """As those on a GPU are."""
    from cuneigh._frameworks.torch.derivatives import mapped

    def doubled(array):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(mapped, lambda each: (2 * each, None), [array]).result()[0]

    given = torch.arange(6.0).view(2, 3)
    assert torch.equal(torch._vmap_internals._vmap(doubled)(given), 2 * given)


@pytest.mark.parametrize("device", DEVICES)
def test_modes_nest(device):
    """Of third derivatives along three directions, each in either mode."""
    shape = (1, 4, 1, 2)
    query, *ways = torch.randn(4, *shape, dtype=torch.float64, device=device)

    def forwards(function, way):
        return lambda query: torch.func.jvp(function, (query,), (way,))[1]

    def backwards(function, way):
        return lambda query: (torch.func.grad(function)(query) * way).sum()

    found = []
    for modes in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1)):
        function = cubed
        for mode, way in zip(modes, ways, strict=True):
            function = (forwards, backwards)[mode](function, way)
        found.append(function(query).item())
    np.testing.assert_allclose(found, found[-1], rtol=1e-9)
    hessian = torch.func.hessian(cubed)(query)
    for vectorize in (False, True):
        other = torch.autograd.functional.hessian(cubed, query, vectorize=vectorize)
        torch.testing.assert_close(other, hessian)
    mapped = torch.func.vmap(torch.func.hessian(cubed))(torch.stack([query, query]))
    torch.testing.assert_close(mapped[1], hessian)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=20)
@given(problem=problems(operations=("forward",), dtypes=("float64",), budget=500), rng=generators())
def test_tangents_are_those_of_the_oracle(device, problem, rng):
    own = framework("torch" if device == "cpu" else "torch-cuda")
    asked = inputs(problem.but("jvp"), rng)
    made = reference.jvp(problem.but("jvp"), asked.operands, asked.tangents)
    call = call_of(problem)
    names = [name for name, value in call.arguments.items() if isinstance(value, Spec)]
    given, moved = (
        [own.of(of._asdict()[name]) for name in names] for of in (asked.operands, asked.tangents)
    )
    rest = {name: value for name, value in call.arguments.items() if name not in names}

    def function(*arrays):
        arguments = dict(zip(names, arrays, strict=True))
        return getattr(cuneigh, call.function)(**arguments, **rest, return_lse=True)

    results, turned = torch.func.jvp(function, tuple(given), tuple(moved))
    with forward_ad.dual_level():
        duals = function(*map(forward_ad.make_dual, given, moved))
        eager = [forward_ad.unpack_dual(dual).tangent for dual in duals]
    for array, other, wanted in zip((*results, *turned), (*results, *eager), (*made,), strict=True):
        assert torch.equal(array, other)
        np.testing.assert_allclose(own.numpy(array), wanted, rtol=1e-9, atol=1e-9)


OPERATIONS = ("forward", "backward", "jvp", "hvp", "qk", "qk_backward", "av", "av_backward")


@pytest.fixture
def operations(monkeypatch):
    """What the CPU backend is asked for."""
    asked = []

    def asking(name, compute):
        return lambda *given: (asked.append(name), compute(*given))

    for name in OPERATIONS:
        monkeypatch.setattr(cpu, name, asking(name, getattr(cpu, name)))
    return asked


def change_of(jvp, function):
    """A mean-flow loss of `function`."""

    def loss(query):
        mean, change = jvp(function, (query,), (query,))
        return ((mean - change) ** 2).sum()

    return loss


def test_second_order_holds_no_logits_in_pytorch(operations):
    def function(query):
        return cuneigh.na1d(query, query * 2, query, 3)

    def energy(query):
        return function(query).sin().sum()

    query = torch.randn(1, 6, 1, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(energy(query), query, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), query)
    assert sorted(operations) == ["backward", "backward", "forward", "hvp"]
    for second in (
        torch.func.hessian(energy),
        torch.func.grad(change_of(torch.func.jvp, function)),
    ):
        operations.clear()
        second(query)
        assert "hvp" in operations
        assert set(operations) <= {"forward", "backward", "jvp", "hvp"}


def test_only_derivatives_that_are_needed_are_computed_in_pytorch(monkeypatch):
    """The tangent of the output is, where somebody asks how the gradients change with theirs."""
    made, hvp = [], cpu.hvp

    def noting(*given):
        made.append(given[7].output is not None)
        hvp(*given)

    monkeypatch.setattr(cpu, "hvp", noting)
    query, grad_output = torch.randn(2, 1, 6, 1, 2, dtype=torch.float64)
    for needs in (False, True):
        leaves = [query.clone().requires_grad_(), grad_output.clone().requires_grad_(needs)]
        output = cuneigh.na1d(leaves[0], query, leaves[0], 3)
        (gradient,) = torch.autograd.grad(output, leaves[0], leaves[1], create_graph=True)
        gradient.square().sum().backward()
        assert (leaves[1].grad is not None) == needs
    assert made == [False, True]


@pytest.mark.parametrize("around", [False, True])
def test_what_is_computed_without_gradients_is_constant_in_pytorch(around):
    """Its tangents as well, for transformations around it."""
    query, key, way = torch.randn(3, 1, 4, 1, 2, dtype=torch.float64)
    without = torch.no_grad()

    def both(query, outer, inner):
        function = inner(lambda key: cuneigh.na1d(query, key, key, 3))
        return outer(lambda: torch.func.jvp(function, (key,), (way,)))()

    outer, inner = (without, lambda same: same)[:: 1 if around else -1]
    for number, part in enumerate(both(query, outer, inner)):

        def product(query, number=number):
            return (both(query, outer, inner)[number] * query).sum()

        assert torch.equal(torch.func.grad(product)(query), part)
        twice = torch.func.vmap(torch.func.grad(product))(torch.stack([query, query]))
        torch.testing.assert_close(twice[1], part)
        _, along = torch.func.jvp(product, (query,), (query,))  # forward mode goes on
        assert (along - (part * query).sum()).abs() > 1e-6


def test_second_order_holds_no_logits_in_jax(operations):
    def function(query):
        return cuneigh.na1d(query, query * 2, query, 3)

    def energy(query):
        return jnp.sin(function(query)).sum()

    (query,) = of_jax(1, np.float32)
    for second in (
        jax.hessian(energy),
        jax.grad(change_of(jax.jvp, function)),
    ):
        operations.clear()
        jax.block_until_ready(jax.jit(second)(query))
        assert "hvp" in operations
        assert set(operations) <= {"forward", "backward", "jvp", "hvp"}


def test_dead_rows_have_finite_derivatives():
    query, key, value, *_, rpb = (tensor.detach() for tensor in everything().values())
    rpb[0] = -torch.inf

    def function(query, rpb):
        output, lse = cuneigh.na2d(query, key, value, **WINDOW, rpb=rpb, return_lse=True)
        return output.square().sum() + lse[..., 1].sum()

    def penalty(query, rpb):
        return sum(x.square().sum() for x in torch.func.grad(function, (0, 1))(query, rpb))

    for each in (function, penalty):
        _, tangent = torch.func.jvp(each, (query, rpb), (query, torch.ones_like(rpb)))
        for array in (tangent, *torch.func.grad(each, (0, 1))(query, rpb)):
            assert torch.isfinite(array).all()


def test_compiled_derivatives():
    query = everything()["query"].detach()

    def step(query):
        mean, change = torch.func.jvp(
            lambda query: cuneigh.na2d(query, query * 2, query, 3), (query,), (query,)
        )
        return (mean - change).square().sum()

    def both(query):
        return step(query), torch.func.grad(step)(query)

    for one, other in zip(
        both(query), torch.compile(both, backend="aot_eager")(query), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["naive", "gemm", "fused", "hopper"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_derivatives_of_every_backend(backend, dtype):
    """Compared with float64 on the CPU, in terms of what rounding the arguments does there."""
    if backend == "hopper" and dtype is torch.float32:
        pytest.skip("hopper computes in half precision")
    generator = torch.Generator().manual_seed(0)
    given, ways = torch.randn(2, 3, 1, 24, 24, 2, 64, generator=generator, dtype=torch.float64)
    given, ways = (list(of.to(dtype)) for of in (given, ways))

    def derivatives(given, ways, backend):
        def function(*given):
            return cuneigh.na2d(*given, 7, backend=backend)

        def penalty(*given):
            grads = torch.func.grad(
                lambda *given: function(*given).float().square().sum(), (0, 1, 2)
            )
            return sum(grad.float().square().sum() for grad in grads(*given))

        _, turned = torch.func.jvp(function, tuple(given), tuple(ways))
        return turned, *torch.func.grad(penalty, (0, 1, 2))(*given)

    made = derivatives(*([x.cuda() for x in of] for of in (given, ways)), backend)
    wanted = derivatives(*([x.double() for x in of] for of in (given, ways)), None)
    eps = max(torch.finfo(dtype).eps, 1e-5)
    for one, other in zip(made, wanted, strict=True):
        error = (one.cpu().double() - other).abs().max() / other.abs().max()
        assert error < 16 * eps, (backend, dtype, error)


# JAX


def of_jax(count: int, dtype: Any = np.float64) -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = (1, 4, 2, 2), (1, 4, 1, 2), (1, 4, 1, 1), (1, 1, 1, 2), (1, 1, 1, 1), (2, 5)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes[:count]]


def whole_of_jax(query, key, value, extra_keys, extra_values, rpb):
    extra = {"additional_keys": extra_keys, "additional_values": extra_values, "rpb": rpb}
    return cuneigh.na1d(query, key, value, 3, **extra, return_lse=True)


def unfused_of_jax(query, key):
    made = cuneigh.na1d_qk(query, key, 3, is_causal=True)
    return cuneigh.na1d_av(jnp.exp(made), key, 3, is_causal=True)


@pytest.mark.parametrize(
    ("function", "indices"),
    [
        (whole_of_jax, (0, 1, 2, 3, 4, 5)),
        (unfused_of_jax, (0, 1)),
    ],
    ids=["whole", "unfused"],
)
def test_finite_differences_in_jax(function, indices):
    from jax.test_util import check_grads

    with jax.enable_x64(True):
        arrays = of_jax(6)
        given = tuple(arrays[index] for index in indices)
        check_grads(jax.jit(function), given, order=2, modes=("fwd", "rev"))


def test_modes_of_jax_nest():
    with jax.enable_x64(True):
        query, *ways = jnp.asarray(np.random.default_rng(0).standard_normal((4, 1, 4, 1, 2)))

        def forwards(function, way):
            return lambda query: jax.jvp(function, (query,), (way,))[1]

        def backwards(function, way):
            return lambda query: (jax.grad(function)(query) * way).sum()

        def function_of(modes):
            function = lambda query: (cuneigh.na1d(query, query * 2, query**2, 3) ** 2).sum()  # noqa: E731
            for mode, way in zip(modes, ways, strict=True):
                function = (forwards, backwards)[mode](function, way)
            return function

        orders = [function_of(modes) for modes in ((0, 1, 0), (1, 0, 0), (1, 1, 1))]
        found = jax.jit(lambda query: [function(query) for function in orders])(query)
        np.testing.assert_allclose(found, found[-1], rtol=1e-9)


def test_the_gradients_of_jax_are_functions_of_all_arguments():
    """Of output and lse as well: explicit gradients of merged results are differentiated right."""
    with jax.enable_x64(True):
        query, key, value = of_jax(3)
        output, lse = cuneigh.na1d(query, key, value, 3, return_lse=True)

        def function(query, output, lse):
            given = jnp.ones_like(output), query, key, value, output, lse
            return cuneigh.na1d_backward(*given, 3).key

        from jax.test_util import check_grads

        given = query, output + 0.1, lse + 0.2
        check_grads(jax.jit(function), given, order=1, modes=("fwd", "rev"))


def test_sizes_are_not_differentiated():
    (query,) = of_jax(1, np.float32)
    with pytest.raises(TypeError, match=r"na1d: kernel_size=.* not an int; sizes are neither"):
        jax.grad(lambda size: cuneigh.na1d(query, query, query, size).sum())(3.0)
    tensor = torch.ones(1, 4, 1, 2)
    with pytest.raises(TypeError, match=r"na1d: kernel_size=.* not an int; sizes are neither"):
        cuneigh.na1d(tensor, tensor, tensor, torch.tensor(3.0, requires_grad=True))
