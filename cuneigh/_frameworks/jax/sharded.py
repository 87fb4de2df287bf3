"""Calls on arrays whose types say how they are sharded, over explicit axes of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import NamedSharding

from cuneigh._frameworks.jax import calls
from cuneigh._frameworks.jax.partition import Cuttable


def function_of(
    name: str, call: calls.CustomCall, arrays: Sequence[jax.Array]
) -> Callable[..., tuple[jax.Array, ...]] | None:
    """The function of such arrays that makes `call` of the function `name`; None for other arrays.

    Every device makes a call of its own within ``jax.shard_map``, so that results have types, too.
    """
    kinds = tuple(jax.typeof(array).sharding for array in arrays)
    meshes = [kind.mesh for kind in kinds if _explicit(kind)]
    return _function(name, call, kinds, meshes[0]) if meshes else None


@lru_cache(maxsize=1024)
def _function(
    name: str, call: calls.CustomCall, kinds: tuple[Any, ...], mesh: Any
) -> Callable[..., tuple[jax.Array, ...]]:
    cuttable = Cuttable(call.problem, call.arguments, call.results)
    cut = cuttable.cut(mesh, [kind.spec if _explicit(kind) else () for kind in kinds])
    needed = [cuttable.spec(argument, cut) for argument in call.arguments]
    for argument, kind, spec in zip(call.arguments, kinds, needed, strict=True):
        if any(have not in (None, want) for have, want in zip(kind.spec, spec, strict=False)):
            raise NotImplementedError(
                f"{name}: {argument} is sharded as {kind.spec} over explicit axes of a mesh, but "
                f"this call can be cut as {spec}: along the batch and along heads, of keys too, "
                f"and alike for all arguments. jax.reshard gives others; for token axes there is "
                f"cuneigh.jax.distributed"
            )
    own = replace(call, problem=cuttable.local(mesh, cut))

    def compute(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        spread = calls.spread(arrays, calls.spread_over(arrays))
        results: tuple[jax.Array, ...] = calls.compute(own, *spread)
        return results

    mapped = jax.shard_map(
        compute,
        mesh=mesh,
        in_specs=tuple(needed),
        out_specs=tuple(cuttable.spec(result, cut) for result in call.results),
        axis_names=frozenset(mesh.explicit_axes),
    )

    def function(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        # What all devices have whole, each takes its part of.
        placed = [
            array
            if kind.mesh == mesh and kind.spec == spec
            else jax.reshard(array, NamedSharding(mesh, spec))
            for array, kind, spec in zip(arrays, kinds, needed, strict=True)
        ]
        results: tuple[jax.Array, ...] = mapped(*placed)
        return results

    # By jax.jit arrays that were put nowhere come to the mesh.
    compiled: Callable[..., tuple[jax.Array, ...]] = jax.jit(function, inline=True)
    return compiled


def _explicit(kind: Any) -> set[str]:
    """The explicit axes of a mesh along which an array of this sharding is cut."""
    return set(kind.mesh.explicit_axes).intersection(jax.tree.leaves(tuple(kind.spec)))
