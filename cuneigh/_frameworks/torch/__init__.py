"""The adapter of PyTorch: its arrays, operators and autograd rules.

It is imported when the first tensor is an argument of a call, which may be while torch.compile
traces it.
"""

import sys
from numbers import Real

import torch

from cuneigh._call import OPAQUE
from cuneigh._frameworks.torch import autograd
from cuneigh._frameworks.torch.adapter import ADAPTER
from cuneigh._frameworks.watch import when_imported
from cuneigh._parameters import Symbol

__all__ = ["ADAPTER"]

# Numbers that torch.compile traces as symbols may be the scale and the window of a call.
Real.register(torch.SymFloat)
Symbol.register(torch.SymInt)


def _tell_tracer() -> None:
    """torch.compile calls the opaque functions with the tensors of its trace.

    It sees the operators that they call.
    """
    for function in OPAQUE:
        torch.compiler.allow_in_graph(function)
    autograd.hide_backward()


# Its import takes two seconds, which programs that compile nothing do without.
if "torch._dynamo" in sys.modules:
    _tell_tracer()
else:
    when_imported("torch._dynamo", _tell_tracer)
