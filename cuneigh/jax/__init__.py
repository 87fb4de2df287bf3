"""The face of JAX: its arrays as arguments and results of cuneigh's functions.

Every call is a custom call of XLA, whether it is made eagerly or within a function that JAX traces:
``jax.jit``, ``jax.grad``, ``jax.vmap`` and what is made of them pass through it, XLA provides all
memory, and on a GPU kernels run on XLA's stream. There is nothing to call here: the module is
imported when the first array arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp

from cuneigh import _device
from cuneigh._arrays import (
    Launcher,
    dtype_name,
    import_cupy,
    numpy_dtype,
    refuse,
    register,
)
from cuneigh._backends import BACKENDS, choose
from cuneigh._ops.call import Call
from cuneigh._problem import RESULTS, Spec
from cuneigh.jax import _calls, _handlers


class JaxFace(Launcher):
    """JAX arrays. A place is a ``jax.Device``, or None for an array that is being traced."""

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        if not isinstance(array, jax.Array):
            refuse(call, name, array, "a jax.Array is needed")
        if not borrowed or isinstance(array, jax.core.Tracer):
            return
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

    def device(self, place: jax.Device | None) -> _device.Device | None:
        if place is None:
            return None
        if place.platform == "cpu":
            return _device.CPU
        import_cupy()
        return _device.cuda(place.local_hardware_id)

    def full(
        self, place: jax.Device | None, shape: tuple[int, ...], dtype: str, value: float
    ) -> jax.Array:
        return jnp.full(shape, value, numpy_dtype(dtype), device=place)

    def operations(self, place: jax.Device | None) -> AbstractContextManager[Any]:
        return nullcontext(jnp)

    def cast(self, array: jax.Array, dtype: str) -> jax.Array:
        return array.astype(numpy_dtype(dtype))

    def launch(self, call: Call, arrays: Sequence[jax.Array]) -> list[Any]:
        problem, backend = call.problem, call.backend
        if call.place is None and backend not in (None, *(known.NAME for known in BACKENDS)):
            choose(problem, _device.CPU, backend)  # raises now, not when the program runs
        names = RESULTS[problem.operation]
        wanted = tuple(compress(names, call.results))
        if call.place is None:
            arrays = _calls.spread(arrays, _calls.spread_over(arrays))
        asked = _calls.Call(problem, backend, call.arguments, wanted)
        made = dict(zip(wanted, _calls.eager(asked, *arrays), strict=True))
        return [made.get(name) for name in names]


_handlers.register()
register(JaxFace(), "jax", "jaxlib")
