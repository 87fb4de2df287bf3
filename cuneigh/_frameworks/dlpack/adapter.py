"""The adapter of a framework whose arrays speak DLPack."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from cuneigh import _device
from cuneigh._call import Call
from cuneigh._frameworks.contract import SEEN, Adapter, dtype_name, numpy_dtype, type_name
from cuneigh._frameworks.dlpack.capsule import tensor_in
from cuneigh._frameworks.dlpack.lent import Place, borrow, place_of, speaks_dlpack
from cuneigh._problem import Spec

FromDLPack = Callable[[Any], Any]


class DLPackAdapter(Adapter):
    """Arrays of one framework. The own device is a `Place`.

    Once they are converted, arguments are arrays of NumPy or CuPy, and so are results up to
    `returned`.
    """

    def __init__(self, from_dlpack: FromDLPack | None) -> None:
        self._from_dlpack = from_dlpack

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        with _naming(call, name, array):
            place_of(array)

    def adopts(self, other: Adapter) -> bool:
        # Where results are arrays of NumPy or CuPy, these are arguments of a backward.
        return self._from_dlpack is None and other.computes

    def own_device(self, array: Any) -> Place:
        return place_of(array)

    def converted(self, call: str, arrays: dict[str, Any]) -> dict[str, Any]:
        native = {}
        for name, array in arrays.items():
            if SEEN[type(array)].computes:
                native[name] = array
                continue
            with _naming(call, name, array):
                place = place_of(array)
                native[name] = borrow(array, place)
            _native(place)[0].check(call, name, native[name], borrowed=True)
        return native

    def spec(self, array: Any) -> Spec:
        return Spec(array.shape, dtype_name(array.dtype))

    def watches(self, arrays: Sequence[Any]) -> bool:
        return True

    def record(self, call: Call, arrays: Sequence[Any]) -> list[Any]:
        native, own = _native(call.own_device)
        results = Call(
            call.name, native, own, call.arguments, call.problem, call.backend, call.results
        ).run(arrays)
        return self.returned(call.name, call.own_device, results)

    def operations(self, own: Place) -> AbstractContextManager[Any]:
        native, index = _native(own)
        return native.operations(index)

    def cast(self, array: Any, dtype: str) -> Any:
        return array.astype(numpy_dtype(dtype), copy=False)

    def number(self, array: Any) -> float:
        return float(borrow(array, place_of(array)))

    def returned(self, call: str, own: Place, results: Sequence[Any]) -> list[Any]:
        if self._from_dlpack is None:
            return list(results)
        # On a GPU, the framework's stream is to wait for CuPy's current one of that device.
        with nullcontext() if own.kind == "cpu" else _device.current(own.number):
            return [None if array is None else self._taken(call, array) for array in results]

    def _taken(self, call: str, result: Any) -> Any:
        """`result` as an array of the framework."""
        assert self._from_dlpack is not None, "what cannot be taken is not offered"
        offered = result
        if isinstance(result, np.ndarray) and dtype_name(result.dtype) == "bfloat16":
            offered = BFloat16(result)
        try:
            return self._from_dlpack(offered)
        except Exception as error:
            raise RuntimeError(
                f"{call}: the arguments' framework does not take a result of dtype "
                f"{result.dtype} and shape {result.shape} by from_dlpack: {error}"
            ) from error


@contextmanager
def _naming(call: str, name: str, array: Any) -> Iterator[None]:
    """Raises what the framework of an argument raises with the call and the argument's name."""
    try:
        yield
    except Exception as error:
        kind = next((known for known in PASSED_ON if isinstance(error, known)), RuntimeError)
        raise kind(f"{call}: {name} is of type {type_name(array)}: {error}") from error


PASSED_ON = (BufferError, TypeError, ValueError, NotImplementedError)
"""The types of errors that are kept; others become a RuntimeError."""


NATIVE = {"cpu": "cuneigh._frameworks.numpy", "cuda": "cuneigh._frameworks.cupy"}
"""The modules of the adapters that compute."""


def _native(own: Place) -> tuple[Adapter, Any]:
    """The adapter that computes on a device, and the device in its terms."""
    adapter: Adapter = import_module(NATIVE[own.kind]).ADAPTER
    return adapter, "cpu" if own.kind == "cpu" else own.number


class BFloat16:
    """A NumPy array of bfloat16 for other frameworks, since NumPy itself cannot export it."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._bits = array.view(np.uint16)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._bits.__dlpack_device__()

    def __dlpack__(self, **asked: Any) -> Any:
        capsule = self._bits.__dlpack__(**asked)
        tensor_in(capsule).dtype.code = 4
        return capsule


def adapter_of_speaker(array: Any) -> DLPackAdapter | None:
    """The adapter of the framework of `array`; None if it speaks neither protocol."""
    kind = type(array)
    if not speaks_dlpack(kind) and not hasattr(array, "__cuda_array_interface__"):
        return None
    # A type of the user's that is derived from one of a framework is of that framework.
    owner = next((base for base in kind.__mro__ if "__dlpack__" in vars(base)), kind)
    return _adapter(owner.__module__.partition(".")[0], _from_dlpack(array, owner))


@cache
def _adapter(framework: str, from_dlpack: FromDLPack | None) -> DLPackAdapter:
    """One adapter for all types of arrays of a framework."""
    return DLPackAdapter(from_dlpack)


def _from_dlpack(array: Any, kind: type) -> FromDLPack | None:
    """The function that makes arrays of the framework of `array` of others; None if it has none.

    It is that of the array's namespace, or of the module of its type `kind` or one above that.
    """
    parts = kind.__module__.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    modules = [sys.modules[name] for name in names if name in sys.modules]
    if hasattr(array, "__array_namespace__"):
        modules.insert(0, array.__array_namespace__())
    for module in modules:
        if callable(function := getattr(module, "from_dlpack", None)):
            found: FromDLPack = function
            return found
    return None
