"""What the modules of a package import, read from their source: nothing is imported for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path


class Package:
    """The modules of one package by their full names, and which of them each imports.

    An import counts wherever it stands: at the top of a module, in a function, or under
    ``TYPE_CHECKING``. So does the name of a module as a string, since ``import_module`` takes it.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.name = folder.parent, folder.name
        self.files = {self.name_of(file): file for file in sorted(folder.rglob("*.py"))}

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """What each module is parsed to."""
        return {
            name: ast.parse(file.read_text(encoding="utf-8")) for name, file in self.files.items()
        }

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        return {name: set(self._imports_of(tree)) - {name} for name, tree in self.trees.items()}

    def name_of(self, file: Path) -> str:
        parts = file.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _imports_of(self, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            match node:
                case ast.Import(names=aliases):
                    yield from (self._module(alias.name) for alias in aliases if self._owns(alias))
                case ast.ImportFrom(level=level) if level:
                    raise AssertionError(f"relative import in line {node.lineno}")
                case ast.ImportFrom(module=str(module)) if self._owns(module):
                    yield from (self._module(f"{module}.{alias.name}") for alias in node.names)
                case ast.Constant(value=str(text)) if text != self.name and text in self.files:
                    yield text
                case ast.JoinedStr(values=[ast.Constant(value=str(start)), *_]):
                    # Such as f"cuneigh._frameworks.{name}", which may be any module of that folder
                    folder = start.rstrip(".")
                    if start.endswith(".") and folder in self.files:
                        yield from (name for name in self.files if name.startswith(start))

    def _owns(self, imported: str | ast.alias) -> bool:
        name = imported if isinstance(imported, str) else imported.name
        return name.split(".")[0] == self.name

    def _module(self, name: str) -> str:
        """The module that an import of `name` loads: `name`, or the one that holds it."""
        return name if name in self.files else name.rpartition(".")[0]

    def circle(self) -> list[str] | None:
        """Modules each of which imports the next, the last of them the first; None if none do."""
        finished: set[str] = set()
        path: list[str] = []

        def visit(name: str) -> list[str] | None:
            if name in path:
                return [*path[path.index(name) :], name]
            if name in finished:
                return None
            path.append(name)
            for imported in sorted(self.imports[name]):
                found = visit(imported)
                if found is not None:
                    return found
            path.pop()
            finished.add(name)
            return None

        return next((found for found in map(visit, self.files) if found is not None), None)


def is_within(name: str, package: str) -> bool:
    """Whether the module `name` is `package` or lies in it."""
    return name == package or name.startswith(f"{package}.")


def strings_of(tree: ast.Module) -> Iterator[ast.Constant]:
    """The string constants of a module apart from docstrings and ``Literal`` types."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):  # parents come before their children
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_literal = isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal")
        if node in skipped or is_docstring or is_literal:
            skipped.update(ast.iter_child_nodes(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node
