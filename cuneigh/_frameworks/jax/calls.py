"""Calls as JAX sees them: functions of arrays that it can compile, differentiate and batch.

`compute` is what everything else builds on. ``jax.jit`` makes one custom call of it, which has the
whole `CustomCall` as an attribute, so that a compiled program means the same in another process.
``jax.vmap`` makes of it one larger operation, and derivatives what `derivatives` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import compress
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax._src import dispatch
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from cuneigh._call import of_nothing
from cuneigh._frameworks.contract import numpy_dtype
from cuneigh._frameworks.jax.partition import Cuttable, partitioned
from cuneigh._problem import ARRAYS, STARTS, Problem, of_what
from cuneigh._window import Axis

TARGET = "cuneigh"
"""The name by which XLA knows the handler of every call."""


@dataclass(frozen=True)
class CustomCall:
    """One call of a public function, apart from the numbers in its arrays."""

    problem: Problem
    backend: str | None
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    """Those that are wanted, in the order of `ARRAYS`."""
    hidden_is_zero: bool = False
    """Whether hidden slots of the logits hold 0, so that a call is linear in its query."""
    follows: bool = False
    """As `Call.follows` of ``cuneigh._call``."""

    def encoded(self) -> str:
        """The call as text, which JAX keeps in an exported program.

        Sizes that are symbols there are strings. What is written here must always stay readable:
        new fields of a `Problem` need a default.
        """
        assert not self.hidden_is_zero, "XLA does that itself"
        told = _fields(self)
        del told["hidden_is_zero"], told["follows"]
        problem = _fields(self.problem)
        problem["axes"] = [_fields(axis) for axis in self.problem.axes]
        return json.dumps({**told, "problem": problem}, default=str)

    @staticmethod
    def decoded(text: bytes | str, shapes: Sequence[tuple[int, ...]] = ()) -> CustomCall | None:
        """The call that was encoded; None if it has symbols, and no `shapes` of its arguments."""
        told = json.loads(text)
        problem, arguments = told["problem"], tuple(told["arguments"])
        if any(isinstance(size, str) for size in _sizes(problem)):
            if not shapes:
                return None
            _measure(problem, dict(zip(arguments, shapes, strict=True)))
        axes = tuple(Axis(**axis) for axis in problem["axes"])
        return CustomCall(
            Problem(**{**problem, "axes": axes}),
            told["backend"],
            arguments,
            tuple(told["results"]),
        )


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


SIZES = ("batch", "heads", "kv_heads", "head_dim", "value_dim", "additional")


def _sizes(problem: dict[str, Any]) -> list[Any]:
    """The fields of a problem that may be symbols."""
    return [problem[name] for name in SIZES] + [
        size for axis in problem["axes"] for name, size in axis.items() if name != "border"
    ]


def _measure(problem: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Put the sizes of the arguments into `problem` where there are symbols."""
    queries = shapes.get("query") or shapes["weights"]
    keys = shapes.get("key") or shapes["value"]
    extra = shapes.get("additional_keys") or shapes.get("additional_values") or (0, None)
    found: dict[str, int | None] = {"batch": queries[0], "heads": queries[-2], "kv_heads": keys[-2]}
    found |= {"head_dim": queries[-1], "additional": extra[1]}
    if "value" in shapes:
        found["value_dim"] = shapes["value"][-1]
    problem |= {name: size for name, size in found.items() if isinstance(problem[name], str)}
    lengths = zip(problem["axes"], queries[1:-2], keys[1:-2], strict=True)
    for axis, length, key_length in lengths:
        # The window is a symbol only where it is all keys.
        of_axis = {"length": length, "key_length": key_length, "kernel_size": max(key_length, 1)}
        if isinstance(axis["layout"], str) and axis["layout"] != axis["key_length"]:
            raise ValueError(f"cuneigh: layout={axis['layout']} is not known; pass a number")
        of_axis["layout"] = key_length
        axis |= {name: size for name, size in of_axis.items() if isinstance(axis[name], str)}


