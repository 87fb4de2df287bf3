"""What users get wrong, for mypy and pyright: every marked line is an error.

mypy is strict here, so that a mark without an error is one, too. Nothing of this is run.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import cuneigh
from cuneigh.compat import natten
from cuneigh.compat.natten import functional

Array = npt.NDArray[np.float32]


def forward(x: Array) -> Array:
    cuneigh.na2d(x, x, x)  # type: ignore[call-overload]
    cuneigh.na2d(x, x, x, 3.0)  # type: ignore[call-overload]
    cuneigh.na2d(x, x, x, 3, is_causal=3)  # type: ignore[call-overload]
    cuneigh.na2d(x, x, x, 3, scale="0.5")  # type: ignore[call-overload]
    cuneigh.na2d(x, x, x, 3, backend="cuda")  # type: ignore[call-overload]
    cuneigh.na2d(x, x, x, 3, kernel=3)  # type: ignore[call-overload]
    cuneigh.na2d_qk(x, x, 3, backend="cuda")  # type: ignore[arg-type]
    first, second = cuneigh.na2d(x, x, x, 3, return_lse=True)
    number: float = cuneigh.na2d(x, x, x, 3)  # type: ignore[assignment]
    assert number
    pair = cuneigh.na2d(x, x, x, 3, return_lse=True)
    pair.mean()  # type: ignore[attr-defined]
    cuneigh.merge_attentions([first], [second], [x])  # type: ignore[call-arg]
    text: str = cuneigh.merge_attentions([first], [second])[0]  # type: ignore[assignment]
    cuneigh.na2d_backward(x, x, x, x, first, second, 3).rpb.mean()  # type: ignore[union-attr]
    return text  # type: ignore[return-value]


def of_natten(x: Array) -> Array:
    natten.na2d(x, x, x)  # type: ignore[call-overload]
    natten.na2d(x, x, x, 7, kernel=3)  # type: ignore[call-overload]
    natten.na2d(x, x, x, 7, stride=2, rpb=x)  # type: ignore[call-overload]
    natten.na2d_qk(x, x)  # type: ignore[call-arg]
    natten.attention(x, x, x, seqlens_Q=[3])  # type: ignore[call-overload]
    functional.natten1dqk(x, x, 7)  # type: ignore[call-arg]
    return natten.merge_attentions([x], [x])  # type: ignore[return-value]
