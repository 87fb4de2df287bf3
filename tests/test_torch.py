"""PyTorch: derivatives, compilation, transformations, autocast, graphs and modules."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.accuracy import assert_close, expect
from helpers.calls import framework, same_bits
from helpers.illegal import call_of
from helpers.strategies import empty_problems, generators, inputs, layouts, problems
from hypothesis import given

import cuneigh
from cuneigh._problem import Spec

torch = pytest.importorskip("torch")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = (2, 6, 5, 4, 8)


def tensors(count: int = 3, device: str = "cpu", dtype: Any = torch.float64) -> list[Any]:
    """Different normally distributed leaves that require a gradient."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [tensor.to(device, dtype).requires_grad_() for tensor in made]


def everything(device: str = "cpu", dtype: Any = torch.float64) -> dict[str, Any]:
    """Every array that na2d takes, small enough for finite differences."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (2, 4, 5, 2, 3),
        "key": (2, 4, 5, 1, 3),
        "value": (2, 4, 5, 1, 2),
        "additional_keys": (2, 2, 1, 3),
        "additional_values": (2, 2, 1, 2),
        "rpb": (2, 5, 3),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }


WINDOW = {"kernel_size": (3, 2), "dilation": (1, 2)}


def whole(*given: Any) -> tuple[Any, Any]:
    """Output and lse of `everything`, by position."""
    names = ("query", "key", "value", "additional_keys", "additional_values", "rpb")
    return cuneigh.na2d(**dict(zip(names, given, strict=True)), **WINDOW, return_lse=True)


def loss(*given: Any) -> Any:
    """A scalar in which every element of output and lse counts, and not linearly."""
    output, lse = whole(*given)
    return (output**2).sum() + lse.sin().sum()


def fresh(given: Any) -> list[Any]:
    return [tensor.detach().clone().requires_grad_() for tensor in given]


def gradients(function: Callable[..., Any], given: Any) -> list[Any]:
    leaves = fresh(given)
    return list(torch.autograd.grad(function(*leaves), leaves))


def assert_equal(got: Any, wanted: Any) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


# Derivatives


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
    query, key, value, extra_keys, extra_values, rpb = given.values()

    def logits(query, key, extra_keys, rpb):
        return cuneigh.na2d_qk(query, key, **WINDOW, rpb=rpb, additional_keys=extra_keys)

    assert torch.autograd.gradcheck(logits, (query, key, extra_keys, rpb), nondet_tol=1e-12)
    weights = logits(query, key, extra_keys, rpb).detach().requires_grad_()

    def output(weights, value, extra_values):
        return cuneigh.na2d_av(weights, value, **WINDOW, additional_values=extra_values)

    assert torch.autograd.gradcheck(output, (weights, value, extra_values), nondet_tol=1e-12)
    flat = [tensor.detach().flatten(1, 2).requires_grad_() for tensor in (query, key, value)]

    def dense(query, key, value):
        return cuneigh.attention(query, key[:, :7], value[:, :7], return_lse=True)

    assert torch.autograd.gradcheck(dense, flat, nondet_tol=1e-12)


@pytest.mark.parametrize("function", [whole, torch.compile(whole, backend="aot_eager")])
def test_a_result_that_is_not_used_has_no_gradient(function):
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
    gc.collect()
    gc.disable()
    try:
        given = tensors(device=device, dtype=torch.float32)
        made = step(*given)
        alive = [weakref.ref(tensor) for tensor in (*given, *made)]
        del given, made
        assert not any(reference() is not None for reference in alive)
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


FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")


@FORWARD_MODE
def test_derivatives_that_do_not_exist_say_so():
    given = list(everything().values())
    query = given[0]
    (first,) = torch.autograd.grad(loss(*given) + (query**3).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives of .* are not supported"):
        torch.autograd.grad(first.sum(), query)
    # A gradient that is linear in nothing but the incoming one has a second derivative as well.
    linear = whole(*given)[0].sum() + (query**3).sum()
    (first,) = torch.autograd.grad(linear, query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives of .* are not supported"):
        torch.autograd.grad(first.sum(), query)
    with pytest.raises(RuntimeError, match=r"query takes part in .* forward mode"):
        torch.func.jvp(lambda q: whole(q, *given[1:])[0], (query.detach(),), (query.detach(),))
    weights = torch.zeros(*query.shape[:-1], 6, dtype=query.dtype, requires_grad=True)
    value = given[2].detach()
    with pytest.raises(RuntimeError, match=r"weights takes part in .* second derivative"):
        cuneigh.na2d_av_backward(value.expand(2, 4, 5, 2, 2), weights, value, **WINDOW)


# Compilation


@pytest.fixture(autouse=True)
def no_compiled_code():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the first import
        torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BACKENDS = ["aot_eager", "inductor"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_and_eager_agree(device, backend):
    given = list(everything(device, torch.float32).values())
    compiled = torch.compile(whole, fullgraph=True, backend=backend)
    assert_equal(compiled(*given), whole(*given))
    weights = [torch.randn_like(result) for result in whole(*given)]

    def linear(function):
        return lambda *leaves: sum(
            (result * weight).sum()
            for result, weight in zip(function(*leaves), weights, strict=True)
        )

    assert_equal(gradients(linear(compiled), given), gradients(linear(whole), given))


def test_every_function_compiles():
    def step(query, key, value):
        weights = cuneigh.na2d_qk(query, key, 3, scale=0.5).softmax(-1)
        first = cuneigh.na2d_av(weights, value, 3).flatten(1, 2)
        flat = [tensor.flatten(1, 2) for tensor in (query, key, value)]
        second, lse = cuneigh.attention(*flat, is_causal=True, return_lse=True)
        third = cuneigh.na1d(*flat, 5, 2, is_causal=True)
        output, lse = cuneigh.merge_attentions((first, second), (lse, lse))
        return (output * third).sum() + lse.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given = tensors()
    assert torch.equal(compiled(*given), step(*given))
    assert_equal(gradients(compiled, given), gradients(step, given))


def test_gradients_compile():
    query, key, value = (tensor.detach() for tensor in tensors())
    output, lse = cuneigh.na2d(query, key, value, 3, return_lse=True)
    compiled = torch.compile(cuneigh.na2d_backward, fullgraph=True, backend="aot_eager")
    made = compiled(output, query, key, value, output, lse, 3)
    explicit = cuneigh.na2d_backward(output, query, key, value, output, lse, 3)
    assert type(made) is type(explicit)
    assert_equal(made[:3], explicit[:3])
    assert made[3:] == (None, None, None)


def test_one_program_serves_many_sizes():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(query):
        return cuneigh.na1d(query, query, query, 3) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((2, 7), (3, 9), (4, 12)):
        query = torch.randn(batch, length, 5, 6)
        assert torch.equal(compiled(query), step(query))
    assert counter.frame_count == 1


def test_a_compiled_program_checks_the_sizes_it_meets():
    def step(query):
        return cuneigh.na1d(query, query, query, 8)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(1, 9, 1, 4))
    with pytest.raises(Exception, match="kernel_size=8 times dilation=1 on axis 0 is 8, which exc"):
        compiled(torch.randn(1, 7, 1, 4))


@pytest.mark.parametrize("first", ["cuneigh", "torch"])
def test_compilation_is_all_that_happens(first):
    """The adapter of PyTorch is first loaded while torch.compile traces."""
    second = {"cuneigh": "torch", "torch": "cuneigh"}[first]
    code = f"""
