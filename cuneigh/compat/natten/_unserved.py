"""Names of NATTEN that mean nothing here: they can be imported, and say so when they are used."""

from __future__ import annotations

from typing import Any, NoReturn


class Unserved:
    """Stands for a function or a class of NATTEN."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"{self.__name__} has no counterpart in cuneigh, which has kernels of its own"
        )

    apply = __call__
    """Of an autograd function."""

    def __repr__(self) -> str:
        return f"<{self.__name__}, which has no counterpart in cuneigh>"
