"""Arrays of every framework: borrowed without a copy, and results of the same kind.

A backend knows NumPy's arrays on the CPU, and addresses on a GPU. A `Face` stands between that and
one framework. Those of NumPy and CuPy are here; `cuneigh.torch` and `cuneigh.jax`
hold theirs and enter them with `register` when they are imported, which `examine` does at the first
array of theirs. No framework is ever imported for a user who has not imported it already.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from cuneigh import _device
from cuneigh._problem import Spec


class Face(Protocol):
    """How cuneigh reads the arrays of one framework; it is a `HostFace`, a `GpuFace` or a
    `Launcher` as well.

    A *place* is the framework's own name for a device: it can be compared and printed.
    """

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        """Raise unless `array` is a plain array of the framework.

        When it is to be `borrowed`, its memory must also lie on one device that cuneigh knows, and
        no automatic differentiation or tracing that a call cannot serve may be watching it.
        """

    def spec(self, array: Any) -> Spec:
        """Shape and dtype."""

    def place(self, array: Any) -> Any:
        """Where `array` is; None if that is not one device, which a borrowed array never says."""

    def device(self, place: Any) -> _device.Device | None:
        """What cuneigh knows of `place`; None, from a `Launcher` only, where that is None."""

    def full(self, place: Any, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        """A contiguous array of the framework that holds `value` everywhere."""

    def operations(self, place: Any) -> AbstractContextManager[Any]:
        """Gives the module with the framework's ``exp``, ``log``, ``maximum`` and ``where``."""

    def cast(self, array: Any, dtype: str) -> Any:
        """`array` converted by the framework's own, differentiable operation."""