import {first}, {second}
step = torch.compile(lambda q: cuneigh.na1d(query=q, key=q, value=q, kernel_size=3),
                     fullgraph=True, backend="aot_eager")
assert step(torch.ones(1, 9, 1, 4)).shape == (1, 9, 1, 4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_export():
    class Step(torch.nn.Module):
        def forward(self, query):
            return cuneigh.na2d(query, query, query, 3)

    query = tensors(1)[0].detach()
    exported = torch.export.export(Step(), (query,))
    assert torch.equal(exported.module()(query), Step()(query))


# The operators by themselves


def operator_arguments(operation: str, device: str) -> tuple[Any, ...]:
    """What the operator of `operation` takes; arrays for its forward require a gradient."""
    given = everything(device)
    query, key, value, extra_keys, extra_values, rpb = given.values()
    window = ([3, 2], [1, 1], [1, 2], [False, False], 0.5, None)
    weights = torch.randn(2, 4, 5, 2, 8, dtype=query.dtype, device=device)
    output, lse = (tensor.detach() for tensor in whole(*given.values()))
    detached = [tensor.detach() for tensor in given.values()]
    match operation:
        case "forward":
            return (*given.values(), *window)
        case "backward":
            return (*detached, output, output, lse, None, *window)
        case "qk":
            return (query, key, extra_keys, rpb, *window)
        case "qk_backward":
            return (detached[0], detached[1], detached[3], None, weights, *window)
        case "av":
            return (weights.requires_grad_(), value, extra_values, *window)
    return (weights, detached[2], detached[4], output, *window)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "operation", ["forward", "backward", "qk", "qk_backward", "av", "av_backward"]
)
def test_operators_keep_the_rules_of_operators(operation, device):
    operator = getattr(torch.ops.cuneigh, operation).default
    torch.library.opcheck(operator, operator_arguments(operation, device))


