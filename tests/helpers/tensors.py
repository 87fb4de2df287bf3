"""What the tests of PyTorch share: tensors, a call that takes every array, and its gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

import cuneigh

torch = pytest.importorskip("torch")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = (2, 6, 5, 4, 8)


def tensors(count: int = 3, device: str = "cpu", dtype: Any = torch.float64) -> list[Any]:
    """Different normally distributed leaves that require a gradient."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [tensor.to(device, dtype).requires_grad_() for tensor in made]


def everything(device: str = "cpu", dtype: Any = torch.float64) -> dict[str, Any]:
    """Every array that na2d takes, small enough for finite differences."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (2, 4, 5, 2, 3),
        "key": (2, 4, 5, 1, 3),
        "value": (2, 4, 5, 1, 2),
        "additional_keys": (2, 2, 1, 3),
        "additional_values": (2, 2, 1, 2),
        "rpb": (2, 5, 3),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }


WINDOW = {"kernel_size": (3, 2), "dilation": (1, 2)}


def whole(*given: Any) -> tuple[Any, Any]:
    """Output and lse of `everything`, by position."""
    names = ("query", "key", "value", "additional_keys", "additional_values", "rpb")
    return cuneigh.na2d(**dict(zip(names, given, strict=True)), **WINDOW, return_lse=True)


def loss(*given: Any) -> Any:
    """A scalar in which every element of output and lse counts, and not linearly."""
    output, lse = whole(*given)
    return (output**2).sum() + lse.sin().sum()


def fresh(given: Any) -> list[Any]:
    return [tensor.detach().clone().requires_grad_() for tensor in given]


def gradients(function: Callable[..., Any], given: Any) -> list[Any]:
    leaves = fresh(given)
    return list(torch.autograd.grad(function(*leaves), leaves))


def assert_equal(got: Any, wanted: Any) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def step(query: Any, key: Any, value: Any) -> list[Any]:
    """Output and gradients of one step of training."""
    output = cuneigh.na2d(query, key, value, 3)
    return [output, *torch.autograd.grad(output.square().sum(), (query, key, value))]


@pytest.fixture
def no_compiled_code():
    """Nothing that torch.compile has compiled is left, before the test and after it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the first import
        torch._dynamo.reset()
    yield
    torch._dynamo.reset()
