"""How a call is cut over the devices of a mesh: along its batch and its heads, and nowhere else.

Batch entries and groups of heads don't meet, so that each device computes those that it has and
nothing is gathered. The token axes, head_dim and slots of a call must be whole on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import NamedSharding, PartitionSpec

from cuneigh._problem import STARTS, Problem, of_what

Function = Callable[..., Sequence[jax.Array]]
"""From the arguments of a call to its results."""

Axes = tuple[str, ...]
"""Of a mesh."""


class Cut(NamedTuple):
    """The axes of a mesh along which a call is cut."""

    batch: Axes = ()
    heads: Axes = ()


def parts(name: str, ndim: int) -> tuple[str | None, ...]:
    """What of a call is cut along each axis of one of its arrays: "batch", "heads" or nothing."""
    name = of_what(name)
    found: list[str | None] = [None] * ndim
    if name == STARTS:
        return tuple(found)
    if name == "rpb":
        found[0] = "heads"
        return tuple(found)
    found[0] = "batch"
    if name != "key_mask":
        found[-1 if name == "lse" else -2] = "heads"
    return tuple(found)


class Cuttable(NamedTuple):
    """A call, by the names of its arrays."""

    problem: Problem
    arguments: tuple[str, ...]
    results: tuple[str, ...]

    @property
    def shares_keys(self) -> bool:
        """Whether there is one head of keys, which every device has that has heads of queries."""
        return self.problem.kv_heads == 1 < self.problem.heads

    def spec(self, name: str, cut: Cut) -> PartitionSpec:
        """How one of the arrays is cut."""
        axes = {None: None, "batch": cut.batch or None, "heads": cut.heads or None}
        return PartitionSpec(*(axes[part] for part in self._parts(name)))

    def _parts(self, name: str) -> tuple[str | None, ...]:
        """What is cut along each axis of one of the arrays: "batch", "heads" or nothing."""
        of = parts(name, len(self.problem.spec(name).shape))
        if self.shares_keys and of_what(name) in OF_KEYS:
            return tuple(None if part == "heads" else part for part in of)
        return of

    def cut(self, mesh: Any, specs: Sequence[Any]) -> Cut:
        """How to cut it where the arguments are cut so: as the first that is cut at all."""
        heads = self.problem.heads if self.shares_keys else self.problem.kv_heads
        for name, spec in zip(self.arguments, specs, strict=True):
            found: dict[str, Axes] = {}
            for part, axes in zip(self._parts(name), spec, strict=False):
                if part is not None and axes is not None:
                    found[part] = (axes,) if isinstance(axes, str) else tuple(axes)
            cut = Cut(
                _dividing(mesh, found.get("batch", ()), self.problem.batch),
                _dividing(mesh, found.get("heads", ()), heads),
            )
            if cut != Cut():
                return cut
        return Cut()

    def local(self, mesh: Any, cut: Cut) -> Problem:
        """What each device computes."""
        by = _count(mesh, cut.heads)
        return replace(
            self.problem,
            batch=self.problem.batch // _count(mesh, cut.batch),
            heads=self.problem.heads // by,
            kv_heads=1 if self.shares_keys else self.problem.kv_heads // by,
        )

    def summed_over(self, name: str, cut: Cut) -> Axes:
        """The axes of the mesh along which each device has but a term of a result."""
        if name == "rpb":
            return cut.batch
        return cut.heads if self.shares_keys and of_what(name) in OF_KEYS else ()

    def rule(self) -> SdyShardingRule:
        """What Shardy is told: which axes of arguments and results are the same, and cut alike."""
        group, mappings = self.problem.group_size, []
        is_grouped = group > 1 and not self.shares_keys
        whole: list[str] = []
        for names in (self.arguments, self.results):
            of_side = []
            for name in names:
                factors: list[str | CompoundFactor] = []
                for part in self._parts(name):
                    if part is None:
                        whole.append(f"whole{len(whole)}")
                        factors.append(whole[-1])
                    elif part == "heads" and is_grouped and of_what(name) not in OF_KEYS:
                        factors.append(CompoundFactor(part, "group"))
                    else:
                        factors.append(part)
                of_side.append(ArrayMapping(*factors))
            mappings.append(tuple(of_side))
        sizes = {"group": group} if is_grouped else {}
        return SdyShardingRule(*mappings, need_replication_factors=tuple(whole), **sizes)


OF_KEYS = "key", "value", "additional_keys", "additional_values"
"""The arrays, and gradients, with the heads of keys."""


def _dividing(mesh: Any, axes: Axes, size: int) -> Axes:
    """The first of some axes of a mesh, as far as they cut `size` evenly."""
    for count in range(len(axes), 0, -1):
        if size % _count(mesh, axes[:count]) == 0:
            return axes[:count]
    return ()


def _count(mesh: Any, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def partitioned(call: Cuttable, launch: Callable[[Problem], Function]) -> Function:
    """The function of arrays that makes `call`, which XLA cuts along batch and heads.

    `launch` gives that which computes a problem on one device.
    """

    def shardings(mesh: Any, cut: Cut, names: Sequence[str]) -> tuple[NamedSharding, ...]:
        return tuple(NamedSharding(mesh, call.spec(name, cut)) for name in names)

    def cut_by(mesh: Any, arguments: Sequence[Any]) -> Cut:
        given = [argument.sharding for argument in arguments]
        return call.cut(mesh, [one.spec if isinstance(one, NamedSharding) else () for one in given])

    def infer(mesh: Any, arguments: Sequence[Any], results: Sequence[Any]) -> Any:
        return shardings(mesh, cut_by(mesh, arguments), call.results)

    def partition(mesh: Any, arguments: Sequence[Any], results: Sequence[Any]) -> Any:
        cut = cut_by(mesh, arguments)
        compute = launch(call.local(mesh, cut))

        def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            made = []
            for name, array in zip(call.results, compute(*arrays), strict=True):
                axes = call.summed_over(name, cut)
                made.append(jax.lax.psum(array, axes) if axes else array)
            return tuple(made)

        return mesh, run, shardings(mesh, cut, call.results), shardings(mesh, cut, call.arguments)

    compute = launch(call.problem)
    whole = custom_partitioning(lambda *arrays: tuple(compute(*arrays)))
    whole.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=call.rule())
    function: Function = whole
    return function
