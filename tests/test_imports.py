"""What may import what, what may name what, what an import costs, and what the package offers."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import pickle
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType

import pytest
from helpers.imports import Package, is_within, strings_of

import cuneigh
from cuneigh._backends import BACKENDS

ROOT = Path(__file__).parents[1]
PACKAGE = Package(ROOT / "cuneigh")
CUDA = ROOT / "cuda"
SOURCES = sorted(path.relative_to(CUDA).as_posix() for path in CUDA.rglob("*.cu*"))
NAMES = [backend.NAME for backend in BACKENDS]

PURE = {
    "cuneigh._window",
    "cuneigh._problem",
    "cuneigh._device",
    "cuneigh._settings",
    "cuneigh._messages",
}
"""What is to be computed and on what: modules that load no array library and no kernel."""

MAY_IMPORT = {
    "cuneigh._window": set(),
    "cuneigh._device": set(),
    "cuneigh._messages": set(),
    "cuneigh._settings": {"cuneigh._messages"},
    "cuneigh._problem": {"cuneigh._window"},
    "cuneigh._parameters": {"cuneigh._window", "cuneigh._messages"},
    "cuneigh._validate": {
        *("cuneigh._window", "cuneigh._problem", "cuneigh._parameters", "cuneigh._messages"),
    },
    "cuneigh._shards": {"cuneigh._window"},
    "cuneigh.reference": PURE,
    "cuneigh._jit": PURE,
    "cuneigh._gpu": {*PURE, "cuneigh._jit"},
    "cuneigh._frameworks.contract": PURE,
    "cuneigh._frameworks.numpy": {*PURE, "cuneigh._frameworks.contract"},
    "cuneigh._frameworks.cupy": {*PURE, "cuneigh._frameworks.contract"},
    "cuneigh._programs": {
        *PURE,
        "cuneigh._gpu",
        "cuneigh._backends",
        "cuneigh._frameworks.contract",
    },
    "cuneigh._call": {
        *(*PURE, "cuneigh._gpu", "cuneigh._backends", "cuneigh._frameworks.contract"),
        "cuneigh._programs",
    },
    **{f"cuneigh._backends.{name}": {*PURE, "cuneigh._jit", "cuneigh._gpu"} for name in NAMES},
}
"""The modules and packages that may import nothing of cuneigh but themselves and these."""

IMPORTED_BY = {
    "cuneigh.torch": {"cuneigh.compat"},
    "cuneigh.jax": set(),
    "cuneigh.compat": set(),
    "cuneigh.cli": {"cuneigh.__main__"},
    "cuneigh._measure": {"cuneigh.cli"},
}
"""What users import or run, what only measuring needs, and the only others that may import it."""


# Imports


def test_no_module_imports_itself_through_others():
    circle = PACKAGE.circle()
    assert circle is None, " -> ".join(circle)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_of_the_lower_layers(package):
    allowed = {package, *MAY_IMPORT[package]}
    for module in PACKAGE.files:
        if is_within(module, package):
            for imported in PACKAGE.imports[module]:
                assert any(is_within(imported, each) for each in allowed), (
                    f"{module} imports {imported}"
                )


@pytest.mark.parametrize("package", IMPORTED_BY)
def test_what_users_import_is_not_imported_from_below(package):
    allowed = {package, *IMPORTED_BY[package]}
    for module, imports in PACKAGE.imports.items():
        if not any(is_within(module, each) for each in allowed):
            for imported in imports:
                assert not is_within(imported, package), f"{module} imports {imported}"


@pytest.mark.parametrize(
    ("a", "others"),
    [
        ("from package import b", {"b": "import package.a"}),
        ("import package.b.c", {"b/__init__": "", "b/c": "def f():\n from package.a import g"}),
        ("if TYPE_CHECKING: from package.b import B", {"b": "from package import a"}),
        ("from package import b", {"b": "TABLE = {'a': 'package.a'}"}),
        (
            "import package.b",
            {"b": "import_module(f'package.c.{x}')", "c/d": "import package.a", "c/__init__": ""},
        ),
    ],
)
def test_every_kind_of_circle_is_found(a, others, tmp_path):
    for name, text in {"__init__": "", "a": a, **others}.items():
        file = tmp_path / "package" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    circle = Package(tmp_path / "package").circle()
    assert circle is not None
    assert circle[0] == circle[-1]
    assert "package.a" in circle
    (tmp_path / "package" / "a.py").write_text("import package")
    assert Package(tmp_path / "package").circle() is None


# Names of backends


@pytest.mark.parametrize("module", PACKAGE.files)
def test_only_the_table_of_backends_names_them(module):
    """No module imports a backend or has its name in a string, apart from docstrings and types.

    The table is `cuneigh._backends`, and a backend may name itself. "cpu" is a kind of device, too.
    """
    if module == "cuneigh._backends":
        return
    foreign = [name for name in NAMES if not is_within(module, f"cuneigh._backends.{name}")]
    for name in foreign:
        for imported in PACKAGE.imports[module]:
            assert not is_within(imported, f"cuneigh._backends.{name}"), f"imports {imported}"
    words = re.compile(rf"\b({'|'.join(name for name in foreign if name != 'cpu')})\b")
    for constant in strings_of(PACKAGE.trees[module]):
        assert not words.search(constant.value), f"line {constant.lineno}: {constant.value!r}"


def test_strings_are_told_from_docstrings_and_types():
    tree = ast.parse(
        '"""fused"""\n'
        'Name = Literal["fused", "naive"]\n'
        'other: typing.Literal["fused"] = "one"\n'
        '"""What fused is."""\n'
        'def f(name="two"):\n    "fused"\n    return f"three {name}"\n'
    )
    assert [constant.value for constant in strings_of(tree)] == ["one", "two", "three "]


# Kernels


@pytest.mark.parametrize("source", SOURCES)
def test_kernels_include_what_is_shared_and_what_lies_in_their_folder_or_above(source):
    """A file of ``fused/small/`` may include those of ``fused/``, but not the other way round."""
    folders = [f"{folder.as_posix()}/" for folder in Path(source).parents if folder.name]
    text = (CUDA / source).read_text(encoding="utf-8")
    for included in re.findall(r'^\s*#\s*include\s*"(.*)"', text, re.MULTILINE):
        assert included in SOURCES, f"{source} includes {included}, which is not there"
        folder = f"{Path(included).parent.as_posix()}/"
        assert folder in ("cuneigh/", *folders), f"{source} includes {included}"


def test_the_folder_of_kernels_is_no_python_package():
    # `cuda` is a namespace package of NVIDIA's; a package of that name here would hide it.
    assert CUDA.is_dir()
    assert not list(CUDA.rglob("*.py"))


# What an import costs


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, with these variables beside those of this process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_framework_is_needed_or_imported():
    run(
        """
