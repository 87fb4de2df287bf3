"""``natten`` for code that imports it: modules, metadata, and what one of its clients needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from cuneigh.compat.natten import _dinat
from cuneigh.compat.natten._calls import sign
from cuneigh.compat.natten._switch import choose, chosen, release
from cuneigh.compat.natten._tree import build


def use_generation(generation: str) -> None:
    """Take every call as one of this generation of NATTEN, in the whole process.

    Parameters
    ----------
    generation : {"0.14", "0.15", "0.17", "0.20", "0.21"}
        0.21.0 and 0.21.1 are of "0.20"; "0.21" is what came after.

    Raises
    ------
    ValueError
        For another name.
    RuntimeError
        If another generation was asked for before.
    """
    choose("cuneigh.compat.natten.use_generation", generation)
    sign(generation)


def install(generation: str | None = None) -> None:
    """Put this in place of the module ``natten``, for code that is imported from now on.

    Parameters
    ----------
    generation : {"0.14", "0.15", "0.17", "0.20", "0.21"}, optional
        The generation of NATTEN that the code was written for, as in `use_generation`; only its
        names are there. Without one, the names of all are, each call is of the newest generation
        that accepts it, and arguments by position whose meaning changed are refused.

    Raises
    ------
    ValueError
        For a generation of another name.
    RuntimeError
        If it comes too late: if NATTEN itself is imported already, or a module that looked for it,
        or if another generation was installed.
    """
    call = "cuneigh.compat.natten.install()"
    installed = sys.modules.get("natten")
    if installed is not None:
        of = getattr(installed, "__cuneigh__", None)
        if of is None:
            raise RuntimeError(
                f"{call} comes too late: natten is imported already, from "
                f"{getattr(installed, '__file__', None)}"
            )
        if generation not in (None, of["generation"]):
            raise RuntimeError(
                f"{call} comes too late: it was installed with generation={of['generation']!r}"
            )
        return
    client = _disappointed_client()
    if client is not None:
        raise RuntimeError(
            f"{call} comes too late: {client} is imported already and has found no natten; install "
            "it before"
        )
    if generation is not None:
        choose("cuneigh.compat.natten.install", generation)
        sign(generation)
    tree = build(chosen())
    tree["natten"].__cuneigh__ = {"generation": chosen()}  # type: ignore[attr-defined]
    sys.modules.update(tree)
    sys.meta_path.insert(0, _Finder())


class _Metadata(Distribution):
    """What ``importlib.metadata`` says of ``natten``; some clients ask there for its version."""

    def read_text(self, filename: str) -> str | None:
        text = f"Metadata-Version: 2.1\nName: natten\nVersion: {release()}\n"
        return text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent.joinpath(path)


class _Finder(DistributionFinder):
    """Finds `_Metadata`, and of modules only the client that needs a function of its own."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _dinat.MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            _dinat.prepare(spec.loader)
        return spec

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        if context is not None and context.name == "natten":
            yield _Metadata()


CALLS = frozenset(["natten2dqkrpb", "natten2dav", "natten1dqkrpb", "natten1dav"])
"""Functions for which clients that find no NATTEN define something that only raises."""


def _disappointed_client() -> str | None:
    """The name of a loaded module that has looked for NATTEN in vain, as far as one can see."""
    for name, module in list(sys.modules.items()):
        contents = getattr(module, "__dict__", {})
        if any(call in contents and not _is_own(contents[call]) for call in CALLS):
            return name
    utilities = sys.modules.get("transformers.utils.import_utils")
    asked = getattr(utilities, "is_natten_available", None)
    if asked is not None and hasattr(asked, "cache_info") and asked.cache_info().currsize:
        return "transformers"
    return None


def _is_own(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("cuneigh.")
