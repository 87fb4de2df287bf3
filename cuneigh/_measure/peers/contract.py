"""What a peer is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuneigh._problem import Operands, Problem


class UnfitError(Exception):
    """A peer is not installed, or does not compute the problem; the message says why."""


@dataclass(frozen=True)
class Given:
    """The problem and its arrays as PyTorch tensors, heads-last, on one device."""

    problem: Problem
    query: Any
    key: Any
    value: Any
    grad_output: Any

    @property
    def on_gpu(self) -> bool:
        return bool(self.query.is_cuda)

    @property
    def sees_all(self) -> bool:
        """Whether every query sees every key, apart from a causal only axis."""
        axes = self.problem.axes
        whole = all(axis.kernel_size == axis.length and axis.stride == 1 for axis in axes)
        return whole and (len(axes) == 1 or not any(axis.is_causal for axis in axes))

    @property
    def is_plain(self) -> bool:
        """Whether windows have stride 1 and no dilation."""
        return all(axis.stride == axis.dilation == 1 for axis in self.problem.axes)

    def heads_first(self) -> tuple[Any, Any, Any]:
        """Query, key and value as [batch, heads, tokens, dim], not copied."""
        return heads_first(self.query), heads_first(self.key), heads_first(self.value)


def as_it_is(tensor: Any) -> Any:
    return tensor


@dataclass(frozen=True)
class Calls:
    """What a peer does for a problem. Outputs are heads-last like ours."""

    forward: Callable[[], Any]
    step: Callable[[], tuple[Any, Sequence[Any]]] | None
    """Forward and backward: the output and the gradients of query, key and value; None if it has
    no backward."""
    note: str = ""
    """What is not as in the problem."""
    inner: bool = False
    """Whether only queries far from the borders are to be compared."""
    restore: Callable[[Any], Any] = as_it_is
    """Brings an output or a gradient into the order of our tokens, to be compared."""


Peer = Callable[[Given], Calls]


def heads_first(tensor: Any) -> Any:
    """[batch, tokens.., heads, dim] as [batch, heads, tokens, dim]."""
    return tensor.flatten(1, -3).transpose(1, 2)


def heads_last(tensor: Any, tokens: Sequence[int]) -> Any:
    """[batch, heads, tokens, dim] as [batch, tokens.., heads, dim]."""
    return tensor.transpose(1, 2).unflatten(1, tuple(tokens))


def differentiated(given: Given, forward: Callable[..., Any]) -> Callable[[], Any]:
    """A forward of (query, key, value) with the gradients of these by PyTorch's autograd."""
    import torch

    leaves = [each.detach().requires_grad_() for each in (given.query, given.key, given.value)]

    def step() -> tuple[Any, Sequence[Any]]:
        output = forward(*leaves)
        return output.detach(), torch.autograd.grad(output, leaves, given.grad_output)

    return step


def refuse_extras(given: Given) -> None:
    """Raise for what no peer takes."""
    if given.problem.additional:
        raise UnfitError("takes no additional keys")


def given_to(problem: Problem, operands: Operands, grad_output: Any) -> Given:
    """The arrays of a problem as PyTorch's, on the same memory where they are on a GPU."""
    try:
        import torch
    except ImportError:
        raise UnfitError("PyTorch is not installed") from None
    on_gpu = not isinstance(operands.query, np.ndarray)
    if on_gpu and not torch.cuda.is_available():
        raise UnfitError("the installed PyTorch has no CUDA")

    def tensor(array: Any) -> Any:
        if on_gpu:
            return torch.from_dlpack(array)
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    query, key, value = map(tensor, operands[:3])
    return Given(problem, query, key, value, tensor(grad_output))
