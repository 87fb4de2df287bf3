"""Names of NATTEN that mean nothing here: they can be imported, and say so when they are used."""

from __future__ import annotations

from typing import Any, NoReturn


class Unserved:
    """Stands for a function or a class of NATTEN, of which a client may make a subclass."""

    def __new__(cls, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"{cls.__module__}.{cls.__name__} has no counterpart in cuneigh, which has kernels of "
            "its own"
        )

    @classmethod
    def apply(cls, *_: Any, **__: Any) -> NoReturn:
        """Of an autograd function."""
        cls()


def unserved(module: str, name: str) -> type[Unserved]:
    """What stands for `name` of `module`."""
    return type(name, (Unserved,), {"__module__": module})