def compute(call: CustomCall, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The results of `call` for its arguments."""
    # Those that vary along an axis of a mesh, and those that do not, go into one call.
    return tuple(primitive.bind(*spread(arrays, spread_over(arrays)), call=call))


eager = partial(jax.jit, static_argnums=0, inline=True)(compute)
"""`compute` as one compiled program, which JAX finds again faster than it runs one step by step."""

primitive = Primitive("cuneigh")
"""A call. What JAX makes of it, `derivatives` says, and the rules below."""
primitive.multiple_results = True
primitive.def_impl(lambda *arrays, call: eager(call, *arrays))


def types(*arrays: Any, call: CustomCall) -> list[Any]:
    """The types of the results, which vary along the axes of a mesh as the arguments do."""
    axes = spread_over(arrays)
    types = []
    for spec in map(call.problem.spec, call.results):
        kind = jax.core.ShapedArray(spec.shape, numpy_dtype(spec.dtype))
        if axes:
            like = arrays[0]
            sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*[None] * len(spec.shape)))
            manual = "manual_axis_type" if hasattr(like, "manual_axis_type") else "vma"
            kind = kind.update(sharding=sharding, **{manual: getattr(like, manual)})
        types.append(kind)
    return types


primitive.def_abstract_eval(types)


def _launched(*arrays: jax.Array, call: CustomCall) -> list[jax.Array]:
    """The custom call that XLA compiles, with what the operation takes of the arguments."""
    names = *ARRAYS[call.problem.operation].arguments, STARTS
    taken = [name in names for name in call.arguments]
    arrays, call = (
        tuple(compress(arrays, taken)),
        replace(call, arguments=tuple(compress(call.arguments, taken))),
    )
    for name, array in zip(call.arguments, arrays, strict=True):
        needed = numpy_dtype(call.problem.spec(name).dtype)
        if array.dtype != needed:
            raise TypeError(
                f"cuneigh: {name} has dtype {needed}, of which JAX makes {array.dtype} "
                f"unless jax_enable_x64 is set"
            )
    results = [
        jax.ShapeDtypeStruct(spec.shape, numpy_dtype(spec.dtype))
        for spec in map(call.problem.spec, call.results)
    ]
    if call.problem.is_empty:
        return _of_nothing(call, results)
    text = replace(call, hidden_is_zero=False).encoded()
    made: list[jax.Array] = jax.ffi.ffi_call(TARGET, results)(*arrays, call=text)
    if call.hidden_is_zero:
        made = [jnp.where(array == -jnp.inf, 0, array) for array in made]
    return made


def _cut(*arrays: jax.Array, call: CustomCall) -> list[jax.Array]:
    """`_launched`, which XLA cuts over the devices of a mesh."""
    sizes = [getattr(call.problem, name) for name in SIZES]
    if not all(size is None or isinstance(size, int) for size in sizes):
        return _launched(*arrays, call=call)
    cuttable = Cuttable(call.problem, call.arguments, call.results)

    def launch(problem: Problem) -> Any:
        return partial(_launched, call=replace(call, problem=problem))

    return list(partitioned(cuttable, launch)(*arrays))


def _lowered(context: Any, *arrays: Any, call: CustomCall) -> Any:
    # Within jax.shard_map arrays are those of one device already.
    manual = getattr(context.module_context.axis_context, "manual_axes", None)
    function = _launched if manual else _cut
    return mlir.lower_fun(function, multiple_results=True)(context, *arrays, call=call)


mlir.register_lowering(primitive, _lowered)
# As what it is lowered to, custom_partitioning, which asks for them.
dispatch.prim_requires_devices_during_lowering.add(primitive)


def _mapped(arrays: Sequence[Any], axes: Sequence[Any], *, call: CustomCall) -> Any:
    """The rule for ``jax.vmap``: many calls are one with a larger batch, or more heads."""
    batched = [isinstance(axis, int) for axis in axes]
    pairs = list(zip(arrays, axes, batched, strict=True))
    (size, *_) = (array.shape[axis] for array, axis, is_batched in pairs if is_batched)
    into = _folded_axis(call, batched)
    named = dict(zip(call.arguments, batched, strict=True))
    if named.get(STARTS) or (into == "heads" and named.get("key_mask")):
        # All entries of a batch share starts, and all heads a mask: it is one call after another.
        moved = [jnp.moveaxis(array, axis, 0) for array, axis, own in pairs if own]

        def one(own: Sequence[Any]) -> tuple[jax.Array, ...]:
            rest = iter(own)
            return compute(call, *(next(rest) if own else array for array, _, own in pairs))

        made = jax.lax.map(one, moved)
        return made, [0] * len(made)
    folded = [
        _fold(
            jnp.moveaxis(array, axis, 0) if is_batched else array,
            _axis(name, into),
            size,
            is_batched,
            into,
        )
        for name, (array, axis, is_batched) in zip(call.arguments, pairs, strict=True)
    ]
    made = compute(_enlarged(call, into, size), *folded)
    unfolded = [
        _unfold(array, _axis(name, into), size, call.problem.spec(name).shape, into)
        for name, array in zip(call.results, made, strict=True)
    ]
    return unfolded, [0] * len(unfolded)


batching.primitive_batchers[primitive] = _mapped


def _of_nothing(call: CustomCall, results: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """The results of a map over nothing: those of no keys at all."""
    return [
        jnp.full(result.shape, of_nothing(name), result.dtype)
        for name, result in zip(call.results, results, strict=True)
    ]


def spread_over(arrays: Iterable[jax.Array]) -> frozenset[str]:
    """The mesh axes of ``jax.shard_map`` along which some of `arrays` vary."""
    axes: frozenset[str] = frozenset()
    for array in arrays:
        kind = array if isinstance(array, jax.core.ShapedArray) else jax.typeof(array)
        manual = getattr(kind, "manual_axis_type", None)
        axes |= kind.vma if manual is None else manual.varying  # JAX before and after 0.10
    return axes


def spread(arrays: Iterable[jax.Array], axes: frozenset[str]) -> tuple[jax.Array, ...]:
    """`arrays`, which JAX is told vary along all of `axes`; gradients are summed over the new."""
    if not axes:
        return tuple(arrays)
    return tuple(
        jax.lax.pcast(array, tuple(axes - spread_over([array])), to="varying") for array in arrays
    )


Fold = Literal["batch", "heads"]
"""The axis that takes up the one that is mapped over."""


def _folded_axis(call: CustomCall, batched: Any) -> Fold:
    """Where the mapped axis goes: to the batch, which takes it up without moving anything.

    But a bias is shared by the whole batch, and its gradient is a sum over the batch: where each of
    the mapped calls has its own, the axis goes to the heads.
    """
    if "rpb" not in call.arguments:
        return "batch"
    named = dict(zip(call.arguments, batched, strict=True))
    own_bias = named["rpb"] or named.get("tangent_rpb") or "rpb" in call.results
    return "heads" if own_bias else "batch"


def _enlarged(call: CustomCall, into: Fold, size: int) -> CustomCall:
    """`size` calls like `call` as one."""
    problem = call.problem
    if into == "batch":
        larger = replace(problem, batch=problem.batch * size)
    else:
        # Heads that share a key head stay neighbors: h + H * i reads key head h // g + H_kv * i.
        larger = replace(problem, heads=problem.heads * size, kv_heads=problem.kv_heads * size)
    return replace(call, problem=larger)


def _axis(name: str, into: Fold) -> int | None:
    """The position, in an array without the mapped axis, of the axis that takes it up."""
    if name == STARTS:
        return None
    if of_what(name) == "rpb":
        return 0 if into == "heads" else None
    if into == "batch":
        return 0
    if name == "key_mask":  # it is that of all heads
        return None
    return -1 if of_what(name) == "lse" else -2


def _fold(array: jax.Array, axis: int | None, size: int, is_batched: bool, into: Fold) -> jax.Array:
    """`array` with its first axis, if it has the mapped one there, merged into `axis`.

    It goes behind the batch, so that one that is cut over devices stays cut.
    """
    if axis is None:
        return array
    if not is_batched:
        array = jnp.broadcast_to(array, (size, *array.shape))
    axis %= array.ndim - 1
    array = jnp.moveaxis(array, 0, axis + (into == "batch"))
    before, (outer, inner), after = (
        array.shape[:axis],
        array.shape[axis : axis + 2],
        array.shape[axis + 2 :],
    )
    return array.reshape(*before, outer * inner, *after)


def _unfold(
    array: jax.Array, axis: int | None, size: int, of_one: tuple[int, ...], into: Fold
) -> jax.Array:
    """The opposite of `_fold`, with the shape of one of the mapped arrays."""
    assert axis is not None, "a bias that stays as it is has no gradient among the results"
    at = axis % array.ndim + (into == "batch")
    return jnp.moveaxis(array.reshape(*of_one[:at], size, *of_one[at:]), at, 0)
