"""FlashAttention-4's sliding window (`window_size`), in one dimension."""

from __future__ import annotations

from typing import Any

from cuneigh._measure.peers.contract import (
    Calls,
    Given,
    Peer,
    UnfitError,
    differentiated,
    refuse_extras,
)


def windowed(deterministic: bool) -> Peer:
    """The peer whose gradients are the same bits in every call, or not."""

    def prepare(given: Given) -> Calls:
        return _calls(given, deterministic)

    return prepare


def _calls(given: Given, deterministic: bool) -> Calls:
    import torch

    refuse_extras(given)
    problem = given.problem
    if problem.rank != 1:
        raise UnfitError(f"window_size has one axis, not {problem.rank}")
    if not given.is_plain:
        raise UnfitError("window_size has no stride and no dilation")
    if not given.on_gpu:
        raise UnfitError("FlashAttention-4 needs a GPU")
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        raise UnfitError("flash-attn-4 is not installed") from None
    (axis,) = problem.axes
    k = axis.kernel_size
    before, after = (k - 1, 0) if axis.is_causal else (k // 2, k - 1 - k // 2)
    options: dict[str, Any] = {
        "softmax_scale": problem.scale,
        "causal": axis.is_causal,
        "deterministic": deterministic,
    }
    if k < axis.length:
        options["window_size"] = (before, after)

    def forward(query: Any, key: Any, value: Any) -> Any:
        output = flash_attn_func(query, key, value, **options)
        return output[0] if isinstance(output, tuple) else output

    def without_gradient() -> Any:
        with torch.no_grad():
            return forward(given.query, given.key, given.value)

    cut = k < axis.length and not axis.is_causal
    notes = ["windows are cut at the borders"] * cut + ["its forward is the same"] * deterministic
    return Calls(without_gradient, differentiated(given, forward), ", ".join(notes), inner=cut)
