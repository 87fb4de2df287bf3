"""``natten.utils.varlen``, for clients that prepare calls with and without sequence lengths."""

from __future__ import annotations

from typing import Any

from cuneigh.compat.natten._arguments import refuse

__all__ = ["generate_varlen_parameters"]


def generate_varlen_parameters(
    query: Any,
    key: Any,
    value: Any,
    seqlens_Q: Any = None,  # noqa: N803 - NATTEN's names
    seqlens_KV: Any = None,  # noqa: N803
) -> tuple[None, None, int, int]:
    """What `attention` takes for no sequence lengths; NotImplementedError for any."""
    lengths = {"seqlens_Q": seqlens_Q, "seqlens_KV": seqlens_KV}
    refuse("utils.varlen.generate_varlen_parameters", lengths)
    return None, None, 0, 0
