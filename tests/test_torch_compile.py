"""PyTorch: compilation, operators and transformations."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from helpers.tensors import (
    DEVICES,
    SHAPE,
    assert_equal,
    everything,
    gradients,
    loss,
    no_compiled_code,
    tensors,
    whole,
)

import cuneigh
from cuneigh._problem import Spec

torch = pytest.importorskip("torch")
pytest.importorskip("cuneigh.torch")  # where the operators are defined

pytestmark = pytest.mark.usefixtures(no_compiled_code.__name__)

# Compilation


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


@pytest.mark.parametrize(
    ("eager", "backend"), [("", "aot_eager"), ("step(ones).sum().backward()", "eager")]
)
def test_compilation_is_all_that_happens(eager, backend):
    """The adapter of PyTorch is first loaded while torch.compile traces, or long before.

    A program that compiles nothing does not wait for the import of the tracer.
    """
    first, second = ("torch", "cuneigh") if eager else ("cuneigh", "torch")
    code = f"""
import sys
import {first}, {second}

def step(query):
    return cuneigh.na1d(query=query, key=query, value=query, kernel_size=3)

ones = torch.ones(1, 9, 1, 4, requires_grad=True)
{eager}
assert "torch._dynamo" not in sys.modules
compiled = torch.compile(step, fullgraph=True, backend="{backend}")
compiled(ones).sum().backward()
assert not any(getattr(finder, "_module", "") == "torch._dynamo" for finder in sys.meta_path)
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
    shape = key.shape[:-2]
    mask = torch.arange(shape.numel(), device=device).reshape(shape) % 3 > 0
    cut_and_shifted = [1, 0]
    window = (
        *([3, 2], [1, 1], [1, 2], [False, False]),
        *(cut_and_shifted, list(shape[1:]), [0, 0], [0, 0], 0.5, None),
    )
    weights = torch.randn(2, 4, 5, 2, 8, dtype=query.dtype, device=device)
    output, lse = (tensor.detach() for tensor in whole(*given.values()))
    detached = [tensor.detach() for tensor in given.values()]
    match operation:
        case "forward":
            return (*given.values(), mask, *window)
        case "backward":
            return (*detached, mask, output, output, lse, None, *window)
        case "qk":
            return (query, key, extra_keys, rpb, mask, *window)
        case "qk_backward":
            return (detached[0], detached[1], detached[3], None, mask, weights, *window)
        case "av":
            return (weights.requires_grad_(), value, extra_values, mask, *window)
    return (weights, detached[2], detached[4], mask, output, *window)


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
    arguments[8] = arguments[8][:1]  # output
    with pytest.raises(ValueError, match="output has size 1 on axis 0, but 2 is needed"):
        torch.ops.cuneigh.backward(*arguments)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    from cuneigh._parameters import Window
    from cuneigh._validate import attention_problem

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
