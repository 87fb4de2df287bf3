"""PyTorch: derivatives of eager calls."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from helpers.accuracy import assert_close, expect
from helpers.calls import framework, same_bits
from helpers.illegal import call_of
from helpers.strategies import empty_problems, generators, inputs, layouts, problems
from helpers.tensors import (
    DEVICES,
    WINDOW,
    assert_equal,
    everything,
    fresh,
    gradients,
    loss,
    no_compiled_code,
    step,
    tensors,
    whole,
)
from hypothesis import given

import cuneigh
from cuneigh._problem import Spec

torch = pytest.importorskip("torch")
operators = pytest.importorskip("cuneigh._frameworks.torch.operators")

pytestmark = pytest.mark.usefixtures(no_compiled_code.__name__)

BACKWARD = ("backward", "qk_backward", "av_backward")


def differentiated(name: str, problem: Any, asked: Any) -> dict[str, Any]:
    """The gradients of `problem`, a backward, by PyTorch's automatic differentiation."""
    own = framework(name)
    forward = replace(problem, operation=problem.operation.removesuffix("backward").strip("_"))
    if problem.operation == "backward":
        forward = replace(forward, operation="forward")
    call = call_of(forward)
    arrays = {**asked.operands._asdict(), **asked._asdict()}
    leaves, arguments = {}, {}
    for argument, value in call.arguments.items():
        if isinstance(value, Spec):
            value = leaves[argument] = own.of(arrays[argument]).detach().requires_grad_()
        arguments[argument] = value
    if problem.operation != "backward":
        results = [getattr(cuneigh, call.function)(**arguments)]
        incoming = [asked.grad_logits if problem.operation == "qk_backward" else asked.grad_output]
    else:
        results = list(getattr(cuneigh, call.function)(**arguments, return_lse=True))
        incoming = [asked.grad_output, asked.grad_lse]
        if asked.grad_lse is None:
            results, incoming = results[:1], incoming[:1]
    made = torch.autograd.grad(results, list(leaves.values()), list(map(own.of, incoming)))
    return dict(zip((f"grad {name}" for name in leaves), made, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@given(
    problem=problems(operations=BACKWARD, dtypes=("float32", "float64"), budget=5_000),
    rng=generators(),
    layout=layouts(),
)
def test_automatic_derivatives_agree_with_the_oracle(device, problem, rng, layout):
    own = framework("torch" if device == "cpu" else "torch-cuda")
    asked = inputs(problem, rng, layout)
    made = differentiated(own.name, problem, asked)
    expected, max_logit = expect(problem, asked)
    assert set(made) == set(expected)
    for name, tensor in made.items():
        wanted = expected[name]
        assert own.owns(tensor)
        assert tensor.is_contiguous()
        assert_close(
            f"{device}: {name}",
            own.numpy(tensor),
            wanted.oracle,
            wanted.obvious,
            wanted.term_bound,
            wanted.dtype,
            max_logit,
            accumulator=problem.accumulator,
            context=problem,
        )


@given(problem=problems(operations=("backward",), budget=2_000, cross=False), rng=generators())
def test_automatic_derivatives_are_those_of_the_backward_functions(problem, rng):
    own, asked = framework("torch"), inputs(problem, rng)
    made = differentiated("torch", problem, asked)
    call = call_of(replace(problem, operation="forward"))
    arrays = asked.operands._asdict()
    arguments = {
        name: own.of(arrays[name]) if isinstance(value, Spec) else value
        for name, value in call.arguments.items()
    }
    output, lse = getattr(cuneigh, call.function)(**arguments, return_lse=True)
    incoming = {"grad_output": own.of(asked.grad_output), "output": output, "lse": lse}
    if asked.grad_lse is not None:
        incoming["grad_lse"] = own.of(asked.grad_lse)
    explicit = getattr(cuneigh, f"{call.function}_backward")(**arguments, **incoming)
    for name, tensor in explicit._asdict().items():
        if tensor is not None:
            assert same_bits(own.numpy(tensor), own.numpy(made[f"grad {name}"])), name


@given(problem=empty_problems(operations=BACKWARD, budget=500, cross=False), rng=generators())
def test_derivatives_of_an_empty_call_are_zeros(problem, rng):
    made = differentiated("torch", problem, inputs(problem, rng))
    for tensor in made.values():
        assert (tensor == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_finite_differences(device):
    given = everything(device)
    assert torch.autograd.gradcheck(whole, tuple(given.values()), nondet_tol=1e-12)
    # The others along random directions rather than those of all elements, which takes seconds each
    check = partial(torch.autograd.gradcheck, nondet_tol=1e-12, fast_mode=True)
    query, key, value, extra_keys, extra_values, rpb = given.values()

    def logits(query, key, extra_keys, rpb):
        return cuneigh.na2d_qk(query, key, **WINDOW, rpb=rpb, additional_keys=extra_keys)

    assert check(logits, (query, key, extra_keys, rpb))
    weights = logits(query, key, extra_keys, rpb).detach().requires_grad_()

    def output(weights, value, extra_values):
        return cuneigh.na2d_av(weights, value, **WINDOW, additional_values=extra_values)

    assert check(output, (weights, value, extra_values))
    flat = [tensor.detach().flatten(1, 2).requires_grad_() for tensor in (query, key, value)]

    def dense(query, key, value):
        return cuneigh.attention(query, key[:, :7], value[:, :7], return_lse=True)

    assert check(dense, flat)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_result_that_is_not_used_has_no_gradient(compiled):
    function = torch.compile(whole, backend="aot_eager") if compiled else whole
    given = list(everything().values())
    for used in (0, 1):
        leaves = fresh(given)
        function(*leaves)[used].sum().backward()
        unused = torch.zeros_like(given[0][..., 0])
        output, lse = whole(*given)
        incoming = torch.ones_like(output) if used == 0 else torch.zeros_like(output)
        explicit = cuneigh.na2d_backward(
            incoming,
            *(tensor.detach() for tensor in (*given[:3], output, lse)),
            **WINDOW,
            additional_keys=given[3].detach(),
            additional_values=given[4].detach(),
            rpb=given[5].detach(),
            grad_lse=torch.ones_like(unused) if used else None,
        )
        for leaf, wanted in zip(leaves, explicit, strict=True):
            assert torch.equal(leaf.grad, wanted)


def test_only_what_needs_a_gradient_gets_one():
    query, key, value = tensors()
    key.requires_grad_(False)
    cuneigh.na2d(query, key, value, 3).sum().backward()
    assert query.grad is not None
    assert value.grad is not None
    assert key.grad is None
    with torch.no_grad():
        assert not cuneigh.na2d(query, key, value, 3).requires_grad
    with torch.inference_mode():
        assert cuneigh.na2d(query, key, value, 3).is_inference()


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_leaves_nothing_to_the_garbage_collector(device):
    step(*tensors(device=device, dtype=torch.float32))  # what is kept is kept now
    while gc.collect():  # what torch.compile left has finalizers, which leave more
        pass
    gc.disable()
    try:
        given = tensors(device=device, dtype=torch.float32)
        made = step(*given)
        alive = [weakref.ref(tensor) for tensor in (*given, *made)]
        del given, made
        end = time.monotonic() + 5  # by when the thread of PyTorch that computed them has let go
        while any(reference() is not None for reference in alive):
            assert time.monotonic() < end
            time.sleep(0.001)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_gradients_accumulate_and_graphs_survive_if_they_are_retained():
    query, key, value = tensors()
    output = cuneigh.na2d(query, key, value, 3).sum()
    output.backward(retain_graph=True)
    once = query.grad.clone()
    output.backward()
    assert torch.equal(query.grad, once + once)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


def test_a_saved_tensor_that_was_changed_is_noticed():
    query, key, value = tensors()
    moved = key * 1
    output = cuneigh.na2d(query, moved, value, 3)
    moved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    given = list(everything().values())
    checkpointed = gradients(lambda *g: checkpoint(loss, *g, use_reentrant=False), given)
    assert_equal(checkpointed, gradients(loss, given))
    leaves = fresh(given)
    checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    assert_equal([leaf.grad for leaf in leaves], checkpointed)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_a_tangent_takes_one_call_and_no_operator(device, monkeypatch):
    """PyTorch's own way through functions of torch.func takes the host much longer."""
    query, key, value, *ways = (torch.randn(2, 7, 2, 8, device=device) for _ in range(6))
    function = partial(cuneigh.na1d, kernel_size=3)
    with torch.autograd.forward_ad.dual_level():
        duals = map(torch.autograd.forward_ad.make_dual, (query, key, value), ways)
        expected = torch.autograd.forward_ad.unpack_dual(function(*duals))
    leaf = query.clone().requires_grad_()
    recorded = torch.func.jvp(function, (leaf, key, value), tuple(ways))[1]
    assert recorded.requires_grad  # PyTorch sees that call

    def call(*_):
        raise AssertionError("an operator was called")

    monkeypatch.setattr(operators, "call", call)
    made = torch.func.jvp(function, (query, key, value), tuple(ways))
    for array, wanted in zip(made, expected, strict=True):
        assert type(array) is torch.Tensor
        assert torch.equal(array, wanted)
    torch.testing.assert_close(recorded, made[1])
    with pytest.raises(AssertionError, match="operator"):
        torch.func.jvp(function, (leaf, key, value), tuple(ways))
