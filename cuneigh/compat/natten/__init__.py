"""NATTEN's names, of all its generations, on cuneigh: change the import, or `install` them.

- 0.20 and later: `na1d`, `na2d`, `na3d`, `attention`, `merge_attentions` and the modules,
  heads-last. Arguments that only tune NATTEN's own kernels (``backend``, tile shapes, schedules,
  ``torch_compile``, ``attention_kwargs``) are accepted and ignored. Arguments that change the
  result and have no counterpart, such as sequence lengths, raise NotImplementedError.
- 0.15 to 0.17: `na1d_qk` .. `na3d_av`, heads-first ``[batch, heads, tokens.., dim]``, with
  ``rpb`` and additional keys. `na1d`, `na2d` and `na3d` take ``rpb`` as well; positional arguments
  after ``kernel_size`` are in the order of 0.20, where ``stride`` comes first.
- 0.14: `natten1dqkrpb`, `natten1dqk`, `natten1dav`, and likewise in 2-D and 3-D.
- What ``natten`` is asked about itself (``natten.has_fused_na()``) and its switches
  (``natten.use_fused_na()``) are in `context`, and below the installed module as well.

The DiNAT of Hugging Face's transformers, from 4.54 to 5.23, passes arrays whose axes are in another
order than NATTEN's. Which order it is given is told by shapes and strides, so that these models run
and give what 4.52 gave.

Results of the heads-first functions are views of heads-last memory, whose ``.contiguous()`` NATTEN
would have returned.
"""

from cuneigh.compat.natten._install import install
from cuneigh.compat.natten.functional import (
    attention,
    merge_attentions,
    na1d,
    na1d_av,
    na1d_qk,
    na2d,
    na2d_av,
    na2d_qk,
    na3d,
    na3d_av,
    na3d_qk,
)
from cuneigh.compat.natten.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__version__ = "0.21.0"
"""The version of NATTEN whose interface this is."""

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "attention",
    "install",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
]
