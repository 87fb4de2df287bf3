"""PyTorch: modules that hold the weights around neighborhood attention.

``cuneigh.na2d`` and its kin need nothing from here: they are differentiable on tensors, they go
through ``torch.compile``, ``torch.func.vmap``, autocast and CUDA graphs, and kernels run on
PyTorch's current stream. A program that was exported with calls of them needs the operators of
``torch.ops.cuneigh``, which are there once this module is imported.

`cuneigh.torch.distributed`, to be imported by its name, is for one layout over several GPUs.
"""

import cuneigh._frameworks.torch  # noqa: F401 - defines the operators
from cuneigh.torch._modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]
