"""The adapter of PyTorch: its arrays, operators and autograd rules.

It is imported when the first tensor is an argument of a call, which may be while torch.compile
traces it.
"""

from numbers import Real

import torch

from cuneigh._call import OPAQUE
from cuneigh._frameworks.torch.adapter import ADAPTER
from cuneigh._validate import Symbol

__all__ = ["ADAPTER"]

# Numbers that torch.compile traces as symbols may be the scale and the window of a call.
Real.register(torch.SymFloat)
Symbol.register(torch.SymInt)

# torch.compile calls these with the tensors of its trace, and sees the operators that they call.
for _function in OPAQUE:
    torch.compiler.allow_in_graph(_function)