def test_operators_check_what_they_are_given():
    arguments = list(operator_arguments("backward", "cpu"))
    arguments[7] = arguments[7][:1]  # output
    with pytest.raises(ValueError, match="output has size 1 on axis 0, but 2 is needed"):
        torch.ops.cuneigh.backward(*arguments)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    from cuneigh._validate import Window, attention_problem

    query, key, value = tensors()
    spec = Spec(SHAPE, "float64")
    window = Window((3, 3), (1, 1), (1, 1), (False, False))
    problem = attention_problem("na2d", "forward", spec, spec, spec, window, None)
    with FlopCounterMode(display=False) as counter:
        output = cuneigh.na2d(query, key, value, 3)
        assert counter.get_total_flops() == problem.flops()
        output.sum().backward()
    assert counter.get_total_flops() == problem.flops() + problem.gradient.flops()


# Transformations


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("bias", ["shared", "own", None])
def test_vmap_is_a_loop(bias):
    many = [
        torch.stack([tensor.detach() + shift for shift in (0, 0.5, 1)])
        for tensor in everything().values()
    ]
    if bias == "shared":
        many[5] = many[5][0]
    in_dims: list[Any] = [0, 0, 0, 0, 0, {"shared": None, "own": 0, None: None}[bias]]
    in_dims[1], many[1] = None, many[1][0]  # one key for all
    in_dims[2], many[2] = 2, many[2].movedim(0, 2)  # values side by side

    def one(*given):
        given = list(given)
        given[5] = None if bias is None else given[5]
        return whole(*given)

    def loop(function):
        results = []
        for index in range(3):
            each = zip(many, in_dims, strict=True)
            results.append(
                function(*[x if dim is None else x.select(dim, index) for x, dim in each])
            )
        return [torch.stack(result) for result in zip(*results, strict=True)]

    def score(*given):
        output, lse = one(*given)
        return (output**2).sum() + lse.sin().sum()

    wanted = (0, 1, 2, 3, 4) if bias is None else (0, 1, 2, 3, 4, 5)
    # The order of a sum may change with the batch.
    close = {"rtol": 64 * torch.finfo(torch.float64).eps, "atol": 1e-13}
    for function in (one, torch.func.grad(score, wanted)):
        mapped = torch.func.vmap(function, tuple(in_dims))(*many)
        for got, expected in zip(mapped, loop(function), strict=True):
            torch.testing.assert_close(got, expected, **close)


def test_functional_gradients():
    given = [tensor.detach() for tensor in everything().values()]
    assert_equal(torch.func.grad(loss, tuple(range(6)))(*given), gradients(loss, given))
    (jacobian,) = torch.func.jacrev(lambda q: whole(q, *given[1:])[1].sum((0, 1, 2)), (0,))(
        given[0]
    )
    for head in range(2):
        wanted = gradients(lambda q: whole(q, *given[1:])[1][..., head].sum(), given[:1])  # noqa: B023
        torch.testing.assert_close(jacobian[head], wanted[0])
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), torch.func.grad(loss)(*given))


