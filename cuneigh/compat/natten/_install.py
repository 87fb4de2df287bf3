"""The module tree ``natten`` for code that imports it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from cuneigh.compat.natten import context

SUBMODULES = {
    "context": "context",
    "functional": "functional",
    "modules": "modules",
    "na1d": "modules",
    "na2d": "modules",
    "na3d": "modules",
    "natten1d": "modules",
    "natten2d": "modules",
    "natten3d": "modules",
}
"""What to import below ``natten``, and what here stands for it."""

HERE = __name__.rpartition(".")[0]


def install() -> None:
    """Put this in place of the module ``natten``, for code that is imported from now on.

    Raises
    ------
    RuntimeError
        If it comes too late: if NATTEN itself is imported already, or a module that looked for it.
    """
    installed = sys.modules.get("natten")
    if installed is not None:
        if getattr(installed, "__stands_for__", None) == HERE:
            return
        raise RuntimeError(
            "cuneigh.compat.natten.install() comes too late: natten is imported already, from "
            f"{getattr(installed, '__file__', None)}"
        )
    client = _disappointed_client()
    if client is not None:
        raise RuntimeError(
            f"cuneigh.compat.natten.install() comes too late: {client} is imported already and "
            "has found no natten; install it before"
        )
    sys.meta_path.append(_Finder())
    sys.modules["natten"] = root = _module("natten", HERE)
    root.__path__ = []
    vars(root).update({name: getattr(context, name) for name in context.__all__})
    for name, source in SUBMODULES.items():
        module = _module(f"natten.{name}", f"{HERE}.{source}")
        sys.modules[module.__name__] = module
        if not hasattr(root, name):  # `natten.na2d` is the function, as in NATTEN
            setattr(root, name, module)


def _module(name: str, source: str) -> ModuleType:
    """A module called `name` with what the module `source` offers."""
    original = import_module(source)
    module = ModuleType(name, original.__doc__)
    public = {key: value for key, value in vars(original).items() if not key.startswith("_")}
    vars(module).update(public)
    module.__spec__ = ModuleSpec(name, None, origin=original.__file__, is_package=name == "natten")
    module.__file__ = original.__file__
    module.__version__ = import_module(HERE).__version__  # type: ignore[attr-defined]
    module.__stands_for__ = source  # type: ignore[attr-defined]
    return module


class _Metadata(Distribution):
    """What ``importlib.metadata`` says of ``natten``; some clients ask there for its version."""

    def read_text(self, filename: str) -> str | None:
        version = import_module(HERE).__version__
        text = f"Metadata-Version: 2.1\nName: natten\nVersion: {version}\n"
        return text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent.joinpath(path)


class _Finder(DistributionFinder):
    """Finds `_Metadata`, and no module: those are in ``sys.modules``."""

    def find_spec(self, *_: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        if context is not None and context.name == "natten":
            yield _Metadata()


CALLS = frozenset(["natten2dqkrpb", "natten2dav", "natten1dqkrpb", "natten1dav"])
"""Functions for which clients that find no NATTEN define something that only raises."""


def _disappointed_client() -> str | None:
    """The name of a loaded module that has looked for NATTEN in vain, as far as one can see."""
    for name, module in list(sys.modules.items()):
        own = name.partition(".")[0] == "cuneigh"
        if not own and not CALLS.isdisjoint(getattr(module, "__dict__", ())):
            return name
    utilities = sys.modules.get("transformers.utils.import_utils")
    asked = getattr(utilities, "is_natten_available", None)
    if asked is not None and hasattr(asked, "cache_info") and asked.cache_info().currsize:
        return "transformers"
    return None
