"""The face of PyTorch: its tensors as arguments and results of cuneigh's functions.

Tensors on the CPU and on CUDA devices are borrowed through DLPack. Results come from PyTorch's
allocators, and kernels run on PyTorch's current stream. There is nothing to call here: the module
is imported when the first tensor arrives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import forward_ad

from cuneigh import _device
from cuneigh._arrays import HERE, import_cupy, numpy_dtype, refuse, register
from cuneigh._problem import Spec


class Stream(NamedTuple):
    """A stream of PyTorch in the form that CuPy takes (PyTorch before 2.9 lacks it)."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class TorchFace:
    """PyTorch tensors. A place is a ``torch.device``."""

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        if type(array) not in (torch.Tensor, torch.nn.Parameter):
            refuse(call, name, array, "a plain torch.Tensor is needed")
        if array.layout is not torch.strided or array.is_nested:
            layout = "nested" if array.is_nested else str(array.layout).removeprefix("torch.")
            raise TypeError(f"{call}: {name} is a {layout} tensor; a dense one is needed")
        if not borrowed:
            return
        if array.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{call}: {name} is on device {array.device}; cpu or cuda is needed")
        if _is_watched(array):
            raise RuntimeError(
                f"{call}: {name} takes part in automatic differentiation, through which {call} "
                f"cannot pass a gradient yet: call it under torch.no_grad() or on "
                f"{name}.detach(), and get gradients from the backward function"
            )
        if not _has_memory(array):
            raise TypeError(
                f"{call}: {name} stands for a tensor in a transformation such as "
                f"torch.func.vmap; a tensor with memory of its own is needed"
            )

    def spec(self, array: torch.Tensor) -> Spec:
        return Spec(tuple(array.shape), str(array.dtype).removeprefix("torch."))

    def place(self, array: torch.Tensor) -> torch.device:
        return array.device

    def device(self, place: torch.device) -> _device.Device:
        if place.type == "cpu":
            return _device.CPU
        import_cupy()
        return _device.cuda(place.index)

    def launching(self, place: torch.device) -> AbstractContextManager[Any]:
        return HERE if place.type == "cpu" else _current_stream(place)

    def borrow(self, array: torch.Tensor) -> Any:
        array = array.detach()
        if array.is_neg():  # a pending change of sign, which DLPack would drop
            array = array.resolve_neg()
        if array.device.type == "cuda":
            # -1: no other stream to wait for, since kernels run on PyTorch's current one.
            return import_cupy().from_dlpack(array.__dlpack__(stream=-1))
        if array.dtype is torch.bfloat16:  # which NumPy's DLPack does not have
            return np.from_dlpack(array.view(torch.int16)).view(numpy_dtype("bfloat16"))
        return np.from_dlpack(array)

    def empty(self, place: torch.device, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=place)

    def deliver(self, place: torch.device, array: torch.Tensor) -> torch.Tensor:
        return array

    def full(
        self, place: torch.device, shape: tuple[int, ...], dtype: str, value: float
    ) -> torch.Tensor:
        return torch.full(shape, value, dtype=getattr(torch, dtype), device=place)

    def operations(self, place: torch.device) -> AbstractContextManager[Any]:
        return nullcontext(torch)

    def cast(self, array: torch.Tensor, dtype: str) -> torch.Tensor:
        return array.to(getattr(torch, dtype))


@contextmanager
def _current_stream(place: torch.device) -> Iterator[None]:
    """Make `place` CuPy's current device and PyTorch's current stream there CuPy's."""
    cuda = import_cupy().cuda
    stream = Stream(torch.cuda.current_stream(place).cuda_stream)
    with cuda.Device(place.index), cuda.Stream.from_external(stream):
        yield


def _is_watched(tensor: torch.Tensor) -> bool:
    """Whether a derivative with respect to `tensor` would be lost, in reverse or forward mode."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


register(TorchFace(), "torch")
