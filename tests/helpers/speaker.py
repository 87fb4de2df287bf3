"""A framework that has nothing but the protocols: arrays to lend, and no function to take any."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers.strategies import numpy_dtype

from cuneigh._frameworks.dlpack.adapter import BFloat16


class Speaker:
    """An array that speaks DLPack, for a NumPy or CuPy array.

    With `refusal`, the error that it raises when it is asked for a version, it knows nothing but
    what there was before version 1.0. `asked` has what its capsules were asked for.
    """

    def __init__(
        self, array: Any, refusal: type[Exception] | None = None, device: Any = None
    ) -> None:
        self.array, self.refusal = array, refusal
        self.device = device or array.__dlpack_device__()
        self.asked: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **asked: Any) -> Any:
        self.asked.append(asked)
        if self.refusal is not None and "max_version" in asked:
            raise self.refusal("what is a max_version?")
        is_bfloat16 = self.array.dtype == numpy_dtype("bfloat16")
        lender = (
            BFloat16(self.array) if isinstance(self.array, np.ndarray) and is_bfloat16 else None
        )
        return (lender or self.array).__dlpack__(**asked)


class Interface:
    """An array that has ``__cuda_array_interface__`` and nothing else, for a CuPy array."""

    def __init__(self, array: Any, **changes: Any) -> None:
        self.array = array  # which it keeps
        self.__cuda_array_interface__ = array.__cuda_array_interface__ | changes
