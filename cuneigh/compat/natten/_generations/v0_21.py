"""NATTEN 0.21, from 0.21.5 on: as 0.20, and attention returns its lse where asked for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cuneigh.compat.natten import _heads_last
from cuneigh.compat.natten._arguments import only_tuning, refuse


def functions(rank: int) -> dict[str, list[Callable[..., Any]]]:
    """What ``natten.functional`` has for this rank."""
    return {f"na{rank}d": [neighborhood(rank)]}


def any_rank() -> dict[str, list[Callable[..., Any]]]:
    """What ``natten.functional`` has for all ranks."""
    generic = {"neighborhood_attention_generic": [neighborhood(None)]}
    return {**generic, "attention": [_attention], "merge_attentions": [_merge_attentions]}


def neighborhood(
    rank: int | None, calls: Mapping[int, Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """``na1d``, ``na2d`` or ``na3d``, or what takes any rank; by `cuneigh`'s functions or `calls`.

    These have the form of those, and may be others for other arrays.
    """

    def na(
        query: Any,
        key: Any,
        value: Any,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        scale: float | None = None,
        additional_keys: Any = None,
        additional_values: Any = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
    ) -> Any:
        own = _heads_last.rank_of(query) if rank is None else rank
        only_tuning(f"na{own}d", "attention_kwargs", attention_kwargs)
        window = kernel_size, stride, dilation, is_causal
        extra = additional_keys, additional_values
        return _heads_last.neighborhood(
            own, query, key, value, *window, scale, *extra, return_lse=return_lse, calls=calls
        )

    return na


def _attention(
    query: Any,
    key: Any,
    value: Any,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Any = None,  # noqa: N803 - NATTEN's names
    seqlens_KV: Any = None,  # noqa: N803
    cumulative_seqlen_Q: Any = None,  # noqa: N803
    cumulative_seqlen_KV: Any = None,  # noqa: N803
    max_seqlen_Q: int | None = None,  # noqa: N803
    max_seqlen_KV: int | None = None,  # noqa: N803
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    lengths = {
        "seqlens_Q": seqlens_Q,
        "seqlens_KV": seqlens_KV,
        "cumulative_seqlen_Q": cumulative_seqlen_Q,
        "cumulative_seqlen_KV": cumulative_seqlen_KV,
        "max_seqlen_Q": max_seqlen_Q,
        "max_seqlen_KV": max_seqlen_KV,
    }
    for name, length in lengths.items():
        if not (isinstance(length, int) and length == 0):  # which `utils.varlen` gives for none
            refuse("attention", {name: length})
    return _heads_last.dense(query, key, value, is_causal, scale, return_lse)


def _merge_attentions(
    outputs: Sequence[Any],
    lse_tensors: Sequence[Any],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> Any:
    return _heads_last.merge(outputs, lse_tensors)
