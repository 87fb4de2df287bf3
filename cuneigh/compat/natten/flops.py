"""``natten.flops``: counts for fvcore, which are multiply-adds, and counts from shapes.

The counts are NATTEN's: of the two products, and in 0.14 and 0.15 of adding a bias to the logits,
whether there is one or not. PyTorch's own ``torch.utils.flop_counter.FlopCounterMode`` counts
cuneigh's operators without any of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cuneigh._parameters import Window
from cuneigh._problem import ARRAYS, Operation, Spec
from cuneigh._validate import problem_of
from cuneigh.compat.natten._switch import chosen

__all__ = [
    *("add_natten_handle", "av_1d_flop", "av_2d_flop", "av_3d_flop", "av_flop"),
    *("fna_flop_count", "get_flops", "na_av_flop_count", "na_qk_flop_count"),
    *("qk_1d_rpb_flop", "qk_2d_rpb_flop", "qk_3d_rpb_flop", "qk_rpb_flop"),
]


# From shapes, 0.17


def fna_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Floating point operations, or multiply-adds, of `na2d` and its kin."""
    _require_alike("fna_flop_count", q_shape=q_shape, k_shape=k_shape, v_shape=v_shape)
    return 2 * _product("fna_flop_count", q_shape, kernel_size, return_macs)


def na_qk_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Floating point operations, or multiply-adds, of `na2d_qk` and its kin."""
    _require_alike("na_qk_flop_count", q_shape=q_shape, k_shape=k_shape)
    return _product("na_qk_flop_count", q_shape, kernel_size, return_macs)


def na_av_flop_count(
    a_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Floating point operations, or multiply-adds, of `na2d_av` and its kin."""
    return _product("na_av_flop_count", v_shape, kernel_size, return_macs)


def _product(
    call: str, shape: Sequence[int], kernel_size: int | Sequence[int], return_macs: bool
) -> int:
    """Of each token of `shape`, in each head, with the keys of a window."""
    rank = len(shape) - 3
    if rank not in (1, 2, 3):
        raise ValueError(f"natten.flops.{call}: a shape of 4, 5 or 6 axes is needed, not {shape}")
    sizes = (kernel_size,) * rank if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(sizes) != rank:
        raise ValueError(
            f"natten.flops.{call}: kernel_size={kernel_size!r} has {len(sizes)} entries, but there "
            f"are {rank} token axes"
        )
    return math.prod(shape) * math.prod(sizes) * (1 if return_macs else 2)


def _require_alike(call: str, **shapes: Sequence[int]) -> None:
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        told = ", ".join(f"{name}={tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"natten.flops.{call}: shapes that are alike are needed, not {told}")


# From values in a graph of torch.jit, which fvcore hands over; heads-first, up to 0.15


def _shape(value: Any) -> list[int]:
    sizes: list[int] | None = value.type().sizes()
    if sizes is None:  # as of what unbind and split return
        raise ValueError(f"natten.flops: the graph does not tell the shape of {value.debugName()}")
    return sizes


def _named(name: str, rank: int, count: Callable[[Any, Any], int]) -> Callable[..., int]:
    def flop(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        for value in (*inputs[:2], *outputs[:1]):
            if len(_shape(value)) != rank + 3:
                raise ValueError(
                    f"natten.flops.{name}: tensors of {rank + 3} axes are needed, not of shape "
                    f"{_shape(value)}"
                )
        return count(inputs, outputs)

    flop.__name__ = flop.__qualname__ = name
    return flop


def _qk_and_bias(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    query, logits = _shape(inputs[0]), _shape(outputs[0])
    return math.prod(query) * logits[-1] + math.prod(logits)


def _av(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    return math.prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


qk_rpb_flop, av_flop = _named("qk_rpb_flop", 2, _qk_and_bias), _named("av_flop", 2, _av)
qk_1d_rpb_flop, qk_2d_rpb_flop, qk_3d_rpb_flop = (
    _named(f"qk_{rank}d_rpb_flop", rank, _qk_and_bias) for rank in (1, 2, 3)
)
av_1d_flop, av_2d_flop, av_3d_flop = (_named(f"av_{rank}d_flop", rank, _av) for rank in (1, 2, 3))


# cuneigh's operators in such a graph


def _count(operation: Operation, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """The multiply-adds of an operator, given the values that its node takes."""
    names = ARRAYS[operation].arguments
    window = Window(*(tuple(_constant(value)) for value in inputs[len(names) :][:4]))
    specs = {
        name: Spec(tuple(_shape(value)), "float32")  # every dtype has as many
        for name, value in zip(names, inputs, strict=False)
        if value.type().kind() == "TensorType" and name != "rpb"
    }
    problem = problem_of(f"cuneigh::{operation}", operation, specs, window, None)
    logits = math.prod(problem.logits.shape)
    dims = {"forward": problem.head_dim + problem.value_dim, "qk": problem.head_dim}
    has_bias = operation != "av" and chosen() in ("0.14", "0.15")
    macs: int = logits * (dims.get(operation, problem.value_dim) + has_bias)
    return macs


def _constant(value: Any) -> Any:
    """A number or a list of numbers in a graph."""
    if value.node().kind() == "prim::ListConstruct":
        return [_constant(each) for each in value.node().inputs()]
    return value.toIValue()


def add_natten_handle(flop_ctr: Any) -> Any:
    """Let a ``fvcore.nn.FlopCountAnalysis`` count neighborhood attention."""
    operations: tuple[Operation, ...] = ("forward", "qk", "av")
    for operation in operations:
        flop_ctr.set_op_handle(f"cuneigh::{operation}", partial(_count, operation))
    return flop_ctr


def get_flops(model: Any, input: Any, disable_warnings: bool = False) -> int:
    """The multiply-adds of ``model(input)``, counted by fvcore, which must be installed."""
    from fvcore.nn import FlopCountAnalysis

    counter = add_natten_handle(FlopCountAnalysis(model, input))
    if disable_warnings:
        counter = counter.unsupported_ops_warnings(False)
    total: int = counter.total()
    return total
