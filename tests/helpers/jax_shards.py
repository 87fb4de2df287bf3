"""JAX arrays over the devices of a process: a program of its own, for `test_jax_shards`.

    python -m helpers.jax_shards PLATFORM

PLATFORM is cpu, of which there are four devices then, or cuda, for all GPUs of this machine.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cuneigh
from cuneigh.jax import distributed

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", sys.argv[1])
jax.config.update("jax_enable_x64", True)


RANDOM = np.random.default_rng(0).standard_normal
GATHERS = "all-gather", "all-to-all", "collective-permute"
CUT = P("b", None, None, "h")
"""Along batch and heads."""


def mesh_of(kind: AxisType, *axes: str) -> Any:
    count = len(jax.devices())
    sizes = (count,) if len(axes) == 1 else (count // 2, 2)
    return jax.make_mesh(sizes, axes, axis_types=(kind,) * len(axes))


def arrays_of(heads: int, kv_heads: int, *tokens: int) -> list[jax.Array]:
    shapes = (heads, 3), (kv_heads, 3), (kv_heads, 2)
    return [jnp.asarray(RANDOM((4, *tokens, *shape))) for shape in shapes]


def close(got: Any, wanted: Any) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), got, wanted)


def with_gradients(call: Any, count: int) -> Any:
    """The results of `call`, and their gradients with respect to the first `count` arguments."""

    def total(*arrays: jax.Array) -> Any:
        results = call(*arrays)
        finite = [jnp.where(jnp.isfinite(one), one, 0) for one in jax.tree.leaves(results)]
        return sum((one**2).sum() for one in finite), results

    return jax.grad(total, tuple(range(count)), has_aux=True)


def compiled(call: Any, arrays: Any, moved: tuple[str, ...] = (), calls: int = 0) -> Any:
    """The results of a compiled program, which moves arrays by nothing but `moved`.

    It makes so many `calls` of cuneigh, if that is given.
    """
    program = jax.jit(call).lower(*arrays).compile()
    text = program.as_text()
    made = text.count('custom_call_target="cuneigh"')
    assert made == (calls or made), (made, calls)
    found = {name for name in GATHERS if re.search(rf"\b{name}(-start)?\(", text)}
    assert found <= set(moved), found
    return program(*arrays)


def placed(mesh: Any, arrays: Any, specs: Any) -> list[jax.Array]:
    """By way of NumPy, for JAX compiles a program that cuts its own arrays."""
    return [
        jax.device_put(np.asarray(array), NamedSharding(mesh, spec))
        for array, spec in zip(arrays, specs, strict=True)
    ]


def batch_and_heads(kind: AxisType) -> None:
    """Nothing is gathered: forward, gradients and maps, eager and compiled."""
    mesh = mesh_of(kind, "b", "h")
    arrays = [*arrays_of(4, 2, 4, 5), jnp.asarray(RANDOM((4, 5, 5)))]
    given = placed(mesh, arrays, [CUT, CUT, CUT, P("h")])

    def call(query: Any, key: Any, value: Any, rpb: Any) -> Any:
        return cuneigh.na2d(query, key, value, 3, rpb=rpb)

    both = with_gradients(call, 4)
    gradients, output = compiled(both, given)
    cut = NamedSharding(mesh, CUT)
    assert all(one.sharding.is_equivalent_to(cut, 5) for one in (output, *gradients[:3]))
    wanted = jax.jit(both)(*arrays)
    close((gradients, output), wanted)
    if kind is AxisType.Explicit:
        close(call(*given), wanted[1])  # as it is: other programs are compiled
        return
    mapped = jax.vmap(lambda query, key, value: cuneigh.na2d(query, key, value, 3), (0, 0, None))
    twice = [jnp.stack([one, 2 * one]) for one in arrays[:2]] + arrays[2:3]
    given = placed(mesh, twice, [P(None, *CUT)] * 2 + [CUT])
    close(compiled(mapped, given), jax.jit(mapped)(*twice))


def one_key_head(kind: AxisType) -> None:
    """All devices have it; gradients are added up."""
    mesh = mesh_of(kind, "b", "h")
    arrays = arrays_of(4, 1, 4, 5)
    given = placed(mesh, arrays, [CUT, P("b"), P("b")])
    both = with_gradients(partial(cuneigh.na2d, kernel_size=3), 3)
    close(compiled(both, given), jax.jit(both)(*arrays))


def tokens_without_a_halo() -> None:
    """On Auto axes they are gathered, and results are right; on Explicit ones it is an error."""
    call, arrays = partial(cuneigh.na2d, kernel_size=3), arrays_of(4, 2, 4, 6)
    specs = [P(None, "b"), P(None, None, "h"), P()]
    close(jax.jit(call)(*placed(mesh_of(AxisType.Auto, "b", "h"), arrays, specs)), call(*arrays))
    given = placed(mesh_of(AxisType.Explicit, "b", "h"), arrays, specs)
    words = (
        r"na2d: query is sharded as P\w*\(None, 'b', None, None, None\) .* cuneigh.jax.distributed"
    )
    with pytest.raises(NotImplementedError, match=words):
        call(*given)


def halos(kind: AxisType) -> None:
    """Every border, windows that reach over several shards, and two axes at once."""
    line, square = mesh_of(kind, "x"), mesh_of(kind, "x", "y")
    for mesh, names, tokens, parameters in (
        (line, ("x",), (12,), {"kernel_size": 5, "stride": 2, "border": "shift"}),
        (line, ("x",), (8,), {"kernel_size": 4, "dilation": 2, "border": "wrap"}),
        (square, ("x", "y"), (4, 6), {"kernel_size": (3, 5), "border": ("cut", "shift")}),
    ):
        rank, spec = len(names), P(None, *names)
        arrays = [*arrays_of(2, 1, *tokens), jnp.asarray(RANDOM((4, *tokens)) > -0.5)]
        whole = (cuneigh.na1d, cuneigh.na2d)[rank - 1]
        cut = (distributed.na1d, distributed.na2d)[rank - 1]

        def on_one(query, key, value, key_mask, of=whole, with_=parameters):
            return of(query, key, value, **with_, key_mask=key_mask, return_lse=True)

        mapped = jax.shard_map(
            partial(on_one, of=partial(cut, axis_names=names), with_=parameters),
            mesh=mesh,
            in_specs=(spec,) * 4,
            out_specs=(spec,) * 2,
        )
        given = placed(mesh, arrays, [spec] * 4)
        got, wanted = with_gradients(mapped, 3), with_gradients(on_one, 3)
        # One program for all devices, with one call forward and one back
        made = compiled(got, given, ("collective-permute",), calls=2)
        close(made, jax.jit(wanted)(*arrays))


def left_behind() -> None:
    """What nobody waits for before the process ends, which must not wait without end."""
    mesh, spec = mesh_of(AxisType.Auto, "x"), P(None, "x")
    call = partial(distributed.na1d, kernel_size=3, axis_names=("x",))
    mapped = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))
    arrays = placed(mesh, arrays_of(2, 2, 12), [spec] * 3)
    for _ in range(20):
        mapped(*arrays)


def of_second_order() -> None:
    """Of what varies along an axis of a mesh."""
    mesh, spec = mesh_of(AxisType.Auto, "x"), P(None, "x")
    call = partial(distributed.na1d, kernel_size=4, axis_names=("x",))
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)

    def steep(of: Any, *arrays: jax.Array) -> jax.Array:
        return sum((one**2).sum() for one in with_gradients(of, 2)(*arrays)[0])

    arrays = arrays_of(1, 1, 12)
    got, wanted = (
        jax.jit(jax.grad(partial(steep, of), (0, 2)))
        for of in (mapped, partial(cuneigh.na1d, kernel_size=4))
    )
    close(got(*placed(mesh, arrays, [spec] * 3)), wanted(*arrays))
    with pytest.raises(ValueError, match="na1d: key has size 12 on axis 1, but query has 3"):
        jax.shard_map(call, mesh=mesh, in_specs=(spec, P(), P()), out_specs=spec)(*arrays)
    with pytest.raises(ValueError, match="na1d: axis_names='xy' has no entry for each of the 1"):
        distributed.na1d(*arrays, 3, axis_names="xy")


def traced_starts(kind: AxisType) -> None:
    """Parts that start where a program says, on arrays that are cut along batch and heads."""
    mesh = mesh_of(kind, "b", "h")
    arrays = arrays_of(4, 2, 4, 12)
    given = placed(mesh, arrays, [CUT] * 3)

    def call(query: Any, key: Any, value: Any, start: Any = 0) -> Any:
        query = lax.dynamic_slice_in_dim(query, start, 5, 2)
        return cuneigh.na2d(query, key, value, 3, layout=(4, 12), query_start=(0, start))

    whole = cuneigh.na2d(*arrays, 3)
    close(compiled(call, (*given, 3), calls=1), whole[:, :, 3:8])


def nothing_to_send() -> None:
    """Windows that don't cross borders of shards."""
    mesh, spec = mesh_of(AxisType.Auto, "x"), P(None, "x")
    call = partial(distributed.na1d, kernel_size=3, stride=3, axis_names=("x",))
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    arrays = arrays_of(2, 2, 12)
    got = compiled(mapped, placed(mesh, arrays, [spec] * 3))
    close(got, cuneigh.na1d(*arrays, 3, stride=3))


if __name__ == "__main__":
    for kind in (AxisType.Auto, AxisType.Explicit):
        batch_and_heads(kind)
    one_key_head(AxisType.Auto)
    if jax.default_backend() == "cpu":  # where four devices are sure
        tokens_without_a_halo()
    halos(AxisType.Auto)
    for kind in (AxisType.Auto, AxisType.Explicit):
        traced_starts(kind)
    nothing_to_send()
    if jax.default_backend() == "cpu":
        of_second_order()
    left_behind()