# Autocast


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device, compiled):
    given = list(everything(device, torch.float32).values())

    def step(*given):
        output, lse = whole(*given)
        query, key, value, extra_keys, extra_values, rpb = given
        logits = cuneigh.na2d_qk(query, key, **WINDOW, rpb=rpb, additional_keys=extra_keys)
        weights = logits.softmax(-1)  # in float32
        second = cuneigh.na2d_av(weights, value, **WINDOW, additional_values=extra_values)
        return output, lse, logits, second

    if compiled:
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16):
        output, lse, logits, second = step(*given)
    assert output.dtype == logits.dtype == second.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    rounded = [tensor.detach().bfloat16() for tensor in given[:5]]
    assert_equal((output, lse), whole(*rounded, given[5].detach()))
    (output.sum() + second.sum()).backward()
    for leaf in given:
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.abs().sum() > 0


def test_autocast_leaves_float64_alone():
    query, key, value = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert cuneigh.na2d(query, key, value, 3).dtype == torch.float64


# Bad input


def test_bad_input_is_refused_with_and_without_a_gradient():
    query, key, value = tensors()
    for tensor in (query, query.detach()):
        with pytest.raises(ValueError, match="kernel_size=7 times dilation=1 on axis 0"):
            cuneigh.na2d(tensor, key, value, 7)
        with pytest.raises(TypeError, match="key has dtype float32, but float64 is needed"):
            cuneigh.na2d(tensor, key.float(), value, 3)
        with pytest.raises(ValueError, match="value is on device meta"):
            cuneigh.na2d(tensor, key, value.to("meta"), 3)
        with pytest.raises(TypeError, match="one framework"):
            cuneigh.na2d(tensor, key, value.detach().numpy(), 3)
        with pytest.raises(ValueError, match="backend='none' is not one of"):
            cuneigh.na2d(tensor, key, value, 3, backend="none")


def test_a_call_like_one_before_is_not_examined_again(monkeypatch):
    given = tensors()
    cuneigh.na2d(*given, 1)  # A type of array must have been met.
    wanted = [cuneigh.na2d(*given, (3, 3), scale=0.5), cuneigh.na2d(*given, 3, return_lse=True)[1]]
    monkeypatch.setattr("cuneigh._ops.compute.examine", None)
    again = [cuneigh.na2d(*given, (3, 3), scale=0.5), cuneigh.na2d(*given, 3, return_lse=True)[1]]
    assert_equal(again, wanted)
    with pytest.raises(TypeError, match="NoneType"):
        cuneigh.na2d(*given, (3, 2))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kernel_size": True}, TypeError, "kernel_size=True is bool"),
        ({"kernel_size": 1.0}, TypeError, "kernel_size=1.0 is float"),
        ({"kernel_size": (1, True)}, TypeError, r"kernel_size\[1\]=True is bool"),
        ({"kernel_size": [1, 1.0]}, TypeError, r"kernel_size\[1\]=1.0 is float"),
        ({"is_causal": 0}, TypeError, "is_causal=0 is int"),
        ({"return_lse": 0}, TypeError, "return_lse=0 is int"),
        ({"scale": True}, TypeError, "scale=True is bool"),
        ({"query": "sparse"}, TypeError, "query is a sparse_coo tensor"),
        ({"query": "meta"}, ValueError, "query is on device meta"),
        ({"query": "half"}, TypeError, "key has dtype float32"),
        ({"query": "wide"}, ValueError, "key has size 8 on axis 4"),
    ],
)
def test_what_only_looks_like_a_call_before_is_examined(changes, error, words):
    given = torch.ones(1, 4, 4, 2, 8)
    others = {
        "sparse": given.to_sparse(),
        "meta": given.to("meta"),
        "half": given.half(),
        "wide": torch.ones(1, 4, 4, 2, 16),
    }
    legal = {"query": given, "key": given, "value": given, "kernel_size": 1, "stride": 1}
    legal |= {"is_causal": False, "scale": 1.0, "return_lse": False}
    for kernel_size in (1, (1, 1)):
        cuneigh.na2d(**legal | {"kernel_size": kernel_size})
    changes = {name: others.get(str(value), value) for name, value in changes.items()}
    with pytest.raises(error, match=words):
        cuneigh.na2d(**legal | changes)


