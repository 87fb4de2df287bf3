"""Arrays of every framework: the same results, of the same kind, in the same place, uncopied."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers.calls import FRAMEWORKS, SHAPE, arrays, check_call, framework
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
from hypothesis import strategies as st

import cuneigh
from cuneigh import _backends
from cuneigh._frameworks import ADAPTERS
from cuneigh._frameworks.contract import refuse
from cuneigh._frameworks.numpy import NumPyAdapter
from cuneigh._problem import DTYPES, Spec


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

    backend = mock.Mock(
        NAME="watched", SETTINGS=(), forward=forward, unsupported=lambda *given: None
    )
    with mock.patch.object(_backends, "BACKENDS", (backend,)):
        yield seen


# What holds for all of them


@pytest.mark.parametrize("name", FRAMEWORKS[1:])
@given(
    problem=st.booleans().flatmap(lambda each: problems(budget=5_000, cross=False, ordinary=each)),
    rng=generators(),
    layout=layouts(),
)
def test_every_call_agrees_with_the_oracle(name, problem, rng, layout):
    check_call(name, problem, inputs(problem, rng, layout))


@pytest.mark.parametrize("name", FRAMEWORKS[1:])
@given(problem=empty_problems(operations=("backward",), budget=500, cross=False), rng=generators())
def test_an_empty_call_returns_arrays_of_the_framework(name, problem, rng):
    own, asked = framework(name), inputs(problem, rng)
    with own.scope(problem.dtype):
        operands = [None if a is None else own.of(a) for a in asked.operands]
        query, key, value, extra_keys, extra_values, rpb, _ = operands
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
            (output, lse, *gradients),
            (problem.output, problem.lse, *problem.specs[:6]),
            strict=True,
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
    other = "torch" if name in ("numpy", "jax", "jax-cuda") else "numpy"
    (query,), (key,) = arrays(name, 1), arrays(other, 1)
    with pytest.raises(TypeError, match=r"value is of type .*, but query is of type .*framework"):
        cuneigh.na2d(query, query, key, 3)
    lse = framework(other).of(np.zeros(SHAPE[:-1], np.float32))
    with pytest.raises(TypeError, match=r"lses\[0\] is of type .*, but outputs\[0\] is of type"):
        cuneigh.merge_attentions([query], [lse])


class Boxed:
    """The array of a toy framework: a NumPy array in a box."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


class BoxedAdapter(NumPyAdapter):
    def check(self, call, name, array, *, borrowed):
        if type(array) is not Boxed:
            refuse(call, name, array, "a box is needed")

    def spec(self, array):
        return super().spec(array.array)

    def empty(self, own, shape, dtype):
        return Boxed(super().empty(own, shape, dtype))

    def borrow(self, array):
        return array.array


def test_a_new_framework_is_a_module_and_a_line_in_the_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "adapter_of_boxes", SimpleNamespace(ADAPTER=BoxedAdapter()))
    monkeypatch.setitem(ADAPTERS, Boxed.__module__.partition(".")[0], "adapter_of_boxes")
    plain = arrays("numpy", 3)
    output = cuneigh.na2d(*map(Boxed, plain), 3)
    np.testing.assert_array_equal(output.array, cuneigh.na2d(*plain, 3))
    with pytest.raises(TypeError, match=r"but query is of type .*Boxed: all arrays must"):
        cuneigh.na2d(Boxed(plain[0]), plain[1], plain[2], 3)


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

    for leaf in (tensor, tensor.clone().requires_grad_()):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf, tensor)
            result = forward_ad.unpack_dual(cuneigh.na2d(tensor, dual, tensor, 3))
            assert result.tangent.requires_grad == leaf.requires_grad
            assert result.tangent.abs().max() > 0


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
