"""Arrays of every framework on GPUs: streams, graphs, threads, memory and devices."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from helpers.calls import FRAMEWORKS, SHAPE, arrays, framework
from helpers.strategies import (
    array,
)

import cuneigh
from cuneigh._problem import Spec

ON_GPU = [parameter.values[0] for parameter in FRAMEWORKS if not isinstance(parameter, str)]


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


LONG = 200_000_000
"""Clock cycles for which a producer makes its stream wait: about 100 ms."""

SPIN = """
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


def expected_after(numbers: np.ndarray) -> np.ndarray:
    """What na2d makes of `numbers` as query, key and value."""
    return framework("cupy").numpy(cuneigh.na2d(*[framework("cupy").of(numbers)] * 3, 3))


@pytest.mark.gpu
def test_cupy_kernels_run_on_the_current_stream():
    import cupy

    numbers = array(Spec(SHAPE, "float32"), np.random.default_rng(0))
    wanted = expected_after(numbers)
    spin = cupy.RawKernel(SPIN, "spin")
    source, query = cupy.asarray(numbers), cupy.zeros(SHAPE, "float32")
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        spin((1,), (1,), (LONG,))
        query[...] = source
        output = cuneigh.na2d(query, query, query, 3)
        assert not stream.done, "the call waited for its stream"
        stream.synchronize()
    np.testing.assert_array_equal(output.get(), wanted)


@pytest.mark.gpu
def test_torch_kernels_run_on_the_current_stream(torch):
    numbers = array(Spec(SHAPE, "float32"), np.random.default_rng(0))
    wanted = expected_after(numbers)
    source = torch.from_numpy(numbers).cuda()
    query = torch.zeros_like(source)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        query.copy_(source)
        output = cuneigh.na2d(query, query, query, 3)
        assert not stream.query(), "the call waited for its stream"
        stream.synchronize()
    np.testing.assert_array_equal(output.cpu().numpy(), wanted)


@pytest.mark.gpu
def test_nothing_waits_for_a_scale_on_a_gpu():
    import cupy

    (query,) = arrays("cupy", 1)
    wanted = cuneigh.na2d(query, query, query, 3, scale=0.25)
    source, scale = cupy.float32(0.25), cupy.zeros((), "float32")
    spin = cupy.RawKernel(SPIN, "spin")
    scale.fill(source)  # compiles what fills, which takes longer than the other kernel spins
    cuneigh.na2d(query, query, query, 3, scale=scale)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        spin((1,), (1,), (LONG,))
        scale.fill(source)
        output = cuneigh.na2d(query, query, query, 3, scale=scale)
        assert not stream.done, "the call waited for its stream"
        stream.synchronize()
    np.testing.assert_array_equal(output.get(), wanted.get())


@pytest.mark.gpu
def test_jax_kernels_wait_for_their_arguments(jax):
    device = jax.devices("gpu")[0]
    numbers = array(Spec(SHAPE, "float32"), np.random.default_rng(0))
    wanted = expected_after(numbers)
    matrix = jax.device_put(np.eye(4096, dtype=np.float32), device)
    source = jax.device_put(numbers, device)

    @jax.jit
    def late(source, matrix):
        """`source`, after a few milliseconds."""
        for _ in range(32):
            matrix = matrix @ matrix
        return source * matrix[0, 0]

    late(source, matrix).block_until_ready()
    query = late(source, matrix)
    output = cuneigh.na2d(query, query, query, 3)
    np.testing.assert_array_equal(output, wanted)


@pytest.mark.gpu
def test_a_torch_graph_replays_a_call(torch):
    first, second = (tensor.cuda() for tensor in arrays("torch", 2))
    query = first.clone()
    wanted = cuneigh.na2d(second, second, second, 3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = cuneigh.na2d(query, query, query, 3)
    query.copy_(second)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, wanted)


