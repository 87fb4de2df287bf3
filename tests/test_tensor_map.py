"""Tensor maps among the parameters of a kernel, encoded by the driver on a GPU and a stand-in."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from cuneigh import _jit
from cuneigh._device import Device, cuda
from cuneigh._gpu import tensor_map
from cuneigh._gpu.arrays import Pointer
from cuneigh._gpu.program import Program
from cuneigh._gpu.tensor_map import KEPT, Encoder, TensorMap
from cuneigh._problem import Spec

KERNEL = _jit.Kernel("sums/shares", "")
H200 = Device("cuda", 0, "NVIDIA H200", (9, 0), 132, 227 * 1024)
MAP = TensorMap(
    Pointer(1, 64), "bfloat16", (128, 40, 2), (256, 20480), (64, 16, 1), swizzle=128
)  # fmt: skip


@pytest.fixture
def driver(monkeypatch):
    """A stand-in for the driver: the words of a map are its dtype, and its address in the last."""
    calls = SimpleNamespace(encoded=[], replaced=[])

    def write(target, index, number):
        assert target % 64 == 0
        ctypes.memmove(target + 8 * index, number.to_bytes(8, "little"), 8)
        return address_status(number) if index else 0

    def address_status(address):
        return 0 if address % 16 == 0 else 1

    def encode(target, dtype, count, address, dims, strides, box, element_strides, *codes):
        calls.encoded.append(
            SimpleNamespace(
                dtype=dtype, count=count, address=address, codes=codes,
                dims=tuple(dims), strides=tuple(strides)[: count - 1], box=tuple(box),
                element_strides=tuple(element_strides),
            )
        )  # fmt: skip
        write(target, 0, dtype)
        return write(target, 15, address)

    def replace_address(target, address):
        calls.replaced.append(address)
        return write(target, 15, address)

    functions = tensor_map.DriverFunctions(encode, replace_address)
    monkeypatch.setattr(tensor_map, "driver_functions", lambda: functions)
    return calls


def words_of(address):
    """What the stand-in makes of `MAP` for an address."""
    return (9).to_bytes(8, "little") + bytes(14 * 8) + address.to_bytes(8, "little")


@pytest.fixture
def launched(monkeypatch):
    """The first two parameters of every launch: 128 bytes and 8 bytes, as the driver reads them."""
    cuda_driver = pytest.importorskip("cupy").cuda.driver
    seen = []

    def launch_kernel(*arguments):
        frame = arguments[-2]
        first, second = np.frombuffer(ctypes.string_at(frame, 16), np.uint64).tolist()
        assert first % 64 == 0
        seen.append((ctypes.string_at(first, 128), ctypes.string_at(second, 8)))

    monkeypatch.setattr(cuda_driver, "launchKernel", launch_kernel)
    kernel = SimpleNamespace(ptr=0)
    function = SimpleNamespace(kernel=kernel, max_dynamic_shared_size_bytes=49152)
    monkeypatch.setattr(_jit, "load", lambda *_: function)
    return seen


def test_the_driver_is_told_what_the_map_says(driver):
    Encoder(MAP).encode(4096)
    (call,) = driver.encoded
    assert (call.dtype, call.count, call.address) == (9, 3, 4096)
    assert (call.dims, call.strides, call.box) == ((128, 40, 2), (256, 20480), (64, 16, 1))
    assert call.element_strides == (1, 1, 1)
    assert call.codes == (0, 3, 2, 0), "interleave, swizzle, L2 promotion, fill"


def test_a_kernel_gets_the_map_of_the_address(driver, launched):
    program = Program(H200)
    first, second = (program.array(Spec((2, 40, 128), "bfloat16")) for _ in range(2))
    assert MAP.pointer.slot == second.pointer.slot
    program.launch(KERNEL, (1, 1), 128, MAP, [first.pointer])
    for base in (1 << 20, 1 << 40, 1 << 20):
        program.run([7, base], 0)
        assert launched.pop() == (words_of(base + 64), (7).to_bytes(8, "little"))
    assert driver.replaced == [(1 << 20) + 64, (1 << 40) + 64], "once each"
    assert len(driver.encoded) == 1


def test_only_the_last_addresses_are_kept(driver):
    encode = Encoder(MAP).encode
    for address in range(0, 16 * (KEPT + 1), 16):
        encode(address)
    encode(16 * KEPT)
    assert len(driver.replaced) == KEPT + 1
    encode(0)
    assert len(driver.replaced) == KEPT + 2


def test_what_the_driver_refuses_is_named(driver):
    encode = Encoder(MAP).encode
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"status 1 to encode TensorMap\(.* for 0x1008"):
            encode(0x1008)
        encode(0x1000)


def test_threads_get_their_own_addresses(driver):
    encode = Encoder(MAP).encode
    start = threading.Barrier(4)

    def work(thread):
        start.wait()
        for round_ in range(500):
            address = 16 * (4 * round_ + thread)
            held = encode(address)
            yield ctypes.string_at(held[0], 128) == words_of(address)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda thread: all(work(thread)), range(4)))


BOX_COPY = """
#pragma once
namespace cuneigh {
struct alignas(64) TensorMap { unsigned long long words[16]; };

// Copies the box of 2 x 8 x 64 elements at (32, 4, 1) to `target`, without swizzle.
template <typename Plan>
__global__ void box_copy(const __grid_constant__ TensorMap source, unsigned short* target) {
  __shared__ alignas(128) unsigned short smem[2 * 8 * 64];
  __shared__ alignas(8) unsigned long long barrier;
  const unsigned bar = (unsigned)__cvta_generic_to_shared(&barrier);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar));
    asm volatile("fence.proxy.async.shared::cta;");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "n"(2048));
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"((unsigned)__cvta_generic_to_shared(smem)),
        "l"(&source), "r"(32), "r"(4), "r"(1), "r"(bar) : "memory");
  }
  __syncthreads();
  asm volatile(
      "{ .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;"
      " @!done bra wait; }" ::"r"(bar) : "memory");
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) target[i] = smem[i];
}
}  // namespace cuneigh
"""


@pytest.mark.gpu
def test_the_driver_encodes_what_a_kernel_reads(tmp_path, monkeypatch):
    """A box out of the middle of an array, part of it past the end, for two addresses."""
    import cupy

    from cuneigh._jit import _build

    device = cuda(0)
    if device.capability < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    (tmp_path / "box_copy.cu").write_text(BOX_COPY)
    monkeypatch.setattr(_build, "packaged", lambda: _jit.Sources(tmp_path))
    kernel = _jit.Kernel("box_copy", "")
    program = Program(device)
    source, target = (program.array(Spec(shape, "float16")) for shape in ((3, 10, 80), (1024,)))
    tensor = TensorMap(source.pointer, "float16", (80, 10, 2), (160, 1600), (64, 8, 2))
    program.launch(kernel, (1, 1), 128, tensor, [target.pointer])
    for seed in range(2):
        numbers = np.random.default_rng(seed).integers(1, 9, (3, 10, 80)).astype(np.uint16)
        on_gpu, result = cupy.asarray(numbers), cupy.zeros(1024, np.uint16)
        program.run([on_gpu.data.ptr, result.data.ptr], cupy.cuda.get_current_stream().ptr)
        expected = np.zeros((2, 8, 64), np.uint16)
        expected[0, :6, :48] = numbers[1, 4:, 32:]
        np.testing.assert_array_equal(result.get().reshape(2, 8, 64), expected)
