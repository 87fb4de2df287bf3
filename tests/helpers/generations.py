"""Fixtures for the generations of NATTEN, within this process and undone after the test."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from cuneigh.compat import natten
from cuneigh.compat.natten import _calls, _switch

Install = Callable[..., ModuleType]


@pytest.fixture(name="generation")
def choosing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`use_generation`, for one test."""
    monkeypatch.setattr(_switch, "_chosen", None)
    yield natten.use_generation
    for function, *_ in _calls._signed:
        vars(function).pop("__signature__", None)


@pytest.fixture(name="install")
def installing(generation: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install`, for one test; it returns the module ``natten``."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in list(sys.modules):  # of whoever installed it for the rest of the process
        if name.partition(".")[0] == "natten":
            monkeypatch.delitem(sys.modules, name)

    def perform(*args: str, **kwargs: str) -> ModuleType:
        natten.install(*args, **kwargs)
        return importlib.import_module("natten")

    yield perform
    for name in list(sys.modules):
        if name.partition(".")[0] == "natten":
            del sys.modules[name]
