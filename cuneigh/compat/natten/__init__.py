"""NATTEN's names, of all its generations, on cuneigh: change the import, or `install` them.

- 0.20 and later: `na1d`, `na2d`, `na3d`, `attention`, `merge_attentions` and the modules,
  heads-last. Arguments that only tune NATTEN's own kernels (``backend``, tile shapes, schedules,
  ``torch_compile``) are accepted and ignored. Arguments that change the result and have no
  counterpart, such as sequence lengths, raise NotImplementedError.
- 0.15 to 0.17: `na1d_qk` .. `na3d_av`, heads-first ``[batch, heads, tokens.., dim]``, with
  ``rpb`` and additional keys.
- 0.14: `natten1dqkrpb`, `natten1dqk`, `natten1dav`, and likewise in 2-D and 3-D, in `functional`.
- What ``natten`` is asked about itself (``natten.has_fused_na()``) and its switches
  (``natten.use_fused_na()``) are in `context`, and below the installed module as well. There are
  ``flops``, ``types``, ``utils.checks``, ``experimental`` and what else clients import; names that
  mean nothing here raise NotImplementedError when they are called.

Releases give one argument different meanings: the fifth of ``na2d`` is its dilation in 0.17 and its
stride in 0.20. Their defaults differ as well: a module has a bias up to 0.15. So say which
generation the code was written for, by ``install(generation="0.17")`` or, without taking the place
of ``natten``, by ``use_generation("0.17")``: signatures, defaults, attributes of modules, padding
and results are those of that generation then. If none is said, a call is of the newest generation
that accepts it, and a call by position that generations understand differently raises a TypeError
that names all meanings.

- ``generation="0.14"`` also takes the shorter arguments of its early releases, such as
  ``natten2dav(attn, value, dilation)``; modules with ``kernel_size`` before ``num_heads``, as up to
  0.14.4, must be given both by name.
- ``generation="0.20"`` serves 0.21.0 and 0.21.1, too, whose `merge_attentions` returns no lse.
- Clients that try ``na2d_qk`` first, and so would store all logits, are better served by "0.20" or
  "0.21", which leave old names out.

The DiNAT of Hugging Face's transformers, from 4.54 to 5.23, passes arrays whose axes are in another
order than NATTEN's. Which order it is given is told by shapes and strides, so that these models run
and give what 4.52 gave.

Results of the heads-first functions are views of heads-last memory, whose ``.contiguous()`` NATTEN
would have returned. Not reproduced, on purpose: even windows of 0.14 at the right border, where no
query sees the last key (here the last ones do), and derivatives that old releases got wrong. Sizes
that NATTEN refuses, such as even windows in 0.15, are taken. Nested tensors are refused.

Code that fetches NATTEN from a hub of kernels finds it after this line, which comes before it::

    kernels.get_kernel = lambda name, *rest, fetch=kernels.get_kernel, **options: (
        cuneigh.compat.natten if "natten" in name else fetch(name, *rest, **options)
    )
"""

from typing import Any

from cuneigh.compat.natten import _switch
from cuneigh.compat.natten._install import install, use_generation
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
    "use_generation",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # of NATTEN, whose interface this is
        return _switch.release()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