class HostFace(Face, Protocol):
    """A face that gives NumPy the memory of its arrays, and of new ones, on the CPU."""

    def empty(self, place: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """An uninitialized contiguous array, from the framework's allocator."""

    def borrow(self, array: Any) -> npt.NDArray[Any]:
        """A NumPy array on the memory of `array`, or of a result of `empty`."""


class GpuFace(Face, Protocol):
    """A face that says where its arrays, and new ones, are on a GPU, which is current."""

    def memory(self, arrays: Sequence[Any]) -> Memory:
        """Where the numbers of `arrays` are."""

    def allocate(self, place: Any, specs: Sequence[Spec | None], addresses: list[int]) -> list[Any]:
        """Uninitialized contiguous arrays at multiples of 16 bytes, from the framework's allocator.

        Their addresses are appended to `addresses`. Where there is no spec there is no array.
        """

    def stream(self, place: Any) -> int:
        """The caller's current CUDA stream."""


Layout = tuple[tuple[int, ...], int]
"""How an array lies in memory: elements from entry to entry along each axis, address modulo 16."""

Memory = tuple[list[int], tuple[Layout, ...], list[Any]]
"""Of several arrays, the addresses and layouts, and what keeps the memory."""


class Launcher:
    """A face whose framework launches by itself, now or when a program that it traces runs."""

    def launch(self, call: Any, arrays: Sequence[Any]) -> list[Any]:
        """What `Call.run` of `cuneigh._ops.call` returns, of a problem that is not empty."""
        raise NotImplementedError


class Watcher:
    """A face whose framework may have to see a call: to differentiate it, or to trace it."""

    def cast_automatically(self, call: str, arrays: dict[str, Any]) -> dict[str, Any]:
        """The arguments as the framework's own operations would take them now."""
        raise NotImplementedError

    def look(self, arrays: Sequence[Any]) -> tuple[Any, ...] | None:
        """What `examine` finds out about the arguments of a call, None being none, and nothing of
        their numbers; or None, where it may find something else tomorrow.
        """
        raise NotImplementedError

    def watches(self, arrays: Sequence[Any]) -> bool:
        """Whether a derivative of a call with these arguments is asked for, or the call traced."""
        raise NotImplementedError

    def record(self, call: Any, arrays: Sequence[Any]) -> list[Any]:
        """What `Call.compute` of `cuneigh._ops.call` returns, by an operation of the framework."""
        raise NotImplementedError


class Arguments(NamedTuple):
    """The array arguments of a call, which are of one framework and in one place."""

    face: Face
    place: Any
    arrays: dict[str, Any]
    specs: dict[str, Spec]


def examine(
    call: str,
    required: Mapping[str, Any],
    optional: Mapping[str, Any] | None = None,
    *,
    borrowed: bool = True,
) -> Arguments:
    """What the arguments of `call` are; those in `optional` that are None are left out.

    Raises TypeError or ValueError for anything that is not an array, for an array that cannot be
    used, and for arrays of different frameworks or places.
    """
    arrays = dict(required)
    if optional is not None:
        arrays.update((name, array) for name, array in optional.items() if array is not None)
    face: Face | None = None
    first, place = "", None
    for name, array in arrays.items():
        own = _faces.get(type(array)) or _face_of(call, name, array)
        own.check(call, name, array, borrowed=borrowed)
        own_place = own.place(array)
        if face is None:
            first, face, place = name, own, own_place
        elif own is not face:
            raise TypeError(
                f"{call}: {name} is of type {type_name(array)}, but {first} is of type "
                f"{type_name(arrays[first])}: all arrays must be of one framework"
            )
        elif own_place != place and own_place is not None and place is not None:
            raise ValueError(
                f"{call}: {name} is on device {own_place}, but {first} is on device {place}: all "
                f"arrays must be on one device"
            )
    assert face is not None, "a call has at least one array"
    if borrowed and isinstance(face, Watcher):
        arrays = face.cast_automatically(call, arrays)
    return Arguments(face, place, arrays, {name: face.spec(a) for name, a in arrays.items()})


_faces: dict[type, Face] = {}
"""The face of every array type that has been seen."""

_by_framework: dict[str, Face] = {}
"""The face of every framework that has one, by the name of its root module."""


def register(face: Face, *roots: str) -> None:
    """Enter the face of the framework whose types are defined below the modules `roots`."""
    _by_framework.update(dict.fromkeys(roots, face))


def known_face(array: object) -> Face | None:
    """The face of an array of a type that has been seen."""
    return _faces.get(type(array))


def _face_of(call: str, name: str, array: object) -> Face:
    """The face for `array`, by the root module of its type, which is then remembered."""
    root = type(array).__module__.partition(".")[0]
    if root not in _by_framework:
        if root == "cupy":
            register(CuPyFace(), "cupy")
        elif root == "torch":
            importlib.import_module("cuneigh.torch")
        elif root in ("jax", "jaxlib"):
            importlib.import_module("cuneigh.jax")
        else:
            refuse(call, name, array)
    face = _by_framework[root]
    face.check(call, name, array, borrowed=False)
    return _faces.setdefault(type(array), face)


def meet(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make sure that PyTorch's face is there when the first argument of a call is a tensor.

    Elsewhere `examine` would do. But torch.compile follows a call instruction by instruction, up to
    the functions that the face has told it not to enter.
    """
    first = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    if type(first).__module__.partition(".")[0] == "torch":
        import cuneigh.torch  # noqa: F401


def refuse(call: str, name: str, array: object, instead: str = "") -> NoReturn:
    """Raise for something that is not an array cuneigh can use; `instead` says what would be."""
    instead = instead or "a NumPy, CuPy, PyTorch or JAX array is needed"
    raise TypeError(f"{call}: {name} is of type {type_name(array)}; {instead}")


def type_name(value: object) -> str:
    """The full name of the type of `value`, as in ``numpy.ndarray`` or ``list``."""
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return module + kind.__qualname__


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype called `name`, that of ml_dtypes for bfloat16."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # which takes a seventh of the time to import all this

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


@cache
def dtype_name(dtype: Any) -> str:
    """The name of a NumPy dtype; of one that is not supported, byte order and all."""
    return str(dtype)


@cache
def import_cupy() -> Any:
    """The module cupy, for arrays of other frameworks that live on a GPU."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "cuneigh works on CUDA arrays through CuPy, which is not installed: "
            "pip install 'cuneigh[cuda13]', or 'cuneigh[cuda12]' for a CUDA 12 driver"
        ) from error
    return cupy


class NumPyFace:
    """NumPy arrays, which are native."""

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        if type(array) not in (np.ndarray, np.memmap):
            refuse(call, name, array, "a plain numpy.ndarray is needed")

    def spec(self, array: npt.NDArray[Any]) -> Spec:
        return Spec(array.shape, dtype_name(array.dtype))

    def place(self, array: npt.NDArray[Any]) -> str:
        return "cpu"

    def device(self, place: str) -> _device.Device:
        return _device.CPU

    def borrow(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array

    def empty(self, place: str, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        return np.empty(shape, numpy_dtype(dtype))

    def full(
        self, place: str, shape: tuple[int, ...], dtype: str, value: float
    ) -> npt.NDArray[Any]:
        return np.full(shape, value, numpy_dtype(dtype))

    def operations(self, place: str) -> AbstractContextManager[Any]:
        return nullcontext(np)

    def cast(self, array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
        return array.astype(numpy_dtype(dtype), copy=False)


class CuPyFace:
    """CuPy arrays, which are native. A place is the number of a CUDA device."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        if type(array) is not self._cupy.ndarray:
            refuse(call, name, array, "a plain cupy.ndarray is needed")
        if array.data.ptr % array.itemsize:
            # A kernel that reads across the boundary takes the whole CUDA context down.
            raise ValueError(
                f"{call}: {name} starts at {array.data.ptr:#x}, which is not a multiple of its "
                f"item size {array.itemsize}"
            )

    def spec(self, array: Any) -> Spec:
        return Spec(array.shape, dtype_name(array.dtype))

    def place(self, array: Any) -> int:
        index: int = array.data.device_id
        return index

    def device(self, place: int) -> _device.Device:
        return _device.cuda(place)

    def memory(self, arrays: Sequence[Any]) -> Memory:
        addresses, layouts = [], []
        for array in arrays:
            address, size = array.data.ptr, array.itemsize
            addresses.append(address)
            layouts.append((tuple([stride // size for stride in array.strides]), address % 16))
        return addresses, tuple(layouts), list(arrays)

    def allocate(self, place: int, specs: Sequence[Spec | None], addresses: list[int]) -> list[Any]:
        made = []
        for spec in specs:
            array = None
            if spec is not None:
                array = self._cupy.ndarray(spec.shape, numpy_dtype(spec.dtype))
                addresses.append(array.data.ptr)
            made.append(array)
        return made

    def stream(self, place: int) -> int:
        stream: int = self._cupy.cuda.get_current_stream().ptr
        return stream

    def full(self, place: int, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        with _device.current(place):
            return self._cupy.full(shape, value, numpy_dtype(dtype))

    @contextmanager
    def operations(self, place: int) -> Iterator[Any]:
        with _device.current(place):
            yield self._cupy

    def cast(self, array: Any, dtype: str) -> Any:
        return array.astype(numpy_dtype(dtype), copy=False)


register(NumPyFace(), "numpy")
