"""The face of JAX: its arrays as arguments and results of cuneigh's functions.

Calls are eager. Arrays on the CPU are borrowed as NumPy views, those on a GPU through DLPack on a
stream of cuneigh's own, which DLPack makes wait for whatever produces them. There is nothing to
call here: the module is imported when the first array arrives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from cuneigh import _device
from cuneigh._arrays import HERE, dtype_name, import_cupy, numpy_dtype, refuse, register
from cuneigh._problem import Spec

XLA_ALIGNMENT = 64
"""Bytes at which host memory must start for XLA to take it over without a copy."""


class JaxFace:
    """JAX arrays. A place is a ``jax.Device``."""

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        if not isinstance(array, jax.Array):
            refuse(call, name, array, "a jax.Array is needed")
        if not borrowed:
            return
        if isinstance(array, jax.core.Tracer):
            raise NotImplementedError(
                f"{call}: {name} is being traced by a transformation such as jax.jit, jax.grad or "
                f"jax.vmap, which {call} does not support yet: call it outside"
            )
        devices = array.devices()
        if len(devices) != 1:
            raise ValueError(
                f"{call}: {name} is spread over {len(devices)} devices; one device is needed"
            )
        (device,) = devices
        if device.platform not in ("cpu", "gpu"):
            raise ValueError(f"{call}: {name} is on device {device}; a CPU or a GPU is needed")

    def spec(self, array: jax.Array) -> Spec:
        return Spec(array.shape, dtype_name(array.dtype))

    def place(self, array: jax.Array) -> jax.Device | None:
        if isinstance(array, jax.core.Tracer) or len(array.devices()) != 1:
            return None
        return next(iter(array.devices()))

    def device(self, place: jax.Device) -> _device.Device:
        if place.platform == "cpu":
            return _device.CPU
        import_cupy()
        return _device.cuda(place.local_hardware_id)

    def launching(self, place: jax.Device) -> AbstractContextManager[Any]:
        return HERE if place.platform == "cpu" else _own_stream(place.local_hardware_id)

    def borrow(self, array: Any) -> Any:
        if isinstance(array, np.ndarray) or next(iter(array.devices())).platform == "cpu":
            return np.asarray(array)
        return import_cupy().from_dlpack(array)

    def empty(self, place: jax.Device, shape: tuple[int, ...], dtype: str) -> Any:
        if place.platform == "cpu":
            return _aligned(shape, numpy_dtype(dtype))
        with jax.ensure_compile_time_eval():
            return jnp.empty(shape, numpy_dtype(dtype), device=place)

    def deliver(self, place: jax.Device, array: Any) -> jax.Array:
        if isinstance(array, np.ndarray):
            with jax.ensure_compile_time_eval():
                array = jax.device_put(array, place, may_alias=True)
        return array

    def full(
        self, place: jax.Device, shape: tuple[int, ...], dtype: str, value: float
    ) -> jax.Array:
        with jax.ensure_compile_time_eval():
            return jnp.full(shape, value, numpy_dtype(dtype), device=place)

    def operations(self, place: jax.Device | None) -> AbstractContextManager[Any]:
        return nullcontext(jnp)

    def cast(self, array: jax.Array, dtype: str) -> jax.Array:
        return array.astype(numpy_dtype(dtype))


@contextmanager
def _own_stream(index: int) -> Iterator[None]:
    """Make `index` CuPy's current device and cuneigh's own stream there CuPy's.

    XLA cannot be told to wait for that stream, neither before it reads a result nor before it
    gives the memory of an argument to something else; so the host waits for it in the end.
    """
    with import_cupy().cuda.Device(index), _stream(index) as stream:
        yield
        stream.synchronize()


@cache
def _stream(index: int) -> Any:
    """The stream of cuneigh's eager calls on CUDA device `index`, which is the current one."""
    return import_cupy().cuda.Stream(non_blocking=True)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """An uninitialized NumPy array that starts where XLA wants it to."""
    size = prod(shape) * dtype.itemsize
    memory = np.empty(size + XLA_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % XLA_ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


register(JaxFace(), "jax", "jaxlib")
