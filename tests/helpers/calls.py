"""The public functions on the arrays of any framework, compared with the oracle.

`FRAMEWORKS` lists them for `pytest.mark.parametrize`, those on a GPU under the marker ``gpu``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers import gpu_arrays
from helpers.accuracy import assert_close
from helpers.expected import expect, forward_results
from helpers.illegal import call_of
from helpers.speaker import Speaker
from helpers.strategies import Inputs, array, numpy_dtype

import cuneigh
from cuneigh._frameworks.dlpack.lent import Place, borrow
from cuneigh._problem import Problem, Spec

# JAX shares the GPU with the other frameworks.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@dataclass(frozen=True)
class Framework:
    """How tests make and read the arrays of one framework on one device."""

    name: str
    of: Callable[[np.ndarray], Any]
    """An array with the elements of a NumPy array, and its strides where the framework can."""
    numpy: Callable[[Any], np.ndarray]
    """A NumPy array with the elements of an array."""
    owns: Callable[[Any], bool]
    """Whether something is an array of the framework on the device."""
    pointer: Callable[[Any], int]
    is_contiguous: Callable[[Any], bool]
    scope: Callable[[str], Any] = lambda dtype: contextlib.nullcontext()
    """What arrays of a dtype need around them."""


FRAMEWORKS = [
    "numpy",
    "torch",
    "jax",
    pytest.param("cupy", marks=pytest.mark.gpu),
    pytest.param("torch-cuda", marks=pytest.mark.gpu),
    pytest.param("jax-cuda", marks=pytest.mark.gpu),
]


@cache
def framework(name: str) -> Framework:
    """The framework called `name`; skips the test if it is not installed."""
    match name.split("-"):
        case ["numpy"]:
            return Framework(
                name,
                of=lambda array: array,
                numpy=lambda array: array,
                owns=lambda array: type(array) is np.ndarray,
                pointer=lambda array: array.ctypes.data,
                is_contiguous=lambda array: array.flags.c_contiguous,
            )
        case ["cupy"]:
            return cupy_framework(name)
        case ["torch", *cuda]:
            return torch_framework(name, "cuda:0" if cuda else "cpu")
        case ["jax", *cuda]:
            return jax_framework(name, "gpu" if cuda else "cpu")
        case ["speaker"]:
            return speaker_framework(name)
        case ["strict"]:
            return strict_framework(name)
        case ["tvm"]:
            return tvm_framework(name)
    raise ValueError(name)


SHAPE = (2, 6, 7, 3, 8)


def arrays(name: str, count: int, dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> Any:
    """Arrays of a framework with different, normally distributed numbers."""
    rng = np.random.default_rng(0)
    return [framework(name).of(array(Spec(shape, dtype), rng)) for _ in range(count)]


def cupy_framework(name: str) -> Framework:
    cupy = pytest.importorskip("cupy")
    return Framework(
        name,
        of=gpu_arrays.to_cupy,
        numpy=gpu_arrays.to_numpy,
        owns=lambda array: type(array) is cupy.ndarray,
        pointer=lambda array: array.data.ptr,
        is_contiguous=lambda array: array.flags.c_contiguous,
    )


def torch_framework(name: str, device: str) -> Framework:
    torch = pytest.importorskip("torch")

    def of(array: np.ndarray) -> Any:
        if min(array.strides, default=0) < 0:  # which torch does not have
            array = array.copy()
        if device != "cpu":
            return torch.from_dlpack(gpu_arrays.to_cupy(array))
        if not array.flags.writeable:  # a broadcast array: torch warns of read-only ones
            kept = array[tuple(slice(None if stride else 1) for stride in array.strides)]
            return of(kept.copy()).expand(array.shape)
        if array.dtype == numpy_dtype("bfloat16"):
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def numpy(tensor: Any) -> np.ndarray:
        tensor = tensor.detach().cpu()
        if tensor.dtype is torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return tensor.numpy()

    return Framework(
        name,
        of=of,
        numpy=numpy,
        owns=lambda array: type(array) is torch.Tensor and str(array.device) == device,
        pointer=lambda array: array.data_ptr(),
        is_contiguous=lambda array: array.is_contiguous(),
    )


def jax_framework(name: str, platform: str) -> Framework:
    jax = pytest.importorskip("jax")
    device = jax.devices(platform)[0]
    return Framework(
        name,
        of=lambda array: jax.device_put(np.ascontiguousarray(array), device),
        numpy=np.asarray,
        owns=lambda array: isinstance(array, jax.Array) and array.devices() == {device},
        pointer=lambda array: array.unsafe_buffer_pointer(),
        is_contiguous=lambda array: True,
        scope=lambda dtype: jax.enable_x64(dtype == "float64"),
    )


# Frameworks that cuneigh knows nothing of


def speaker_framework(name: str) -> Framework:
    """One that has nothing but DLPack's methods, so that results are NumPy's."""
    return replace(
        framework("numpy"),
        name=name,
        of=Speaker,
        numpy=lambda array: getattr(array, "array", array),
    )


def strict_framework(name: str) -> Framework:
    xp = pytest.importorskip("array_api_strict")
    return Framework(
        name,
        of=lambda array: xp.from_dlpack(array if array.flags.writeable else array.copy()),
        numpy=np.from_dlpack,
        owns=lambda array: type(array) is type(xp.zeros(1)),
        pointer=lambda array: np.from_dlpack(array).ctypes.data,
        is_contiguous=lambda array: np.from_dlpack(array).flags.c_contiguous,
    )


def tvm_framework(name: str) -> Framework:
    tvm_ffi = pytest.importorskip("tvm_ffi")

    def numpy(tensor: Any) -> np.ndarray:
        return borrow(tensor, Place("cpu", 0))

    def of(array: np.ndarray) -> Any:
        if not array.flags.writeable:  # which it does not take
            array = array.copy()
        return tvm_ffi.from_dlpack(Speaker(array))

    return Framework(
        name,
        of=of,
        numpy=numpy,
        owns=lambda array: type(array) is tvm_ffi.Tensor,
        pointer=lambda array: numpy(array).ctypes.data,
        is_contiguous=lambda array: numpy(array).flags.c_contiguous,
    )


def arguments_of(problem: Problem, inputs: Inputs) -> tuple[str, dict[str, Any]]:
    """The public function that computes `problem`, and all of its arguments as NumPy arrays."""
    call = call_of(problem)
    arrays = {**inputs.operands._asdict(), **inputs._asdict()}
    if problem.operation == "backward":
        arrays["output"], arrays["lse"] = forward_results(problem, inputs.operands)
    arguments = {
        name: arrays[name] if isinstance(value, Spec) else value
        for name, value in call.arguments.items()
    }
    if problem.operation == "forward":
        arguments["return_lse"] = inputs.wants_lse
    return call.function, arguments


def results_of(problem: Problem, returned: Any) -> dict[str, Any]:
    """What a public function returned, by the names that `accuracy.expect` uses."""
    match problem.operation:
        case "forward":
            output, lse = returned if isinstance(returned, tuple) else (returned, None)
            results = {"output": output, "lse": lse}
        case "qk":
            results = {"logits": returned}
        case "av":
            results = {"output": returned}
        case _:
            results = {f"grad {name}": array for name, array in returned._asdict().items()}
    return {name: array for name, array in results.items() if array is not None}


def check_call(
    name: str, problem: Problem, inputs: Inputs, backend: str | None = None
) -> dict[str, Any]:
    """Call the public function for `problem` with arrays of the framework `name`.

    Its results must be all those that were asked for, contiguous arrays of the framework and the
    device, of the right dtypes, and as near to the oracle as `accuracy` asks; its arguments must
    come back as they were.
    """
    own = framework(name)
    function, arguments = arguments_of(problem, inputs)
    with own.scope(problem.dtype):
        given = {
            name: own.of(value) if isinstance(value, np.ndarray) else value
            for name, value in arguments.items()
        }
        returned = getattr(cuneigh, function)(**given, backend=backend)
        results = results_of(problem, returned)
        expected, max_logit = expect(problem, inputs)
        wanted = set(expected) if inputs.wants_lse else set(expected) - {"lse"}
        assert set(results) == wanted, problem
        for result_name, array in results.items():
            assert own.owns(array), f"{result_name} is {type(array)}; {problem}"
            assert own.is_contiguous(array), f"{result_name}; {problem}"
            wanted_result = expected[result_name]
            assert_close(
                f"{name}: {result_name}",
                own.numpy(array),
                wanted_result.oracle,
                wanted_result.obvious,
                wanted_result.term_bound,
                wanted_result.dtype,
                max_logit,
                accumulator=problem.accumulator,
                context=problem,
            )
        for argument, array in given.items():
            if isinstance(arguments[argument], np.ndarray):
                assert same_bits(own.numpy(array), arguments[argument]), f"{argument}; {problem}"
    return results


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal, NaNs and signs of zeros included."""
    bits = f"u{a.itemsize}"
    return a.dtype == b.dtype and np.array_equal(a.copy().view(bits), b.copy().view(bits))
