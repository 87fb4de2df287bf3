"""Neighborhood attention for NumPy, CuPy, PyTorch and JAX arrays, and all that speak DLPack.

Each query of a 1-D, 2-D or 3-D layout of tokens attends to the keys of a window around it:
`na1d`, `na2d` and `na3d`, with strides, dilation, causal axes, grouped heads, additional keys and a
relative positional bias. Each has a gradient (`na2d_backward`) and exists in two halves with the
logits in memory between them (`na2d_qk`, `na2d_av`). `attention` sees every key,
`merge_attentions` joins attentions over parts of the keys, and `tiled` computes layouts that do not
fit on a GPU.

Arrays are heads-last, ``[batch, tokens.., heads, dim]``. Results are of the arrays' framework and
live on their device. ``python -m cuneigh doctor`` tells what works here.
"""

import cuneigh._frameworks.jax_handlers  # noqa: F401 - for programs that JAX has exported
from cuneigh._ops.av import (
    AVGradients,
    na1d_av,
    na1d_av_backward,
    na2d_av,
    na2d_av_backward,
    na3d_av,
    na3d_av_backward,
)
from cuneigh._ops.dense import attention, merge_attentions
from cuneigh._ops.neighborhood import (
    Gradients,
    na1d,
    na1d_backward,
    na2d,
    na2d_backward,
    na3d,
    na3d_backward,
)
from cuneigh._ops.qk import (
    QKGradients,
    na1d_qk,
    na1d_qk_backward,
    na2d_qk,
    na2d_qk_backward,
    na3d_qk,
    na3d_qk_backward,
)
from cuneigh._ops.tiled import tiled

__version__ = "0.1.0"

__all__ = [
    "AVGradients",
    "Gradients",
    "QKGradients",
    "attention",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_av_backward",
    "na1d_backward",
    "na1d_qk",
    "na1d_qk_backward",
    "na2d",
    "na2d_av",
    "na2d_av_backward",
    "na2d_backward",
    "na2d_qk",
    "na2d_qk_backward",
    "na3d",
    "na3d_av",
    "na3d_av_backward",
    "na3d_backward",
    "na3d_qk",
    "na3d_qk_backward",
    "tiled",
]
