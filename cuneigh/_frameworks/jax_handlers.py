"""Has XLA know cuneigh's custom calls as soon as both cuneigh and JAX are imported.

A program that was exported with such calls, and is loaded in another process, makes no call of a
public function, with which the adapter of JAX would be imported. So `import cuneigh` imports it if
JAX is there, and otherwise waits for the import of JAX, which it never imports itself.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module

from cuneigh._frameworks import ADAPTERS
from cuneigh._frameworks.watch import when_imported


def register() -> None:
    """Register the handlers, now or when JAX has been imported."""
    if "jax" not in sys.modules:
        when_imported("jax", _import_adapter)
    elif hasattr(
        sys.modules["jax"], "ffi"
    ):  # else it is just being imported, and will be waited for
        _import_adapter()


def _import_adapter() -> None:
    # What is wrong with it, the first call of a function says; nobody else needs to know.
    with suppress(Exception):
        import_module(ADAPTERS["jax"])


register()
