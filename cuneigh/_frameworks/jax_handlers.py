"""Has XLA know cuneigh's custom calls as soon as both cuneigh and JAX are imported.

A program that was exported with such calls, and is loaded in another process, makes no call of a
public function, with which the adapter of JAX would be imported. So `import cuneigh` imports it if
JAX is there, and otherwise waits for the import of JAX, which it never imports itself.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from cuneigh._frameworks import ADAPTERS


def register() -> None:
    """Register the handlers, now or when JAX has been imported."""
    if "jax" not in sys.modules:
        sys.meta_path.insert(0, _Watch())
    elif hasattr(
        sys.modules["jax"], "ffi"
    ):  # else it is just being imported, and will be waited for
        _import_adapter()


def _import_adapter() -> None:
    # What is wrong with it, the first call of a function says; nobody else needs to know.
    with suppress(Exception):
        import_module(ADAPTERS["jax"])


class _Watch(MetaPathFinder):
    """Is asked for every module that is to be imported, up to JAX."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "jax":
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None and spec.loader is not None:
                    spec.loader = _Then(spec.loader, self)  # somebody may only look for JAX
                if spec is not None:
                    return spec
        return None


class _Then(Loader):
    """The loader of JAX, after which the adapter is imported."""

    def __init__(self, loader: Loader, watch: _Watch) -> None:
        self._loader, self._watch = loader, watch

    def __getattr__(self, name: str) -> Any:  # what else it can do, for those who only look
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        with suppress(ValueError):
            sys.meta_path.remove(self._watch)
        _import_adapter()


register()
