"""What an adapter must offer, so that the rest of cuneigh can take the arrays of its framework.

A backend knows NumPy's arrays on the CPU, and addresses on a GPU. An `Adapter` stands between that
and one framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from cuneigh._device import Device, installation
from cuneigh._problem import Spec

Layout = tuple[tuple[int, ...], int]
"""How an array lies in memory: its strides, in elements, and its address modulo 16."""

Memory = tuple[list[int], tuple[Layout, ...], list[Any]]
"""Of several arrays on a GPU, the addresses, the layouts, and what keeps the memory."""


class NoMemoryError(ValueError):
    """An array has no memory any more; `Adapter.check` raises an error that names it."""


class Adapter:
    """How cuneigh reads and makes the arrays of one framework.

    Every adapter has the first group of methods. One whose arrays may be on the CPU has the second,
    one whose arrays may be on a GPU the third; one whose framework launches by itself has the
    fourth in place of both. The last group may be left as it is.

    The *own device* of an array is the framework's name for the device that it lies on, which can
    be compared and printed.
    """

    computes = False
    """Whether backends compute on its arrays as they are: NumPy's on the CPU, CuPy's on a GPU."""

    # Every framework

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        """Raise unless `array` is a plain array of the framework.

        When it is to be `borrowed`, its memory must also lie on one device that cuneigh knows, and
        no automatic differentiation or tracing that a call cannot serve may be watching it.
        """
        raise NotImplementedError

    def spec(self, array: Any) -> Spec:
        """Shape and dtype."""
        raise NotImplementedError

    def own_device(self, array: Any) -> Any:
        """The own device of `array`; None if it is not on one device, or traced."""
        raise NotImplementedError

    def device(self, own: Any) -> Device | None:
        """What cuneigh knows of an own device; None where that is None."""
        raise NotImplementedError

    def full(self, own: Any, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        """A contiguous array of the framework that holds `value` everywhere."""
        raise NotImplementedError

    def operations(self, own: Any) -> AbstractContextManager[Any]:
        """Gives the module with the framework's ``exp``, ``log``, ``maximum`` and ``where``.

        `merge_attentions` computes with these, some of whose arguments are Python floats, and with
        the operators ``+ - * / ==`` and the index ``[..., None]`` of the arrays themselves.
        """
        raise NotImplementedError

    def cast(self, array: Any, dtype: str) -> Any:
        """`array` converted by the framework's own, differentiable operation."""
        raise NotImplementedError

    def number(self, array: Any) -> float | None:
        """The number in a 0-d array; None where it may not be there yet, or be differentiated."""
        return None

    def starts(self, rank: int, given: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        """The starts of parts of a layout, those of queries and of keys, and `STARTS`.

        The starts have 0 in place of what is not known before a program runs, where `STARTS` has
        it; if all are known, that is None.
        """
        return given, None

    # Arrays on the CPU: memory for NumPy

    def empty(self, own: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """An uninitialized contiguous array, from the framework's allocator."""
        raise NotImplementedError

    def borrow(self, array: Any) -> npt.NDArray[Any]:
        """A NumPy array on the memory of `array`, which may be a result of `empty`."""
        raise NotImplementedError

    def threads(self) -> int | None:
        """How many threads the framework computes with on the CPU; None if it does not say."""
        return None

    # Arrays on a GPU, which is the current one whenever these are called

    def memory(self, arrays: Sequence[Any]) -> Memory:
        """Where the numbers of `arrays` are."""
        raise NotImplementedError

    def allocate(self, own: Any, specs: Sequence[Spec | None], addresses: list[int]) -> list[Any]:
        """Uninitialized contiguous arrays at multiples of 16 bytes, from the framework's allocator.

        Their addresses are appended to `addresses`. Where a spec is None, so is the array.
        """
        raise NotImplementedError

    def stream(self, own: Any) -> int:
        """The caller's current CUDA stream."""
        raise NotImplementedError

    # A framework that launches by itself, now or when a program that it traces runs

    launches = False
    """Whether it does."""

    def launch(self, call: Any, arrays: Sequence[Any]) -> list[Any]:
        """What `Call.run` of `cuneigh._call` returns, for a problem that is not empty."""
        raise NotImplementedError

    # A framework that converts arguments, or that must see a call to differentiate or trace it

    def adopts(self, other: Adapter) -> bool:
        """Whether arrays of the framework of `other` may be arguments beside its own."""
        return False

    def common_device(self, call: str, arrays: Mapping[str, Any]) -> Any:
        """The own device of all arguments of `call`; ValueError if there is no such device."""
        first, device = "", None
        for name, array in arrays.items():
            own = self.own_device(array)
            if device is None:
                first, device = name, own
            elif own is not None and own != device:
                raise ValueError(
                    f"{call}: {name} is on device {own}, but {first} is on device {device}: all "
                    f"arrays must be on one device"
                )
        return device

    def converted(self, call: str, arrays: dict[str, Any]) -> dict[str, Any]:
        """The arguments, once they are checked, as the framework's own operations take them now.

        The other methods are given these, but for `check` and `own_device`.
        """
        return arrays

    def returned(self, call: str, own: Any, results: Sequence[Any]) -> list[Any]:
        """The results of operations on arguments that were converted, as the caller gets them."""
        return list(results)

    def signature(self, arrays: Sequence[Any]) -> tuple[Any, ...] | None:
        """All that the checks of a call find out about its arguments, of which some may be None.

        Calls with equal signatures are checked once. None if the checks may come to another result
        the next time, or are as quick as this would be.
        """
        return None

    def watches(self, arrays: Sequence[Any]) -> bool:
        """Whether a derivative of a call with these arguments is asked for, or the call traced."""
        return False

    def record(self, call: Any, arrays: Sequence[Any]) -> list[Any]:
        """What `Call.compute` of `cuneigh._call` returns, by an operation of the framework."""
        raise NotImplementedError


SEEN: dict[type, Adapter] = {}
"""The adapter for every type of array that has been an argument of a call."""


# What adapters share


def refuse(call: str, name: str, array: object, instead: str = "") -> NoReturn:
    """Raise for something that is not an array cuneigh can use; `instead` says what would be."""
    if not instead:
        instead = "an array is needed: NumPy's, CuPy's, PyTorch's, JAX's or one that speaks DLPack"
        if isinstance(array, (list, tuple, memoryview)) or hasattr(array, "__array__"):
            instead += f"; pass numpy.asarray({name})"
    raise TypeError(f"{call}: {name} is of type {type_name(array)}; {instead}")


def type_name(value: object) -> str:
    """The full name of the type of `value`, as in ``numpy.ndarray`` or ``list``."""
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return module + kind.__qualname__


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype called `name`, that of ml_dtypes for one that NumPy lacks."""
    if name == "bool" or hasattr(np, name):
        return np.dtype(name)
    import ml_dtypes  # which takes a seventh of the time to import all this

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


@cache
def dtype_name(dtype: Any) -> str:
    """The name of a NumPy dtype; of one that is not supported, byte order and all."""
    return str(dtype)


def host_array(
    owner: Any,
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    writeable: bool,
) -> npt.NDArray[Any]:
    """A NumPy array on memory of `owner`, which it keeps; `strides` are in elements."""
    if 0 in shape:
        return np.empty(shape, dtype)
    held = _Held(owner)
    held.__array_interface__ = {
        "version": 3,
        "shape": shape,
        "strides": tuple([stride * dtype.itemsize for stride in strides]),
        "typestr": f"=u{dtype.itemsize}",  # NumPy does not know all dtypes by a name
        "data": (address, not writeable),
    }
    return np.asarray(held).view(dtype)


class _Held:
    """Memory, described for NumPy, which keeps this object as long as its array."""

    __array_interface__: dict[str, Any]

    def __init__(self, owner: Any) -> None:
        self.owner = owner


@cache
def import_cupy() -> None:
    """Import CuPy, by which arrays of every framework are computed with on a GPU."""
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "cuneigh works on CUDA arrays through CuPy, which is not installed: " + installation()
        ) from error
