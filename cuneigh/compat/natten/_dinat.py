"""The DiNAT of Hugging Face's transformers, which hands over tensors in another order of axes.

Up to 4.52 it gives ``[batch, heads, height, width, dim]``, as NATTEN wants it; from 4.54 on
``[batch, width, height, heads, dim]``, with which it fails on NATTEN or, with as many heads as
columns, computes something else. Only what it calls can know: so its module gets functions of its
own when it is imported.
"""

from __future__ import annotations

import functools
from importlib.abc import Loader
from types import ModuleType
from typing import Any

import torch

from cuneigh.compat.natten import functional

MODULE = "transformers.models.dinat.modeling_dinat"


def prepare(loader: Loader) -> None:
    """Let `loader`, which will load `MODULE`, give it the functions that it needs."""
    load = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        load(module)
        if _first_query(module) == (1, WIDTH, HEIGHT, HEADS, 4):
            vars(module).update(natten2dqkrpb=_qkrpb, natten2dav=_av)

    loader.exec_module = exec_module  # type: ignore[method-assign]


HEADS, HEIGHT, WIDTH = 2, 5, 7


class _Seen(Exception):  # noqa: N818 - stops a computation, and is no error
    pass


def _first_query(module: Any) -> tuple[int, ...] | None:
    """The shape of the query that the attention of `module` hands over, without computing it."""
    seen = None

    def stop(query: torch.Tensor, *_: Any) -> None:
        nonlocal seen
        seen = tuple(query.shape)
        raise _Seen

    original, module.natten2dqkrpb = module.natten2dqkrpb, stop
    try:
        with torch.device("meta"):
            attention = module.NeighborhoodAttention(module.DinatConfig(), 4 * HEADS, HEADS, 3, 1)
            attention(torch.empty(1, HEIGHT, WIDTH, 4 * HEADS))
    except _Seen:
        pass
    finally:
        module.natten2dqkrpb = original
    return seen


@functools.wraps(functional.natten2dqkrpb)
def _qkrpb(query: Any, key: Any, rpb: Any, kernel_size: int, dilation: int) -> Any:
    query, key = query.transpose(1, 3), key.transpose(1, 3)
    return functional.natten2dqkrpb(query, key, rpb, kernel_size, dilation)


@functools.wraps(functional.natten2dav)
def _av(attn: Any, value: Any, kernel_size: int, dilation: int) -> Any:
    return functional.natten2dav(attn, value.transpose(1, 3), kernel_size, dilation)