def used_bytes(name: str) -> int:
    """Device memory that the framework's allocator has given out."""
    gc.collect()
    match name:
        case "cupy":
            import cupy

            cupy.cuda.Device().synchronize()
            return cupy.get_default_memory_pool().used_bytes()
        case "torch-cuda":
            import torch

            return torch.cuda.memory_allocated()
        case "jax-cuda":
            import jax

            return jax.devices("gpu")[0].memory_stats()["bytes_in_use"]
    raise ValueError(name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_a_thousand_calls_leak_nothing(name):
    query, key, value = arrays(name, 3)

    def call() -> None:
        output, lse = cuneigh.na2d(query, key, value, 3, return_lse=True)
        cuneigh.na2d_backward(output, query, key, value, output, lse, 3)

    call()
    before = used_bytes(name)
    for _ in range(1000):
        call()
    assert used_bytes(name) == before


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_a_thread_that_has_not_used_the_gpu_may_call(name):
    """The driver knows no device of such a thread, and memory may come from what is kept."""
    own, arguments = framework(name), arrays(name, 3)
    wanted = own.numpy(cuneigh.na2d(*arguments, 3))
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(cuneigh.na2d(*arguments, 3)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(own.numpy(results[0]), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_results_come_from_the_allocator_of_the_framework(name):
    query, key, value = arrays(name, 3, shape=(1, 256, 256, 1, 64))
    cuneigh.na2d(query, key, value, 3)
    before = used_bytes(name)
    output = cuneigh.na2d(query, key, value, 3)
    assert used_bytes(name) - before >= query.nbytes
    del output
    assert used_bytes(name) == before


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_arrays_on_the_cpu_and_a_gpu_are_refused(name):
    (here,), (there,) = arrays(name, 1), arrays(f"{name}-cuda", 1)
    with pytest.raises(ValueError, match=r"key is on device .*, but query is on device"):
        cuneigh.na2d(there, here, there, 3)


@pytest.mark.gpu
def test_a_cupy_call_like_one_before_is_not_examined_again(monkeypatch):
    query, key, value = arrays("cupy", 3)
    for _ in range(2):  # at the first, the type of the arrays may not have been seen
        wanted = cuneigh.na2d(query, key, value, 3)
    monkeypatch.setattr("cuneigh._ops.compute.examine", None)
    assert (cuneigh.na2d(query, key, value, 3) == wanted).all()
    for other in (query.get(), key.astype("float16"), key[:, :5], None):
        with pytest.raises(TypeError, match="NoneType"):
            cuneigh.na2d(query, other, value, 3)


@pytest.mark.gpu
def test_a_cupy_array_off_its_alignment_is_refused():
    import cupy

    memory = cupy.zeros(4 * 2 * 9 * 4 + 1, "uint8")
    aligned, query = (
        part.view("float32").reshape(2, 9, 1, 4) for part in (memory[:-1], memory[1:])
    )
    cuneigh.na1d(aligned, aligned, aligned, 3)  # which looks the same
    with pytest.raises(ValueError, match=r"query starts at .* not a multiple of its item size 4"):
        cuneigh.na1d(query, query, query, 3)


# On two GPUs


@pytest.fixture
def second_device():
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is only one GPU")
    cupy.cuda.Device(0).use()
    return 1


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_arrays_on_another_device_than_the_current_one(name, second_device):
    import cupy

    numbers = array(Spec(SHAPE, "float32"), np.random.default_rng(0))
    wanted = expected_after(numbers)
    if name == "cupy":
        with cupy.cuda.Device(second_device):
            query = cupy.asarray(numbers)
    elif name == "torch-cuda":
        torch = pytest.importorskip("torch")
        query = torch.from_numpy(numbers).to(f"cuda:{second_device}")
    else:
        jax = pytest.importorskip("jax")
        query = jax.device_put(numbers, jax.devices("gpu")[second_device])
    left = 0
    if name == "jax-cuda":  # XLA leaves the device current that it worked on
        jax.block_until_ready(query + query)
        left = cupy.cuda.runtime.getDevice()
        cupy.cuda.Device(0).use()
    output, lse = cuneigh.na2d(query, query, query, 3, return_lse=True)
    gradients = cuneigh.na2d_backward(output, query, query, query, output, lse, 3)
    merged, _ = cuneigh.merge_attentions([output], [lse])
    for result in (output, lse, *gradients[:3], merged):
        assert str(result.device) == str(query.device)
    np.testing.assert_array_equal(framework(name).numpy(output), wanted)
    assert cupy.cuda.runtime.getDevice() == left
    for backend in ("naive", "gemm"):
        other = framework(name).numpy(cuneigh.na2d(query, query, query, 3, backend=backend))
        np.testing.assert_allclose(other, wanted, rtol=2**-10, atol=2**-10)
        assert cupy.cuda.runtime.getDevice() == left


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_arrays_on_two_devices_are_refused(second_device):
    import cupy

    (query,) = arrays("cupy", 1)
    with cupy.cuda.Device(second_device):
        key = cupy.asarray(query)
    with pytest.raises(ValueError, match="key is on device 1, but query is on device 0"):
        cuneigh.na2d(query, key, query, 3)


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_a_side_stream_of_another_device(second_device):
    import cupy

    numbers = array(Spec(SHAPE, "float32"), np.random.default_rng(0))
    wanted = expected_after(numbers)
    with cupy.cuda.Device(second_device):
        stream = cupy.cuda.Stream(non_blocking=True)
        spin = cupy.RawKernel(SPIN, "spin")
        source, query = cupy.asarray(numbers), cupy.zeros(SHAPE, "float32")
        cupy.cuda.Device().synchronize()
        stream.use()
        spin((1,), (1,), (LONG,))
        query[...] = source
    # Device 0 is current again; the stream is still the current one of device 1.
    output = cuneigh.na2d(query, query, query, 3)
    stream.synchronize()
    with cupy.cuda.Device(second_device):
        cupy.cuda.Stream.null.use()
    np.testing.assert_array_equal(output.get(), wanted)
