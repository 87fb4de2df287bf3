"""PyTorch: what people do with models besides training and compiling them."""

from __future__ import annotations

import io
import threading
from typing import Any

import numpy as np
import pytest
from helpers.tensors import (
    SHAPE,
    assert_equal,
    everything,
    gradients,
    no_compiled_code,
    tensors,
    whole,
)

import cuneigh
from cuneigh._backends.cpu import boxes
from cuneigh._parameters import Window
from cuneigh._validate import attention_problem

torch = pytest.importorskip("torch")

from cuneigh._problem import Spec  # noqa: E402
from cuneigh.torch import NeighborhoodAttention2D  # noqa: E402

pytestmark = pytest.mark.usefixtures(no_compiled_code.__name__)


def plain(count: int = 3) -> list[Any]:
    return [tensor.detach() for tensor in tensors(count)]


# Meta tensors


def test_shapes_come_back_from_meta_tensors():
    given = everything()
    there = [tensor.detach().to("meta").requires_grad_() for tensor in given.values()]
    output, lse = whole(*there)
    for got, wanted in zip((output, lse), whole(*given.values()), strict=True):
        assert got.is_meta
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    (output.sum() + lse.sum()).backward()
    assert [leaf.grad.shape for leaf in there] == [leaf.shape for leaf in there]
    logits = cuneigh.na2d_qk(there[0], there[1], 3)
    assert logits.shape == (*there[0].shape[:-1], 9)
    merged, _ = cuneigh.merge_attentions([output, output], [lse, lse])
    assert merged.shape == output.shape
    with pytest.raises(ValueError, match="key is on device cpu, but query is on device meta"):
        cuneigh.na2d(there[0], given["key"], there[2], 3)
    with pytest.raises(ValueError, match="kernel_size=9 times dilation=1 on axis 0 is 9"):
        cuneigh.na2d(*there[:3], 9)


def test_a_model_is_built_and_counted_without_memory():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        layer = NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
        x = torch.randn(1, 8, 8, 16)
    with FlopCounterMode(display=False) as counter:
        assert layer(x).shape == x.shape
    spec = Spec((1, 8, 8, 2, 8), "float32")
    rpb = Spec((2, 5, 5), "float32")
    window = Window((3, 3), (1, 1), (1, 1), (False, False))
    problem = attention_problem("", "forward", spec, spec, spec, window, None, None, None, rpb)
    projections = 2 * 64 * 16 * (3 * 16 + 16)
    assert counter.get_total_flops() == problem.flops() + projections


# Memory


def test_a_call_leaves_the_storage_of_a_tensor_as_it_was():
    given = [*tensors(dtype=torch.float32), torch.ones(SHAPE, dtype=torch.bfloat16)]
    results = [*gradients(lambda *a: cuneigh.na2d(*a, 3).sum(), given[:3])]
    results.append(cuneigh.na2d(*[given[3]] * 3, 3))
    for tensor in (*given, *results):
        storage = tensor.untyped_storage()
        assert storage.resizable()
        storage.resize_(storage.nbytes() + 8)


# Tracers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("differentiated", [False, True])
def test_jit_trace(differentiated):
    def step(query, key):
        output, lse = cuneigh.na2d(query, key, key, 3, is_causal=(True, False), return_lse=True)
        return cuneigh.merge_attentions([output, output], [lse, lse])[0] * 2

    query, key = (tensor.requires_grad_(differentiated) for tensor in plain(2))
    traced = torch.jit.trace(step, (query, key))
    if differentiated:
        memory = io.BytesIO()
        torch.jit.save(traced, memory)
        memory.seek(0)
        traced = torch.jit.load(memory)
    for shape in (SHAPE, (1, 4, 9, 2, 16)):  # another head_dim has another scale
        other = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
        assert torch.equal(traced(*other), step(*other))
    if differentiated:
        given = tensors(2)
        assert_equal(
            gradients(lambda *a: traced(*a).sum(), given),
            gradients(lambda *a: step(*a).sum(), given),
        )


def test_fx_is_refused_with_what_does_instead():
    with pytest.raises(TypeError, match=r"na1d: query is a torch.fx.Proxy: .*torch\.fx\.wrap"):
        torch.fx.symbolic_trace(lambda query: cuneigh.na1d(query, query, query, 3))


@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd():
    import torch._dynamo.compiled_autograd

    def step(query):
        return cuneigh.na1d(query, query, query, 3).sum()

    query = torch.randn(1, 9, 2, 4, requires_grad=True)
    (wanted,) = gradients(step, [query])
    value = step(query)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        value.backward()
    assert torch.equal(query.grad, wanted)


