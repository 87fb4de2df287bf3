"""The CUDA sources and what is made of them: their digest, and a translation unit per kernel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Kernel:
    """One instantiation of the kernel template in `cuda/<name>.cu`."""

    name: str
    """Such as ``fused/forward``: of the file in `cuda/`, and of the function template
    ``cuneigh::fused::forward`` in it."""
    plan: str
    """The members of the struct that is its template argument, as C++."""
    arch_specific: bool = False
    """Whether it has instructions that only one architecture has, such as wgmma of sm_90a."""
    macros: tuple[str, ...] = ()
    """Macros that are defined before everything else."""

    def target(self, arch: str) -> str:
        """What it is compiled for to run on `arch`: sm_90a in place of sm_90 if it needs that."""
        return f"{arch}a" if self.arch_specific and arch[-1:].isdigit() else arch

    @property
    def file(self) -> str:
        """The file in `cuda/` that holds it."""
        return f"{self.name}.cu"

    @property
    def instance(self) -> str:
        template = self.name.replace("/", "::")
        return f"cuneigh::{template}<cuneigh::Plan>"

    @property
    def unit(self) -> str:
        """The translation unit. The plan comes last: it may use the names the include brings."""
        defines = "".join(f"#define {macro}\n" for macro in self.macros)
        return (
            f'{defines}#include "{self.file}"\n'
            f"namespace cuneigh {{\nstruct Plan {{\n{self.plan.strip()}\n}};\n}}\n"
        )


def plan_source(
    constants: Mapping[str, int],
    flags: Mapping[str, bool] | None = None,
    types: Mapping[str, str | None] | None = None,
) -> str:
    """The members of `struct Plan`, as C++; a type that is None is `void`."""
    lines = [f"static constexpr int {name} = {value};" for name, value in constants.items()]
    for name, flag in (flags or {}).items():
        lines.append(f"static constexpr bool {name} = {str(flag).lower()};")
    lines += [f"using {name} = {type_ or 'void'};" for name, type_ in (types or {}).items()]
    return "\n".join(lines)


class Sources:
    """A tree of sources, read once: what is hashed is exactly what is compiled."""

    def __init__(self, root: Traversable) -> None:
        self.root = root

    @cached_property
    def texts(self) -> dict[str, str]:
        """The text of every file, by the name that an `#include` gives it."""
        return dict(sorted(_texts(self.root)))

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for name, text in self.texts.items():
            for part in (name, text):
                content = part.encode()
                digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


def _texts(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _texts(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith((".cu", ".cuh")):
            yield prefix + entry.name, entry.read_text(encoding="utf-8")


@cache
def packaged() -> Sources:
    """The sources of this installation: package data of a wheel, `cuda/` of a checkout."""
    data = resources.files("cuneigh") / "_cuda"  # in a folder or in an archive
    return Sources(data if data.is_dir() else Path(__file__).resolve().parents[2] / "cuda")