def test_settings_are_noticed_by_a_call_like_one_before(monkeypatch):
    given = [tensor.detach() for tensor in tensors()]
    for _ in range(2):  # A type of array must have been met.
        cuneigh.na2d(*given, 3)
    monkeypatch.setattr("cuneigh._ops.compute.examine", None)
    cuneigh.na2d(*given, 3)
    monkeypatch.setenv("CUNEIGH_ALLOW_TF32", "1")
    with pytest.raises(TypeError, match="NoneType"):
        cuneigh.na2d(*given, 3)


def test_a_tensor_that_outlived_a_transformation():
    kept = []

    def keep(tensor):
        kept.append(tensor * 2)
        return kept[0].sum()

    plain = tensors(1)[0].detach()
    torch.func.grad(keep)(plain)
    leaf = plain.clone().requires_grad_()
    for other in (plain, leaf):
        assert torch.equal(
            cuneigh.na2d(kept[0], other, other, 3), cuneigh.na2d(plain * 2, leaf, leaf, 3)
        )


def test_bad_input_is_refused_while_tracing():
    def step(query, key, kernel_size=7):
        return cuneigh.na2d(query, key, key, kernel_size)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    query = tensors(1)[0].detach()
    with pytest.raises(Exception, match="kernel_size=7 times dilation=1 on axis 0"):
        compiled(query, query)
    with pytest.raises(Exception, match="key has dtype float32, but float64 is needed"):
        compiled(query, query.float(), 3)
    with pytest.raises(ValueError, match="kernel_size=7 times dilation=1 on axis 0"):
        torch.func.vmap(step)(query[None], query[None])


# Modules


def modules() -> list[tuple[Any, int, dict[str, Any]]]:
    from cuneigh.torch import (
        NeighborhoodAttention1D,
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
    )

    strided = {"stride": (1, 2, 1), "is_causal": (True, False, False)}
    return [
        (NeighborhoodAttention1D, 1, {"dilation": 2, "qk_scale": 0.3}),
        (NeighborhoodAttention2D, 2, {"rel_pos_bias": True}),
        (NeighborhoodAttention2D, 2, {"qkv_bias": False, "proj_drop": 0.5}),
        (NeighborhoodAttention3D, 3, strided),
    ]


@pytest.mark.parametrize(("kind", "rank", "arguments"), modules())
def test_modules_compute_what_they_hold(kind, rank, arguments):
    torch.manual_seed(0)
    module = kind(16, 4, 2, **arguments, dtype=torch.float64)
    x = torch.randn(2, *(6, 5, 4)[:rank], 16, dtype=torch.float64)
    module.eval()
    query, key, value = module.qkv(x).reshape(*x.shape[:-1], 3, 4, 4).unbind(-3)
    window = {
        name: arguments[name] for name in ("dilation", "stride", "is_causal") if name in arguments
    }
    whole = getattr(cuneigh, f"na{rank}d")
    scale = arguments.get("qk_scale")
    output = whole(query, key, value, 2, **window, scale=scale, rpb=module.rpb)
    assert torch.equal(module(x), module.proj(output.reshape(x.shape)))
    names = {"qkv.weight", "proj.weight", "proj.bias"}
    names |= {"qkv.bias"} if arguments.get("qkv_bias", True) else set()
    names |= {"rpb"} if "rel_pos_bias" in arguments else set()
    assert set(module.state_dict()) == names
    assert "kernel_size=(2" in repr(module)
    module.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_dropout_of_weights():
    from cuneigh.torch import NeighborhoodAttention2D

    torch.manual_seed(0)
    module = NeighborhoodAttention2D(16, 4, 3, rel_pos_bias=True, attn_drop=0.5)
    x = torch.randn(2, 6, 5, 16)
    module.train()
    assert not torch.allclose(module(x), module(x))
    module.eval()
    plain = NeighborhoodAttention2D(16, 4, 3, rel_pos_bias=True)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x), plain(x))
    module.train()
    module.attn_drop.p = 1e-12  # nothing is dropped, but the halves compute
    torch.testing.assert_close(module(x), plain(x))


