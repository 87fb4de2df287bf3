"""JAX arrays as arguments and results. Every call is a custom call of XLA, traced or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import compress
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from cuneigh import _device
from cuneigh._backends import BACKENDS, choose
from cuneigh._call import Call
from cuneigh._frameworks.contract import Adapter, dtype_name, import_cupy, numpy_dtype, refuse
from cuneigh._frameworks.jax import calls, sharded
from cuneigh._frameworks.jax.handlers import LIMITS
from cuneigh._frameworks.numpy import ADAPTER as NUMPY
from cuneigh._problem import ARRAYS, Spec


class JaxAdapter(Adapter):
    """JAX arrays. The own device is a ``jax.Device``, or None for an array that is traced.

    NumPy arrays beside them are constants, and what has ``__jax_array__`` stands for an array.
    """

    launches = True

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        array = _held(array)
        if not isinstance(array, jax.Array):
            refuse(call, name, array, "a jax.Array is needed")
        if not borrowed:
            return
        if isinstance(array, jax.core.Tracer):
            return
        device = min(array.devices(), key=lambda device: device.id)
        if device.platform not in ("cpu", "gpu"):
            raise ValueError(f"{call}: {name} is on device {device}; a CPU or a GPU is needed")

    def adopts(self, other: Adapter) -> bool:
        return other is NUMPY

    def converted(self, call: str, arrays: dict[str, Any]) -> dict[str, Any]:
        return {
            name: array if isinstance(array, jax.Array) else jnp.asarray(_held(array))
            for name, array in arrays.items()
        }

    def spec(self, array: jax.Array) -> Spec:
        return Spec(array.shape, dtype_name(array.dtype))

    def own_device(self, array: Any) -> jax.Device | None:
        array = _held(array)
        if not _is_concrete(array) or len(array.devices()) != 1:
            return None
        return next(iter(array.devices()))

    def common_device(self, call: str, arrays: Mapping[str, Any]) -> jax.Device | None:
        held = {name: _held(array) for name, array in arrays.items()}
        if any(isinstance(array, jax.core.Tracer) for array in held.values()):
            return None
        # JAX moves what was put nowhere in particular to the device of the others.
        put = {name: array for name, array in held.items() if getattr(array, "committed", False)}
        return super().common_device(call, put or held)

    def device(self, own: jax.Device | None) -> _device.Device | None:
        if own is None:
            return None
        if own.platform == "cpu":
            return _device.CPU
        import_cupy()
        return _device.cuda(_cuda_number(own))

    def full(
        self, own: jax.Device | None, shape: tuple[int, ...], dtype: str, value: float
    ) -> jax.Array:
        return jnp.full(shape, value, numpy_dtype(dtype), device=own)

    def starts(self, rank: int, given: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        rows = [each if isinstance(each, (tuple, list)) else (each,) * rank for each in given]
        known = [tuple(0 if _is_traced_integer(one) else one for one in row) for row in rows]
        if not any(_is_traced_integer(one) for row in rows for one in row):
            return given, None
        if any(len(row) != rank or _of_other_types(row) for row in known):
            return known, None  # which is illegal
        return known, jnp.stack([jnp.stack([_int32(one) for one in row]) for row in rows])

    def operations(self, own: jax.Device | None) -> AbstractContextManager[Any]:
        return nullcontext(jnp)

    def cast(self, array: jax.Array, dtype: str) -> jax.Array:
        return array.astype(numpy_dtype(dtype))

    def signature(self, arrays: Sequence[Any]) -> tuple[Any, ...] | None:
        found: list[Any] = []
        for array in arrays:
            if array is None:
                found.append(None)
                continue
            if not _is_concrete(array) or type(array.sharding) is not SingleDeviceSharding:
                return None
            found += array.shape, array.dtype, array.sharding, array.committed
        return tuple(found)

    def launch(self, call: Call, arrays: Sequence[jax.Array]) -> list[Any]:
        problem, backend = call.problem, call.backend
        if call.own_device is None and backend not in (None, *(known.NAME for known in BACKENDS)):
            choose(problem, _device.CPU, backend)  # raises now, not when the program runs
        names = ARRAYS[problem.operation].results
        wanted = tuple(compress(names, call.results))
        asked = calls.CustomCall(problem, backend, call.arguments, wanted)
        compute: Any = partial(calls.eager, asked)
        if call.own_device is None:
            arrays = calls.spread(arrays, calls.spread_over(arrays))
            compute = sharded.function_of(call.name, asked, arrays) or compute
        made = dict(zip(wanted, compute(*arrays), strict=True))
        return [made.get(name) for name in names]


def _held(array: Any) -> Any:
    """The array that `array` holds for JAX's functions, as a parameter of Flax does."""
    if not isinstance(array, jax.Array) and hasattr(type(array), "__jax_array__"):
        return array.__jax_array__()
    return array


def _is_concrete(array: Any) -> bool:
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)


def _is_traced_integer(value: Any) -> bool:
    is_scalar = isinstance(value, jax.core.Tracer) and value.shape == ()
    return is_scalar and jnp.issubdtype(value.dtype, jnp.integer)


def _of_other_types(row: Sequence[Any]) -> bool:
    return any(isinstance(one, bool) or not hasattr(one, "__index__") for one in row)


def _int32(value: Any) -> jax.Array:
    """`value`, of any integer type, or the end of the range of int32 that it is beyond."""
    least, most = LIMITS
    if not isinstance(value, jax.core.Tracer):
        return jnp.int32(min(max(index(value), least), most))
    of = jnp.iinfo(value.dtype)
    return jnp.clip(value, max(of.min, least), min(of.max, most)).astype(jnp.int32)


@cache
def _cuda_number(device: jax.Device) -> int:
    """CUDA's number for `device` in this process.

    JAX may have been told to use some devices only, and counts those.
    """
    from cupy.cuda import runtime

    with jax.ensure_compile_time_eval():
        there = jax.device_put(np.zeros(1, np.float32), device)
        return int(runtime.pointerGetAttributes(there.unsafe_buffer_pointer()).device)


ADAPTER = JaxAdapter()
