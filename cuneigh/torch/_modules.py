"""Modules: neighborhood attention between the projections that NAT and DiNAT put around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cuneigh._ops.av import na1d_av, na2d_av, na3d_av
from cuneigh._ops.neighborhood import na1d, na2d, na3d
from cuneigh._ops.qk import na1d_qk, na2d_qk, na3d_qk
from cuneigh._ops.types import Borders, Flags, Sizes
from cuneigh._parameters import Window, part_arguments, window_arguments


class NeighborhoodAttention(nn.Module):  # type: ignore[misc]
    """What the modules of every rank share."""

    rank: int
    rpb: nn.Parameter | None
    border: Borders = "shift"
    """Like `sharding`, of modules that were pickled before there was such an argument."""
    sharding: Any = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        border: Borders = "shift",
        rel_pos_bias: bool = False,
        attn_drop: float = 0.0,
        sharding: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if embed_dim % num_heads:
            raise ValueError(
                f"{name}: embed_dim={embed_dim} is not a multiple of num_heads={num_heads}"
            )
        window = window_arguments(name, self.rank, kernel_size, stride, dilation, is_causal)
        self.kernel_size, self.stride, self.dilation, self.is_causal = window
        self.border = part_arguments(name, self.rank, border, None, 0, 0).border
        if rel_pos_bias and (max(window.stride) > 1 or any(window.is_causal)):
            raise ValueError(
                f"{name}: rel_pos_bias=True needs stride=1 and is_causal=False on every axis"
            )
        if sharding is not None and attn_drop:
            raise ValueError(
                f"{name}: attn_drop={attn_drop} cannot be combined with sharding: weights of "
                f"attention are not exchanged"
            )
        self.sharding = sharding
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        own = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(embed_dim, embed_dim * 3, bias=qkv_bias, **own)
        if rel_pos_bias:
            sizes = [2 * size - 1 for size in window.kernel_size]
            self.rpb = nn.Parameter(torch.empty(num_heads, *sizes, **own))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(embed_dim, embed_dim, **own)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != self.rank + 2 or x.shape[-1] != self.embed_dim:
            tokens = ", ".join(f"X{axis + 1}" for axis in range(self.rank))
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}, but "
                f"[batch, {tokens}, {self.embed_dim}] is needed"
            )
        projected: torch.Tensor = self.proj_drop(self.proj(self._attend(x)))
        return projected

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attention between the two projections."""
        projected = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        # A graph of torch.jit knows the shapes of these, which it does not of what unbind returns
        query, key, value = (projected.select(-3, i) for i in range(3))
        window = self.window
        given: dict[str, Any] = {"scale": self.scale, "rpb": self.rpb}
        if self.training and self.attn_drop.p > 0:
            na_qk, na_av = _HALVES[self.rank]
            weights = na_qk(query, key, **window, **given).softmax(-1)
            output = na_av(self.attn_drop(weights), value, **window)
        elif self.sharding is not None:
            output = _sharded(self.rank)(
                query, key, value, **window, **given, sharding=self.sharding
            )
        else:
            output = _WHOLE[self.rank](query, key, value, **window, **given)
        attended: torch.Tensor = output.flatten(-2)
        return attended

    @property
    def window(self) -> dict[str, Any]:
        """The window arguments of `na1d` and its kin."""
        return {name: getattr(self, name) for name in (*Window._fields, "border")}

    def extra_repr(self) -> str:
        shown = self.window
        if self.border == "shift" or set(self.border) == {"shift"}:
            del shown["border"]
        window = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, {window}"


_WHOLE = {1: na1d, 2: na2d, 3: na3d}
_HALVES = {1: (na1d_qk, na1d_av), 2: (na2d_qk, na2d_av), 3: (na3d_qk, na3d_av)}


def _sharded(rank: int) -> Any:
    """The function for layouts in shards, for which PyTorch's distributed part is imported."""
    from cuneigh.torch import distributed

    return (distributed.na1d, distributed.na2d, distributed.na3d)[rank - 1]


_DOCUMENTATION = """{rank}-D neighborhood attention of ``[batch, {tokens}, embed_dim]``.

    Its parameters are ``qkv``, ``proj`` and, with `rel_pos_bias`, ``rpb``: those of NATTEN's
    modules, so that checkpoints of NAT and DiNAT load.

    Parameters
    ----------
    embed_dim : int
        Size of a token, a multiple of `num_heads`.
    num_heads : int
    kernel_size, stride, dilation, is_causal
        The window, as in `cuneigh.na{rank}d`.
    qkv_bias : bool
        Whether the first projection has a bias; the last one always has.
    qk_scale : float, optional
        Factor of the logits; ``head_dim ** -0.5`` if not given.
    proj_drop : float
        Probability of dropout after the last projection.
    border : str, or one per token axis
        "shift", "cut" or "wrap", as in `cuneigh.na{rank}d`.
    rel_pos_bias : bool
        Whether to learn a relative positional bias, for stride 1 and no causal axis.
    attn_drop : float
        Probability of dropout of attention weights, which then are in memory while training.
    sharding : cuneigh.torch.distributed.Sharding, optional
        How a layout is cut over the ranks of a mesh: the module is then called with the shard of
        each rank. Parameters are the same on all ranks, and gradients those of the rank's tokens,
        which DDP and FSDP add up as they do for those of a batch.
    device, dtype
        Of the parameters, as in ``torch.nn.Linear``.
    """


class NeighborhoodAttention1D(NeighborhoodAttention):
    __doc__ = _DOCUMENTATION.format(rank=1, tokens="X1")
    rank = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    __doc__ = _DOCUMENTATION.format(rank=2, tokens="X1, X2")
    rank = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    __doc__ = _DOCUMENTATION.format(rank=3, tokens="X1, X2, X3")
    rank = 3
