"""JAX arrays as arguments and results. Every call is a custom call of XLA, traced or not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp

from cuneigh import _device
from cuneigh._backends import BACKENDS, choose
from cuneigh._call import Call
from cuneigh._frameworks.contract import Adapter, dtype_name, import_cupy, numpy_dtype, refuse
from cuneigh._frameworks.jax import calls
from cuneigh._problem import ARRAYS, Spec


class JaxAdapter(Adapter):
    """JAX arrays. The own device is a ``jax.Device``, or None for an array that is traced."""

    launches = True

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

    def own_device(self, array: jax.Array) -> jax.Device | None:
        if isinstance(array, jax.core.Tracer) or len(array.devices()) != 1:
            return None
        return next(iter(array.devices()))

    def device(self, own: jax.Device | None) -> _device.Device | None:
        if own is None:
            return None
        if own.platform == "cpu":
            return _device.CPU
        import_cupy()
        return _device.cuda(own.local_hardware_id)

    def full(
        self, own: jax.Device | None, shape: tuple[int, ...], dtype: str, value: float
    ) -> jax.Array:
        return jnp.full(shape, value, numpy_dtype(dtype), device=own)

    def operations(self, own: jax.Device | None) -> AbstractContextManager[Any]:
        return nullcontext(jnp)

    def cast(self, array: jax.Array, dtype: str) -> jax.Array:
        return array.astype(numpy_dtype(dtype))

    def launch(self, call: Call, arrays: Sequence[jax.Array]) -> list[Any]:
        problem, backend = call.problem, call.backend
        if call.own_device is None and backend not in (None, *(known.NAME for known in BACKENDS)):
            choose(problem, _device.CPU, backend)  # raises now, not when the program runs
        names = ARRAYS[problem.operation].results
        wanted = tuple(compress(names, call.results))
        if call.own_device is None:
            arrays = calls.spread(arrays, calls.spread_over(arrays))
        asked = calls.CustomCall(problem, backend, call.arguments, wanted)
        made = dict(zip(wanted, calls.eager(asked, *arrays), strict=True))
        return [made.get(name) for name in names]


ADAPTER = JaxAdapter()
