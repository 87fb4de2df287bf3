"""PyTorch: autocast, bad input, calls like one before, streams and graphs."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from helpers.tensors import (
    DEVICES,
    WINDOW,
    assert_equal,
    everything,
    no_compiled_code,
    step,
    tensors,
    whole,
)

import cuneigh

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures(no_compiled_code.__name__)


@pytest.mark.parametrize("size", [0, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_without_its_memory_is_refused(dtype, size):
    whole_, key = (torch.ones(1, 9, 1, 4, dtype=dtype) for _ in range(2))
    cuneigh.na1d(whole_, whole_, whole_, 3)  # a call like it, whose checks are remembered
    key.untyped_storage().resize_(size)
    for gradients in (False, True):
        query = whole_.clone().requires_grad_(gradients)
        with pytest.raises(ValueError, match=f"na1d: key reaches beyond .* has {size} bytes"):
            cuneigh.na1d(query, key, whole_, 3)


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


@pytest.mark.parametrize("border", ["shift", "wrap"])
def test_a_part_that_starts_as_one_before_is_not_examined_again(border, monkeypatch):
    """Also where other starts would be: a part along one of several axes, or on a ring."""
    query = torch.randn(1, 4, 6, 1, 4)
    given = {"kernel_size": 3, "border": border, "layout": (12, 6), "query_start": (4, 0)}
    cuneigh.na2d(query, query, query, 1)  # A type of array must have been met.
    wanted = cuneigh.na2d(query, query, query, **given, key_start=(4, 0))
    monkeypatch.setattr("cuneigh._ops.compute.examine", None)
    assert_equal([cuneigh.na2d(query, query, query, **given, key_start=(4, 0))], [wanted])
    for starts in ((3, 0), (4, False)):
        with pytest.raises(TypeError, match="NoneType"):
            cuneigh.na2d(query, query, query, **given, key_start=starts)


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


# On a GPU

LONG = 200_000_000
"""Clock cycles for which a producer makes its stream wait: about 100 ms."""


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
    gc.collect()  # what other tests have left
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
