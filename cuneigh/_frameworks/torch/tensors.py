"""Tensors as arguments and results: their shapes, devices and memory.

Results come from PyTorch's allocators, and kernels run on PyTorch's current stream. Nothing here
differentiates or traces; `adapter` adds that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from cuneigh import _device
from cuneigh._frameworks.contract import (
    Adapter,
    Memory,
    NoMemoryError,
    host_array,
    import_cupy,
    numpy_dtype,
    refuse,
    type_name,
)
from cuneigh._gpu.arrays import contiguous
from cuneigh._problem import DTYPES, Spec

DEVICES = "cpu", "cuda"
PLAIN = frozenset([torch.Tensor, torch.nn.Parameter])
TRACED = frozenset([FakeTensor, FunctionalTensor])
"""Tensors without numbers, by which PyTorch finds out what a program does."""

TORCH_DTYPES = {name: getattr(torch, name) for name in (*DTYPES, "bool")}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


LOW = 1 << 40
"""Few tensors have an address below this; those without memory have the offset in their storage."""


def _zeros(array: torch.Tensor) -> torch.Tensor:
    """The zeros that a tensor without memory stands for, as tangents in forward mode may do."""
    return torch.zeros(array.shape, dtype=array.dtype, device=array.device)


def is_freed(array: torch.Tensor) -> bool:
    """Whether the tensor lacks memory, as after ``untyped_storage().resize_(0)``."""
    if torch._C._get_tracing_state() is not None:  # then sizes are tensors
        return False
    if array.numel() == 0 or array._is_zerotensor():
        return False
    last = array.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(array.shape, array.stride(), strict=True)
    )
    try:
        return bool(array.untyped_storage().nbytes() < (last + 1) * array.itemsize)
    except (NotImplementedError, RuntimeError):  # a transformation's, without a storage of its own
        return False


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Any:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# What the programs of torch.compile allocate with on the current device, at half the cost.
_empty_on_gpu: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided)


class TensorAdapter(Adapter):
    """PyTorch tensors. The own device is a ``torch.device``."""

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        if type(array) not in PLAIN and type(array) not in TRACED:
            _check_subclass(call, name, array)
        if array.layout is not torch.strided or array.is_nested:
            layout = "nested" if array.is_nested else str(array.layout).removeprefix("torch.")
            raise TypeError(f"{call}: {name} is a {layout} tensor; a dense one is needed")
        if borrowed and array.device.type not in (*DEVICES, "meta"):
            raise ValueError(f"{call}: {name} is on device {array.device}; cpu or cuda is needed")
        if borrowed and type(array) in PLAIN and is_freed(array):
            raise ValueError(
                f"{call}: {name} reaches beyond its storage, which has "
                f"{array.untyped_storage().nbytes()} bytes: it was freed or made smaller"
            )

    def spec(self, array: torch.Tensor) -> Spec:
        shape = tuple(array.shape) if torch._C._get_tracing_state() is None else _numbers(array)
        return Spec(shape, DTYPE_NAMES.get(array.dtype) or str(array.dtype).removeprefix("torch."))

    def own_device(self, array: torch.Tensor) -> torch.device:
        return array.device

    def device(self, own: torch.device) -> _device.Device:
        if own.type == "cpu":
            return _device.CPU
        import_cupy()
        return _device.cuda(own.index)

    def full(
        self, own: torch.device, shape: tuple[int, ...], dtype: str, value: float
    ) -> torch.Tensor:
        return torch.full(shape, value, dtype=TORCH_DTYPES[dtype], device=own)

    def operations(self, own: torch.device) -> AbstractContextManager[Any]:
        return nullcontext(torch)

    def cast(self, array: torch.Tensor, dtype: str) -> torch.Tensor:
        return array.to(TORCH_DTYPES[dtype])

    def empty(self, own: torch.device, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=own)

    def borrow(self, array: torch.Tensor) -> npt.NDArray[Any]:
        if array._is_zerotensor():
            array = _zeros(array)
        if is_freed(array):
            raise NoMemoryError
        # By its address: `Tensor.numpy` would make it impossible to resize the storage for good.
        array = array.resolve_neg()
        dtype = numpy_dtype(DTYPE_NAMES[array.dtype])
        shape, strides = tuple(array.shape), array.stride()
        return host_array(array, array.data_ptr(), shape, strides, dtype, writeable=True)

    def threads(self) -> int:
        return torch.get_num_threads()  # type: ignore[no-any-return]

    def memory(self, arrays: Sequence[torch.Tensor]) -> Memory:
        addresses, layouts, owners = [], [], []
        for array in arrays:
            if array.is_neg():  # a pending change of sign, which nobody else can see
                array = array.resolve_neg()
            address = array.data_ptr()
            if address < LOW:
                if array._is_zerotensor():
                    array = _zeros(array)
                    address = array.data_ptr()
                elif is_freed(array):
                    raise NoMemoryError
            addresses.append(address)
            layouts.append((array.stride(), address % 16))
            owners.append(array)
        return addresses, tuple(layouts), owners

    def allocate(
        self, own: torch.device, specs: Sequence[Spec | None], addresses: list[int]
    ) -> list[torch.Tensor | None]:
        made = []
        for spec in specs:
            array = None
            if spec is not None:
                shape, dtype = spec
                array = _empty_on_gpu(shape, contiguous(shape), TORCH_DTYPES[dtype])
                addresses.append(array.data_ptr())
            made.append(array)
        return made

    def stream(self, own: torch.device) -> int:
        stream: int = torch._C._cuda_getCurrentRawStream(own.index)
        return stream


def _check_subclass(call: str, name: str, array: Any) -> None:
    """Raise unless `array` is a tensor that leaves it to PyTorch what its operators do."""
    if isinstance(array, torch.fx.Proxy):
        raise TypeError(
            f"{call}: {name} is a torch.fx.Proxy: torch.fx.symbolic_trace cannot follow this call. "
            f"Make it in a function of a module that torch.fx.wrap marks, or trace with "
            f"torch.export or torch.compile, which follow it"
        )
    if not isinstance(array, torch.Tensor):
        refuse(call, name, array, "a torch.Tensor is needed")
    if type(array).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{call}: {name} is of type {type_name(array)}, whose __torch_dispatch__ decides what "
            f"operators do with it and does not know cuneigh's: pass a plain torch.Tensor, such as "
            f"{name}.dequantize() of a quantized tensor; DTensor is taken by "
            f"cuneigh.torch.distributed"
        )


def _numbers(array: torch.Tensor) -> tuple[int, ...]:
    """The shape of `array` while torch.jit.trace would take it for something to be recorded."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        return tuple(array.shape)
    finally:
        torch._C._set_tracing_state(state)


TENSORS = TensorAdapter()