@pytest.mark.parametrize("changing", ["head_dim", "kernel_size", "dilation"])
def test_programs_serve_what_changes_from_layer_to_layer(changing):
    """As many are compiled as for ``scaled_dot_product_attention`` of another head_dim: two."""
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")

    def step(query, kernel_size, dilation):
        return cuneigh.na1d(query, query, query, kernel_size, dilation=dilation)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for turn in range(2, 6):
        asked = {"head_dim": 8, "kernel_size": 3, "dilation": 2, changing: 2 * turn}
        query = torch.randn(1, 40, 2, asked.pop("head_dim"))
        assert torch.equal(compiled(query, **asked), step(query, **asked))
    assert counter.frame_count == 2


# The profiler


def test_the_profiler_shows_names():
    from torch.profiler import ProfilerActivity, profile

    given = tensors()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        cuneigh.na2d(*given, 3).sum().backward()
        with torch.no_grad():
            cuneigh.na2d_qk(*given[:2], 3)
    names = {event.key for event in seen.key_averages()}
    assert {"cuneigh::forward", "cuneigh::backward", "cuneigh::qk", "CuneighBackward"} <= names


# Subclasses


class Annotated(torch.Tensor):
    """A tensor that carries something along, as MONAI's MetaTensor does."""

    note = ""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, cls):
                each.note = "carried"
        return result


class Wrapper(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


def test_subclasses_are_taken_as_by_pytorch():
    given = tensors()
    query = given[0].detach().as_subclass(Annotated).requires_grad_()
    output, lse = cuneigh.na2d(query, *given[1:], 3, return_lse=True)
    like = torch.nn.functional.scaled_dot_product_attention(query, *given[1:])
    assert type(output) is type(lse) is type(like) is Annotated
    assert output.note == like.note == "carried"
    wanted = cuneigh.na2d(*given, 3)
    assert torch.equal(output.as_subclass(torch.Tensor), wanted)
    (got,) = torch.autograd.grad(output.sum(), query)
    (expected,) = torch.autograd.grad(wanted.sum(), given[0])
    assert torch.equal(got.as_subclass(torch.Tensor), expected)


def test_other_subclasses_are_refused_with_the_reason():
    query = plain(1)[0]
    wrapper = torch.Tensor._make_subclass(Wrapper, query)
    words = "key is of type .*Wrapper, whose __torch_dispatch__ .*pass a plain torch.Tensor"
    with pytest.raises(TypeError, match=words):
        cuneigh.na2d(query, wrapper, query, 3)


# Threads


def test_the_cpu_obeys_set_num_threads(monkeypatch):
    for name in ("CUNEIGH_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    seen, count, caller = [], boxes.thread_count, threading.get_ident()

    def noted():
        """The threads of a call, which its own thread asks for."""
        if threading.get_ident() == caller and seen[-1:] != [count()]:
            seen.append(count())
        return count()

    monkeypatch.setattr(boxes, "thread_count", noted)
    given, before = plain(), torch.get_num_threads()
    usual = count()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            cuneigh.na2d(*given, 3)
    finally:
        torch.set_num_threads(before)
    cuneigh.na2d(*(tensor.numpy() for tensor in given), 3)
    assert seen == [1, 3, usual]
    monkeypatch.setenv("CUNEIGH_NUM_THREADS", "2")
    cuneigh.na2d(*given, 3)
    assert seen[-1] == 2


# An array for a scale


@pytest.mark.parametrize("compiled", [False, True])
def test_a_scale_is_learned(compiled):
    def step(query, scale):
        return (cuneigh.na2d(query, query, query, 3, scale=scale) ** 2).sum()

    query = plain(1)[0]
    taken = torch.compile(step, fullgraph=True, backend="eager") if compiled else step
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = taken(query, scale)
    value.backward()
    assert torch.isclose(value, step(query, 0.3))
    nearby = (step(query, 0.3 + 1e-5) - step(query, 0.3 - 1e-5)) / 2e-5
    torch.testing.assert_close(scale.grad, nearby, rtol=1e-6, atol=1e-6)


def test_a_scale_that_is_an_array_in_a_backward():
    query, key, value = plain()
    output, lse = cuneigh.na2d(query, key, value, 3, scale=0.3, return_lse=True)
    given = (output, query, key, value, output, lse, 3)
    got = cuneigh.na2d_backward(*given, scale=torch.tensor(0.3, dtype=torch.float64))
    for one, other in zip(got[:3], cuneigh.na2d_backward(*given, scale=0.3)[:3], strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_no_scale():
    query, *_ = plain()
    for scale, error, words in (
        (torch.ones(2), ValueError, r"scale has shape \(2,\); a number or a 0-d array"),
        (torch.tensor(1), TypeError, "scale has dtype int64, which is not one of"),
        (np.ones(2), TypeError, r"scale is of type numpy.ndarray, but query is of type torch\."),
    ):
        with pytest.raises(error, match=f"na2d: {words}"):
            cuneigh.na2d(query, query, query, 3, scale=scale)
    assert torch.equal(
        cuneigh.na2d(query, query, query, 3, scale=np.array(0.5)),
        cuneigh.na2d(query, query, query, 3, scale=0.5),
    )
