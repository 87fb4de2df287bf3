"""Waiting for the import of a module that is never imported from here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(module: str, act: Callable[[], None]) -> None:
    """Have `act` called when somebody has imported `module`, which is not there yet."""
    sys.meta_path.insert(0, _Watch(module, act))


class _Watch(MetaPathFinder):
    """Is asked for every module that is to be imported, up to the one that is waited for."""

    def __init__(self, module: str, act: Callable[[], None]) -> None:
        self._module, self.act = module, act

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._module:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None and spec.loader is not None:
                    spec.loader = _Then(spec.loader, self)  # somebody may only look for it
                if spec is not None:
                    return spec
        return None


class _Then(Loader):
    """The loader of the module, after which something else is done."""

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
        self._watch.act()
