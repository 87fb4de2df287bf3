"""PyTorch: the functions of `cuneigh` on tensors, and modules that hold the weights around them.

``cuneigh.na2d`` and its kin need nothing from here: they are differentiable on tensors, they go
through ``torch.compile``, ``torch.func.vmap``, autocast and CUDA graphs, and kernels run on
PyTorch's current stream. This module is imported when the first tensor arrives.
"""

from numbers import Real

import torch

from cuneigh._arrays import register
from cuneigh._ops.call import CORES
from cuneigh.torch._face import TorchFace
from cuneigh.torch._modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]

register(TorchFace(), "torch")

# A number that torch.compile traces as a symbol may be the scale of a call.
Real.register(torch.SymFloat)

# torch.compile calls these with the tensors of its trace, and sees the operators that they call.
for _core in CORES:
    torch.compiler.allow_in_graph(_core)
