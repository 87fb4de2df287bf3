"""Arrays of frameworks that cuneigh does not know: whatever speaks DLPack."""

from __future__ import annotations

import enum
import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.calls import SHAPE, arrays, check_call, framework
from helpers.speaker import Interface, Speaker
from helpers.strategies import array, generators, inputs, layouts, numpy_dtype, problems
from hypothesis import given
from hypothesis import strategies as st

import cuneigh
from cuneigh._frameworks.dlpack.capsule import Versioned, _pointer, tensor_in
from cuneigh._frameworks.dlpack.lent import Place, borrow
from cuneigh._problem import DTYPES, Spec

NAMES = ["speaker", "strict", "tvm"]


def numbers(count: int = 1, dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> Any:
    rng = np.random.default_rng(0)
    return [array(Spec(shape, dtype), rng) for _ in range(count)]


# What holds for all of them


@given(
    name=st.sampled_from(NAMES),
    problem=problems(budget=5_000, cross=False),
    rng=generators(),
    layout=layouts(),
)
def test_every_call_agrees_with_the_oracle(name, problem, rng, layout):
    if name == "strict" and problem.dtype in ("bfloat16", "float16"):
        name = "speaker"  # the standard has neither
    check_call(name, problem, inputs(problem, rng, layout))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_call_and_a_merge_return_arrays_of_the_framework(name):
    own = framework(name)
    empty, (query, key, value) = own.of(np.zeros((0, 9, 1, 4), np.float32)), arrays(name, 3)
    result = cuneigh.na1d(empty, empty, empty, 3)
    assert own.owns(result)
    assert tuple(result.shape) == (0, 9, 1, 4)
    output, lse = cuneigh.na2d(query, key, value, 3, return_lse=True)
    merged = cuneigh.merge_attentions([output, output], [lse, lse])
    assert all(map(own.owns, merged))
    np.testing.assert_allclose(own.numpy(merged[0]), own.numpy(output), 1e-6, 1e-6)
    np.testing.assert_allclose(own.numpy(merged[1]), own.numpy(lse) + np.log(2), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_copied(dtype):
    (numpy_array,) = numbers(dtype=dtype)
    for view in (numpy_array, numpy_array[:, ::-1, 1::2], np.broadcast_to(numpy_array, SHAPE)):
        native = borrow(Speaker(view), Place("cpu", 0))
        assert native.ctypes.data == view.ctypes.data
        assert native.strides == view.strides
        assert native.shape == view.shape
        assert native.dtype == numpy_dtype(dtype)
        assert not native.flags.writeable
        np.testing.assert_array_equal(native, view)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_that_were_divided_as_unsigned_numbers_are_understood(dtype):
    """As CuPy divides those of a reversed axis."""
    view = numbers(dtype=dtype)[0][:, ::-1, ::-2]

    class Unsigned(Speaker):
        def __dlpack__(self, **keywords):
            capsule = super().__dlpack__(**keywords)
            tensor, size = tensor_in(capsule), view.itemsize
            for axis in range(tensor.ndim):
                tensor.strides[axis] = tensor.strides[axis] * size % 2**64 // size
            return capsule

    native = borrow(Unsigned(view), Place("cpu", 0))
    assert native.strides == view.strides
    np.testing.assert_array_equal(native, view)


@pytest.mark.parametrize("name", ["speaker", "tvm"])
def test_memory_lives_as_long_as_it_is_used_and_no_longer(name):
    (numpy_array,) = numbers()
    alive, expected = weakref.ref(numpy_array), numpy_array.copy()
    native = borrow(framework(name).of(numpy_array), Place("cpu", 0))
    del numpy_array
    gc.collect()
    assert alive() is not None
    part = native[:, 1:]
    del native
    gc.collect()
    np.testing.assert_array_equal(part, expected[:, 1:])
    del part
    gc.collect()
    assert alive() is None


def test_a_result_outlives_everything_else():
    own = framework("tvm")
    query, key, value = numbers(3)
    wanted = cuneigh.na2d(query, key, value, 3)
    result = cuneigh.na2d(*map(own.of, (query, key, value)), 3)
    del query, key, value
    gc.collect()
    np.testing.assert_array_equal(own.numpy(result), wanted)


def test_arrays_of_different_frameworks_are_refused():
    speaker, strict, plain = (arrays(name, 1)[0] for name in ("speaker", "strict", "numpy"))
    with pytest.raises(TypeError, match=r"key is of type .*Array, but query is .*Speaker"):
        cuneigh.na2d(speaker, strict, speaker, 3)
    with pytest.raises(TypeError, match=r"value is of type numpy\.ndarray, but query is of type"):
        cuneigh.na2d(strict, strict, plain, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_of_numpy_are_arguments_of_a_backward(dtype):
    given = numbers(3, dtype)
    query, key, value = map(Speaker, given)
    output, lse = cuneigh.na2d(query, key, value, 3, return_lse=True)
    assert type(output) is np.ndarray
    gradients = cuneigh.na2d_backward(output, query, key, value, output, lse, 3)
    wanted = cuneigh.na2d_backward(output, *given, output, lse, 3)
    for got, expected in zip(gradients[:3], wanted[:3], strict=True):
        assert got.tobytes() == expected.tobytes()


# What speakers do


class Kind(enum.IntEnum):
    CPU = 1
    PINNED = 3


@pytest.mark.parametrize("refusal", [None, TypeError, ValueError])
@pytest.mark.parametrize("device", [(1, 0), (1, None), (Kind.CPU, 0), (Kind.PINNED, 0)])
def test_speakers_old_and_new(refusal, device):
    given = numbers(3)
    spoken = [Speaker(one, refusal) for one in given]
    spoken[0].device = device if device[0] != Kind.PINNED else (1, 0)
    np.testing.assert_array_equal(cuneigh.na2d(*spoken, 3), cuneigh.na2d(*given, 3))
    wanted = [{"max_version": (1, 0)}, {}] if refusal else [{"max_version": (1, 0)}]
    assert spoken[0].asked == wanted


class Silent(Speaker):
    def __dlpack__(self, **asked: Any) -> None: ...


class Protected(Speaker):
    def __dlpack__(self, **asked: Any) -> Any:
        raise BufferError("it requires a gradient")


class Gone(Speaker):
    def __dlpack_device__(self) -> Any:
        raise KeyError("deleted")


class Patched(Speaker):
    """Something else stands in its capsules than what its array says."""

    def __init__(self, array: Any, **changes: int) -> None:
        super().__init__(array)
        self.changes = changes

    def __dlpack__(self, **asked: Any) -> Any:
        capsule = self.array.__dlpack__(**asked)
        tensor, changes = tensor_in(capsule), dict(self.changes)
        if "major" in changes:
            address = _pointer(capsule, b"dltensor_versioned")
            Versioned.from_address(address).major = changes.pop("major")
        if "kind" in changes:
            tensor.device.kind = changes.pop("kind")
        for name, value in changes.items():
            setattr(tensor.dtype, name, value)
        return capsule


@pytest.mark.parametrize(
    ("odd", "error", "words"),
    [
        (lambda a: Speaker(a, device=(10, 0)), ValueError, "device of DLPack's kind 10; the CPU"),
        (lambda a: Patched(a, kind=4), ValueError, "device of DLPack's kind 4; the CPU"),
        (lambda a: Patched(a, kind=2), BufferError, "is on device cpu, but gave memory on .*cuda"),
        (lambda a: Patched(a, major=2), BufferError, "DLPack 2.0, of which version 1 is known"),
        (lambda a: Silent(a), TypeError, "returned NoneType and no DLPack capsule"),
        (lambda a: Protected(a), BufferError, "it requires a gradient"),
        (lambda a: Gone(a), RuntimeError, "deleted"),
        (lambda a: Speaker(a.astype("int32")), TypeError, "dtype int32, which is not one of float"),
        (lambda a: Speaker(a.astype("complex64")), TypeError, "dtype complex64, which is not one"),
        (lambda a: Patched(a, code=17, bits=4), TypeError, r"dtype number 17 of DLPack \(4 bits\)"),
        (lambda a: Patched(a, lanes=2), TypeError, "dtype float32 in vectors of 2, which is not"),
        (lambda a: Speaker(a.astype(">f4")), BufferError, "byte order"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(odd, error, words):
    query = odd(*numbers())
    with pytest.raises(error, match=rf"na2d: query is of type .*: .*{words}"):
        cuneigh.na2d(query, query, query, 3)


def test_a_mask_is_taken():
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 6, 2, 4))
    mask = np.arange(6)[None] < 4
    output = cuneigh.na1d(*map(Speaker, (query, key, value)), 3, key_mask=Speaker(mask))
    np.testing.assert_array_equal(output, cuneigh.na1d(query, key, value, 3, key_mask=mask))
    with pytest.raises(TypeError, match="na1d: query has dtype bool, which is not one of float16"):
        cuneigh.na1d(Speaker(query > 0), Speaker(key), Speaker(value), 3)


def test_shapes_are_checked_as_those_of_others():
    query, key = Speaker(np.zeros((1, 5, 5, 2, 4))), Speaker(np.zeros((1, 5, 4, 2, 4)))
    with pytest.raises(ValueError, match="na2d: key has size 4 on axis 2, but query has 5"):
        cuneigh.na2d(query, key, key, 3)


def test_a_framework_that_cannot_take_a_result_says_so(monkeypatch):
    tvm_ffi = pytest.importorskip("tvm_ffi")
    given = arrays("tvm", 3)

    def refuse(array: Any) -> None:
        raise ValueError("no more arrays")

    adapter = cuneigh._frameworks.contract.SEEN.get(tvm_ffi.Tensor)
    if adapter is None:
        cuneigh.na2d(*given, 3)
        adapter = cuneigh._frameworks.contract.SEEN[tvm_ffi.Tensor]
    monkeypatch.setattr(adapter, "_from_dlpack", refuse)
    with pytest.raises(RuntimeError, match=r"na2d: .*float32 and shape .*from_dlpack: no more arr"):
        cuneigh.na2d(*given, 3)


def test_results_in_bfloat16_go_to_frameworks_that_have_it():
    own = framework("tvm")
    given = numbers(3, "bfloat16")
    result = cuneigh.na2d(*map(own.of, given), 3)
    assert str(result.dtype) == "bfloat16"
    wanted = cuneigh.na2d(*given, 3)
    np.testing.assert_array_equal(own.numpy(result).view("u2"), wanted.view("u2"))
    assert wanted.dtype == ml_dtypes.bfloat16


# On a GPU


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Speaker, Interface])
def test_a_gpu_is_read_in_place_and_results_are_of_cupy(cupy, kind):
    given = arrays("cupy", 3)
    output, lse = cuneigh.na2d(*map(kind, given), 3, return_lse=True)
    wanted = cuneigh.na2d(*given, 3, return_lse=True)
    for got, expected in zip((output, lse), wanted, strict=True):
        assert type(got) is cupy.ndarray
        assert (got == expected).all()
    reversed_ = given[0][:, ::-1, 1:]
    native = borrow(kind(reversed_), Place("cuda", 0))
    assert native.data.ptr == reversed_.data.ptr
    assert native.strides == reversed_.strides
    merged, _ = cuneigh.merge_attentions(*([kind(one)] for one in wanted))
    assert type(merged) is cupy.ndarray


@pytest.mark.gpu
def test_a_speaker_is_told_the_current_stream(cupy):
    given = arrays("cupy", 3)
    told = Speaker(given[0])
    cuneigh.na2d(told, *map(Speaker, given[1:]), 3)
    assert told.asked[-1]["stream"] == 1
    with cupy.cuda.Stream(non_blocking=True) as stream:
        cuneigh.na2d(told, *map(Speaker, given[1:]), 3)
    assert told.asked[-1]["stream"] == stream.ptr
    stream.synchronize()


@pytest.mark.gpu
def test_bfloat16_on_a_gpu(cupy):
    given = arrays("cupy", 3, "bfloat16")
    result = cuneigh.na2d(*map(Speaker, given), 3)
    assert (result == cuneigh.na2d(*given, 3)).all()


@pytest.mark.gpu
def test_a_mask_and_another_byte_order_of_the_interface_are_refused(cupy):
    (query,) = arrays("cupy", 1)
    with pytest.raises(TypeError, match=r"na2d: query is of type .*Interface: it has a mask"):
        cuneigh.na2d(*[Interface(query, mask=query)] * 3, 3)
    with pytest.raises(TypeError, match=r"dtype >f4, which is not one of"):
        cuneigh.na2d(*[Interface(query, typestr=">f4")] * 3, 3)


@pytest.mark.gpu
def test_a_cupy_array_between_elements_is_refused(cupy):
    memory = cupy.zeros(4096, "uint8")
    query = cupy.ndarray((1, 9, 1, 4), "float32", memory.data, (576, 18, 16, 4))
    with pytest.raises(ValueError, match=r"query has strides \(576, 18, 16, 4\) in bytes"):
        cuneigh.na1d(query, query, query, 3)


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_another_device_than_the_current_one(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is only one GPU")
    wanted = cuneigh.na2d(*arrays("cupy", 3), 3).get()
    with cupy.cuda.Device(1):
        there = [cupy.asarray(one.get()) for one in arrays("cupy", 3)]
    for kind in (Speaker, Interface):
        result = cuneigh.na2d(*map(kind, there), 3)
        assert result.device.id == 1
        np.testing.assert_array_equal(result.get(), wanted)
    with pytest.raises(ValueError, match="key is on device cuda:0, but query is on device cuda:1"):
        cuneigh.na2d(Speaker(there[0]), Speaker(arrays("cupy", 1)[0]), Speaker(there[2]), 3)