def test_modules_compile_and_are_copied():
    from cuneigh.torch import NeighborhoodAttention2D

    module = NeighborhoodAttention2D(16, 4, 3, rel_pos_bias=True)
    x = torch.randn(2, 6, 5, 16)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    half = copy.deepcopy(module).half()
    assert half(x.half()).dtype == torch.float16


def test_modules_refuse_what_makes_no_sense():
    from cuneigh.torch import NeighborhoodAttention2D

    with pytest.raises(ValueError, match="embed_dim=10 is not a multiple of num_heads=4"):
        NeighborhoodAttention2D(10, 4, 3)
    with pytest.raises(ValueError, match="rel_pos_bias=True needs stride=1"):
        NeighborhoodAttention2D(16, 4, 3, stride=2, rel_pos_bias=True)
    with pytest.raises(ValueError, match=r"NeighborhoodAttention2D: kernel_size=.* has 3 entries"):
        NeighborhoodAttention2D(16, 4, (3, 3, 3))
    with pytest.raises(ValueError, match=r"x has shape \(2, 6, 16\), but \[batch, X1, X2, 16\]"):
        NeighborhoodAttention2D(16, 4, 3)(torch.zeros(2, 6, 16))


# On a GPU

LONG = 200_000_000
"""Clock cycles for which a producer makes its stream wait: about 100 ms."""


def step(query: Any, key: Any, value: Any) -> list[Any]:
    """Output and gradients of one step of training."""
    output = cuneigh.na2d(query, key, value, 3)
    return [output, *torch.autograd.grad(output.square().sum(), (query, key, value))]


def same(got: list[Any], wanted: list[Any]) -> bool:
    return all(map(torch.equal, got, wanted))


@pytest.mark.gpu
def test_a_training_step_on_a_side_stream():
    given = tensors(device="cuda", dtype=torch.float32)
    wanted = step(*given)
    late = [torch.zeros_like(tensor, requires_grad=True) for tensor in given]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        with torch.no_grad():
            for tensor, source in zip(late, given, strict=True):
                tensor.copy_(source)
        made = step(*late)
        assert not stream.query(), "the step waited for its stream"
        stream.synchronize()
    assert same(made, wanted)


@pytest.mark.gpu
def test_a_graph_replays_a_training_step():
    given = tensors(device="cuda", dtype=torch.float32)
    wanted = step(*given)
    held = [torch.zeros_like(tensor, requires_grad=True) for tensor in given]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step(*held)
    with torch.no_grad():
        for tensor, source in zip(held, given, strict=True):
            tensor.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    assert same(made, wanted)


@pytest.mark.gpu
# The leaves were made on the default stream, which has been waited for.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
def test_two_threads_train_at_once():
    given = [tensors(device="cuda", dtype=dtype) for dtype in (torch.float32, torch.float16)]
    wanted = [step(*tensors) for tensors in given]
    torch.cuda.synchronize()
    failures: list[str] = []
    barrier = threading.Barrier(2)

    def train(which: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                barrier.wait()
                for turn in range(100):
                    made = step(*given[which])
                    torch.cuda.current_stream().synchronize()
                    if not same(made, wanted[which]):
                        failures.append(f"thread {which}, turn {turn}")
                        return
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=train, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.gpu
def test_a_thousand_training_steps_leak_nothing():
    given = tensors(device="cuda", dtype=torch.float32)
    step(*given)
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        step(*given)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_cpu_and_gpu_train_alike():
    there = tensors(device="cuda", dtype=torch.float32)
    here = [tensor.detach().cpu().requires_grad_() for tensor in there]
    for got, wanted in zip(step(*there), step(*here), strict=True):
        torch.testing.assert_close(got.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_a_training_step_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    wanted = step(*tensors(device="cuda:0", dtype=torch.float32))
    made = step(*tensors(device="cuda:1", dtype=torch.float32))
    for got, expected in zip(made, wanted, strict=True):
        assert got.device.index == 1
        assert np.array_equal(got.detach().cpu().numpy(), expected.detach().cpu().numpy())
    assert torch.cuda.current_device() == 0
