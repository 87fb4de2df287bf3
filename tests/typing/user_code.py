"""What users write, for mypy and pyright: all of it is right."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import cuneigh
from cuneigh.compat import natten
from cuneigh.compat.natten import functional

Array = npt.NDArray[np.float32]


class Tensor:
    """The array of any framework."""

    def __float__(self) -> float:
        return 1.0


def forward(query: Array, key: Array, value: Array, window: tuple[int, int]) -> Array:
    output = cuneigh.na2d(query, key, value, window, dilation=[2, 1], is_causal=(True, False))
    assert_type(output, Array)
    scaled = cuneigh.na2d(query, key, value, 7, 1, 1, False, np.float32(0.5), backend="cpu")
    assert_type(scaled, Array)
    first, lse = cuneigh.na2d(query, key, value, kernel_size=3, return_lse=True)
    assert_type(first, Array)
    assert_type(lse, Array)
    second = cuneigh.attention(query, key, value, is_causal=True, return_lse=True)
    assert_type(second, tuple[Array, Array])
    merged, total = cuneigh.merge_attentions([first, second[0]], (lse, second[1]))
    assert_type(total, Array)
    return merged + output


def tiles(query: Array, out: npt.NDArray[Any], most: int) -> npt.NDArray[Any]:
    both = cuneigh.tiled(cuneigh.na1d, query, query, query, 3, return_lse=True, max_bytes=most)
    assert_type(both, tuple[npt.NDArray[Any], npt.NDArray[Any]])
    return cuneigh.tiled(cuneigh.na2d, query, query, query, (3, 5), max_bytes=most, out=out)


def any_framework(x: Tensor, wants_lse: bool) -> Tensor:
    assert_type(cuneigh.na1d(x, x, x, 3), Tensor)
    assert_type(cuneigh.na3d(x, x, x, (1, 2, 3), rpb=x, additional_keys=x), Tensor)
    assert_type(cuneigh.na1d(x, x, x, 3, scale=Tensor()), Tensor)
    assert_type(cuneigh.attention(x, x, x), Tensor)
    logits = cuneigh.na2d_qk(x, x, 3, scale=0.5, rpb=None)
    assert_type(logits, Tensor)
    either = cuneigh.na1d(x, x, x, 3, return_lse=wants_lse)
    assert_type(either, Tensor | tuple[Tensor, Tensor])
    return cuneigh.na2d_av(logits, x, 3)


def backward(x: Tensor) -> Tensor:
    gradients = cuneigh.na1d_backward(x, x, x, x, x, x, 3, grad_lse=x, rpb=x)
    assert_type(gradients, cuneigh.Gradients[Tensor])
    assert_type(gradients.rpb, Tensor | None)
    of_logits = cuneigh.na1d_qk_backward(x, x, x, 3)
    assert_type(of_logits.key, Tensor)
    of_weights = cuneigh.na1d_av_backward(x, x, x, 3)
    assert_type(of_weights.weights, Tensor)
    query, _, _, *_ = gradients
    assert query is not None
    return gradients.query


def of_natten(x: Tensor, wants_lse: bool) -> Tensor:
    assert_type(natten.na2d(x, x, x, 7, stride=2, torch_compile=True), Tensor)
    assert_type(natten.na2d(x, x, x, kernel_size=(7, 5), dilation=2, rpb=x), Tensor)
    pair = natten.na3d(x, x, x, (3, 7, 7), is_causal=(True, False, False), return_lse=True)
    assert_type(pair, tuple[Tensor, Tensor])
    assert_type(natten.attention(x, x, x, max_seqlen_Q=0), Tensor)
    either = natten.attention(x, x, x, return_lse=wants_lse)
    assert_type(either, Tensor | tuple[Tensor, Tensor])
    merged, _ = natten.merge_attentions([x, pair[0]], [x, pair[1]])
    logits = natten.na3d_qk(x, x, 3, (1, 2, 2), rpb=x)
    assert_type(functional.na3d_qk(x, x, 3, 7, 1, 2), Tensor)
    assert_type(functional.natten2dqkrpb(x, x, x, 7, 1), Tensor)
    assert_type(functional.natten2dav(logits, x, 1), Tensor)
    assert_type(natten.na2d_av(logits, merged, kernel_size=3), Tensor)
    return merged


def untyped(x: Any) -> Any:
    return cuneigh.na2d(x, x, x, 3).mean()