import sys
frameworks = ("cupy", "torch", "jax")
sys.modules.update(dict.fromkeys(frameworks))  # importing any of them raises ImportError
import numpy, cuneigh
query = numpy.ones((1, 9, 1, 4))
assert cuneigh.na1d(query, query, query, 3).shape == query.shape
cuneigh.merge_attentions([query], [query[..., 0]])
assert not any(sys.modules[framework] for framework in frameworks)
assert "scipy" not in sys.modules
"""
    )


def test_the_import_is_quick(tmp_path):
    code = """
import time
begin = time.process_time()
import numpy
start = time.process_time()
import cuneigh
print((time.process_time() - start) / max(0.1, start - begin))
"""
    # Bytecode, as every installed package has, also where none is to be written beside the sources
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    # Processor time, and the least of a few: the machine may be busy with something else, and slow,
    # as NumPy's import tells, which takes 0.1 s or more.
    assert min(float(run(code, **bytecode)) for _ in range(5)) < 1.5


# What is public


def test_all_names_what_is_public():
    public = {
        name
        for name, value in vars(cuneigh).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert sorted(public) == cuneigh.__all__


@pytest.mark.parametrize("name", cuneigh.__all__)
def test_everything_public_is_documented_and_found_by_its_name(name):
    value = getattr(cuneigh, name)
    assert inspect.getdoc(value)
    assert pickle.loads(pickle.dumps(value)) is value


@pytest.mark.parametrize("name", cuneigh.__all__)
def test_types_are_found_at_run_time(name):
    value = getattr(cuneigh, name)
    hints = typing.get_type_hints(value)
    if inspect.isfunction(value):
        assert hints.keys() == {*inspect.signature(value).parameters, "return"}


@pytest.mark.parametrize("module", PACKAGE.files)
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(PACKAGE.trees[module])


def test_kernels_of_bfloat16_are_named_without_ml_dtypes():
    """NumPy has no such dtype of its own."""
    run(
        """
import sys
from cuneigh._backends import BACKENDS
from cuneigh._device import of_capability
from cuneigh._problem import Problem
from cuneigh._window import Axis

device = of_capability((9, 0))
problem = Problem("forward", "bfloat16", 1, 1, 1, 64, 64, (Axis(8, 8, 3, 1, 1, False),), 1.0)
for backend in BACKENDS:
    assert backend.unsupported(problem, device) or backend.kernels(problem, device)
assert "ml_dtypes" not in sys.modules
"""
    )


@pytest.mark.parametrize(
    "script", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.stem
)
def test_benchmarks_import_what_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cuneigh":
            module = importlib.import_module(node.module or "")
            missing = [each.name for each in node.names if not found_in(module, each.name)]
            assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize(
    "script", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.stem
)
def test_benchmarks_run_their_main(script: Path) -> None:
    body = ast.parse(script.read_text(encoding="utf-8")).body
    has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)
    assert has_main == ast.unparse(body[-1]).startswith("if __name__ == '__main__':")


def found_in(module: ModuleType, name: str) -> bool:
    return hasattr(module, name) or bool(importlib.util.find_spec(f"{module.__name__}.{name}"))
