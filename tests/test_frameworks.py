"""Arrays of every framework: the same results, of the same kind, in the same place, uncopied."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers.calls import FRAMEWORKS, check_call, framework
from helpers.gpu_arrays import at_launch
from helpers.strategies import (
    array,
    empty_problems,
    generators,
    inputs,
    layouts,
    numpy_dtype,
    problems,
)
from hypothesis import given

import cuneigh
from cuneigh import _backends
from cuneigh._problem import DTYPES, Spec

ON_GPU = [parameter.values[0] for parameter in FRAMEWORKS if not isinstance(parameter, str)]
SHAPE = (2, 6, 7, 3, 8)


def arrays(name: str, count: int, dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> Any:
    """Arrays of a framework with different, normally distributed numbers."""
    rng = np.random.default_rng(0)
    return [framework(name).of(array(Spec(shape, dtype), rng)) for _ in range(count)]


def native_pointer(native: Any) -> int:
    return native.ctypes.data if isinstance(native, np.ndarray) else native.data.ptr


@contextmanager
def watched_backend() -> Iterator[dict[str, Any]]:
    """Records the native arrays of a forward in place of running it."""
    seen: dict[str, Any] = {}

    @at_launch
    def forward(problem, operands, output, lse, workspace):
        seen.update(operands=operands, output=output, lse=lse, workspace=workspace)
        output[...] = 1
        if lse is not None:
            lse[...] = 2

    backend = mock.Mock(NAME="watched", forward=forward, unsupported=lambda *given: None)
    with mock.patch.object(_backends, "BACKENDS", (backend,)):
        yield seen


# What holds for all of them


@pytest.mark.parametrize("name", FRAMEWORKS[1:])
@given(problem=problems(budget=5_000, cross=False), rng=generators(), layout=layouts())
def test_every_call_agrees_with_the_oracle(name, problem, rng, layout):
    check_call(name, problem, inputs(problem, rng, layout))


@pytest.mark.parametrize("name", FRAMEWORKS[1:])
@given(problem=empty_problems(operations=("backward",), budget=500, cross=False), rng=generators())
def test_an_empty_call_returns_arrays_of_the_framework(name, problem, rng):
    own, asked = framework(name), inputs(problem, rng)
    with own.scope(problem.dtype):
        operands = [None if a is None else own.of(a) for a in asked.operands]
        query, key, value, extra_keys, extra_values, rpb = operands
        window = {
            argument: [getattr(axis, argument) for axis in problem.axes]
            for argument in ("kernel_size", "stride", "dilation", "is_causal")
        }
        given = {**window, "additional_keys": extra_keys, "additional_values": extra_values}
        output, lse = getattr(cuneigh, f"na{problem.rank}d")(
            query, key, value, **given, rpb=rpb, return_lse=True
        )
        gradients = getattr(cuneigh, f"na{problem.rank}d_backward")(
            own.of(asked.grad_output), query, key, value, output, lse, **given, rpb=rpb
        )
        for result, spec in zip(
            (output, lse, *gradients), (problem.output, problem.lse, *problem.specs), strict=True
        ):
            assert (result is None) == (spec is None)
            if spec is not None:
                assert own.owns(result)
                assert tuple(result.shape) == spec.shape
                assert own.numpy(result).dtype == numpy_dtype(spec.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_nothing_is_copied_on_the_way_in_or_out(name, dtype):
    own = framework(name)
    with watched_backend() as seen, own.scope(dtype):
        query, key, value = arrays(name, 3, dtype)
        output, lse = cuneigh.na2d(query, key, value, 3, return_lse=True)
        assert (own.numpy(output) == 1).all()
        assert (own.numpy(lse) == 2).all()
        given = {"query": query, "key": key, "value": value}
        for argument, array_ in given.items():
            native = getattr(seen["operands"], argument)
            assert native_pointer(native) == own.pointer(array_), argument
            assert native.dtype == numpy_dtype(dtype)
            assert native.shape == SHAPE
        for result in ("output", "lse"):
            array_ = {"output": output, "lse": lse}[result]
            assert native_pointer(seen[result]) == own.pointer(array_), result
        assert type(seen["workspace"]) is type(seen["output"])
        assert seen["workspace"].shape == (2, 3)


@pytest.mark.parametrize("name", [name for name in FRAMEWORKS if "jax" not in str(name)])
def test_strides_survive(name):
    own = framework(name)
    numbers = array(Spec(SHAPE, "float32"), np.random.default_rng(0), "packed")
    query = own.of(numbers)
    with watched_backend() as seen:
        cuneigh.na2d(query, query, query, 3)
    assert seen["operands"].query.strides == numbers.strides


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_additional_keys_may_be_none_at_all(name):
    own = framework(name)
    query, key, value = arrays(name, 3)
    nothing = own.of(np.zeros((2, 0, 3, 8), np.float32))
    plain = cuneigh.na2d(query, key, value, 3)
    given = {"additional_keys": nothing, "additional_values": nothing}
    output, lse = cuneigh.na2d(query, key, value, 3, **given, return_lse=True)
    np.testing.assert_array_equal(own.numpy(output), own.numpy(plain))
    gradients = cuneigh.na2d_backward(output, query, key, value, output, lse, 3, **given)
    assert tuple(gradients.additional_keys.shape) == (2, 0, 3, 8)
    assert own.owns(gradients.additional_values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FRAMEWORKS[1:])
def test_merging_agrees_with_numpy(name, dtype):
    rng, own = np.random.default_rng(0), framework(name)
    accumulator = "float64" if dtype == "float64" else "float32"
    outputs = [array(Spec((2, 5, 3, 4), dtype), rng) for _ in range(3)]
    lses = [array(Spec((2, 5, 3), accumulator), rng) for _ in range(3)]
    for lse in lses:
        lse[0, 0] = -np.inf
    lses[1][0, 1] = -np.inf
    expected = cuneigh.merge_attentions(outputs, lses)
    with own.scope(dtype):
        results = cuneigh.merge_attentions(list(map(own.of, outputs)), list(map(own.of, lses)))
        for result, wanted in zip(results, expected, strict=True):
            assert own.owns(result)
            got = own.numpy(result)
            assert got.dtype == wanted.dtype
            # Their exponentials and logarithms may differ in the last places.
            step = 16 * np.finfo(accumulator).eps if got.dtype == accumulator else 2.0**-7
            np.testing.assert_allclose(got.astype(float), wanted.astype(float), step, step)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_arrays_of_two_frameworks_are_refused(name):
    other = "numpy" if name != "numpy" else "torch"
    (query,), (key,) = arrays(name, 1), arrays(other, 1)
    with pytest.raises(TypeError, match=r"value is of type .*, but query is of type .*framework"):
        cuneigh.na2d(query, query, key, 3)
    lse = framework(other).of(np.zeros(SHAPE[:-1], np.float32))
    with pytest.raises(TypeError, match=r"lses\[0\] is of type .*, but outputs\[0\] is of type"):
        cuneigh.merge_attentions([query], [lse])


# PyTorch


FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
"""PyTorch scripts its rules for forward mode when they are first used."""


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def tensor(torch):
    return arrays("torch", 1)[0]


def test_parameters_are_tensors(torch, tensor):
    parameter = torch.nn.Parameter(tensor)
    with torch.no_grad():
        result = cuneigh.na2d(parameter, parameter, parameter, 3)
    assert type(result) is torch.Tensor
    assert torch.equal(result, cuneigh.na2d(tensor, tensor, tensor, 3))


@FORWARD_MODE
def test_a_tangent_is_never_lost_in_silence(torch, tensor):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensor, tensor)
        with pytest.raises(RuntimeError, match="differentiation"):
            cuneigh.na2d(tensor, dual, tensor, 3)


def test_a_pending_change_of_sign_is_applied(torch, tensor):
    negative = torch.complex(tensor, -tensor).conj().imag
    assert negative.is_neg()
    result = cuneigh.na2d(tensor, tensor, negative, 3)
    assert torch.equal(result, cuneigh.na2d(tensor, tensor, tensor, 3))


@pytest.mark.filterwarnings("ignore:.*nested tensor:UserWarning")
def test_tensors_that_are_not_dense_are_refused(torch, tensor):
    nested = torch.nested.nested_tensor([tensor, tensor])
    ragged = torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged)
    for odd, words in (
        (tensor.to_sparse(), "query is a sparse_coo tensor"),
        (nested, "query is a nested tensor"),
        (ragged, r"query is of type .*NestedTensor"),
        (tensor.to("meta"), "query is on device meta"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            cuneigh.na2d(odd, tensor, tensor, 3)


@pytest.mark.parametrize("dtype", ["int16", "bool", "complex64", "float8_e4m3fn"])
def test_other_dtypes_are_refused(torch, tensor, dtype):
    other = tensor.to(getattr(torch, dtype))
    with pytest.raises(TypeError, match=f"query has dtype {dtype}, which is not one of float16"):
        cuneigh.na2d(other, other, other, 3)


@FORWARD_MODE
def test_merging_is_differentiable_in_torch(torch):
    rng = np.random.default_rng(0)
    outputs = [torch.from_numpy(rng.standard_normal((5, 3))).requires_grad_() for _ in range(3)]
    lses = [torch.from_numpy(rng.standard_normal(5)).requires_grad_() for _ in range(3)]

    def merge(*arrays):
        return cuneigh.merge_attentions(arrays[:3], arrays[3:])

    assert torch.autograd.gradcheck(merge, (*outputs, *lses), check_forward_ad=True)


def test_gradients_of_merging_are_finite_in_torch(torch):
    outputs = [torch.ones(4, 3, requires_grad=True) for _ in range(2)]
    lses = [
        torch.tensor([0.0, -np.inf, 1.0, -np.inf], requires_grad=True),
        torch.tensor([0.0, 1.0, -np.inf, -np.inf], requires_grad=True),
    ]
    output, lse = cuneigh.merge_attentions(outputs, lses)
    (output.sum() + lse[:3].sum()).backward()
    for leaf in (*outputs, *lses):
        assert torch.isfinite(leaf.grad).all()
    assert outputs[0].grad[:, 0].tolist() == [0.5, 0, 1, 0]
    assert lses[0].grad.tolist() == [0.5, 0, 1, 0]


# JAX


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


def test_concrete_arrays_may_be_used_while_tracing(jax):
    (query,) = arrays("jax", 1)
    eager = cuneigh.na2d(query, query, query, 3)
    traced = jax.jit(lambda x: x + cuneigh.na2d(query, query, query, 3))(query)
    np.testing.assert_array_equal(traced, query + eager)


def test_jax_arrays_cannot_be_written(jax):
    query, key, value = arrays("jax", 3)
    with watched_backend() as seen:
        cuneigh.na2d(query, key, value, 3).block_until_ready()
    assert not any(native.flags.writeable for native in seen["operands"][:3])


def test_keys_of_random_generators_are_refused(jax):
    key = jax.random.key(0)
    with pytest.raises((TypeError, ValueError), match="query has"):
        cuneigh.na2d(key, key, key, 3)


def test_merging_is_differentiable_in_jax(jax):
    from jax.test_util import check_grads

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        outputs = tuple(jax.numpy.asarray(rng.standard_normal((5, 3))) for _ in range(3))
        lses = tuple(jax.numpy.asarray(rng.standard_normal(5)) for _ in range(3))
        check_grads(cuneigh.merge_attentions, (outputs, lses), order=1, modes=["rev"])
        jitted = jax.jit(cuneigh.merge_attentions)(outputs, lses)
        for got, wanted in zip(jitted, cuneigh.merge_attentions(outputs, lses), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=16 * np.finfo(float).eps)


def test_gradients_of_merging_are_finite_in_jax(jax):
    jnp = jax.numpy
    outputs = [jnp.ones((4, 3), "float32")] * 2
    lses = [jnp.array([0, -jnp.inf, 1, -jnp.inf], "float32")]
    lses += [jnp.array([0, 1, -jnp.inf, -jnp.inf], "float32")]

    def total(outputs, lses):
        output, lse = cuneigh.merge_attentions(outputs, lses)
        return output.sum() + lse[:3].sum()

    of_outputs, of_lses = jax.grad(total, (0, 1))(outputs, lses)
    for gradient in (*of_outputs, *of_lses):
        assert jnp.isfinite(gradient).all()
    assert of_outputs[0][:, 0].tolist() == [0.5, 0, 1, 0]
    assert of_lses[0].tolist() == [0.5, 0, 1, 0]


TWO_DEVICES = """
import jax, jax.numpy as jnp, cuneigh
from jax.sharding import Mesh, NamedSharding, PartitionSpec
first, second = jax.devices()
query = jnp.ones((2, 9, 1, 4))
spread = jax.device_put(query, NamedSharding(Mesh([first, second], "b"), PartitionSpec("b")))
elsewhere = jax.device_put(query, second)
for arguments in ((spread, spread, spread), (query, query, elsewhere)):
    try:
        cuneigh.na1d(*arguments, 3)
    except ValueError as error:
        print(error)
result = cuneigh.na1d(elsewhere, elsewhere, elsewhere, 3)
assert result.devices() == {second}, result.devices()
output, lse = cuneigh.merge_attentions([spread, spread], [spread[..., 0], spread[..., 0]])
assert output.shape == query.shape
"""


def test_jax_devices(jax):
    settings = "import jax; jax.config.update('jax_num_cpu_devices', 2)"
    settings += "; jax.config.update('jax_platforms', 'cpu')\n"
    done = subprocess.run(
        [sys.executable, "-c", settings + TWO_DEVICES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "query is spread over 2 devices" in done.stdout
    assert "value is on device" in done.stdout


# On a GPU

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
def test_a_cupy_array_off_its_alignment_is_refused():
    import cupy

    memory = cupy.zeros(4 * 2 * 9 * 4 + 1, "uint8")
    query = memory[1:].view("float32").reshape(2, 9, 1, 4)
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
