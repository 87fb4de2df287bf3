"""Fixtures: the sources of a toy kernel, a cache, and a machine that loses its compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.toy_kernel import TOY

from cuneigh._jit import Cache, CompilationError, Sources
from cuneigh._jit import _build as build
from cuneigh._jit import _compiler as compiler


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "cuda"
    (root / "cuneigh").mkdir(parents=True)
    (root / "toy.cu").write_text(TOY)
    header = (
        "#pragma once\nnamespace cuneigh { using number = float; constexpr int kOffset = 1; }\n"
    )
    (root / "cuneigh" / "toy.cuh").write_text(header)
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def installation(tree: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy sources and the cache take the place of the real ones."""
    sources = Sources(tree)
    monkeypatch.setattr(build, "packaged", lambda: sources)
    monkeypatch.setenv("CUNEIGH_CACHE_DIR", str(cache.root))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to make NVRTC disappear."""

    def disappear() -> None:
        def missing() -> Any:
            raise CompilationError("NVRTC is missing")

        monkeypatch.setattr(compiler, "_nvrtc", missing)
        for cached in (compiler.version, compiler.build_version, compiler.architectures):
            monkeypatch.setattr(compiler, cached.__name__, cached.__wrapped__)

    return disappear
