"""What may import what, what an import costs, and what the package offers."""

from __future__ import annotations

import ast
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cuneigh

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cuneigh"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    {"_window"},
    {"_problem"},
    {"_device", "reference"},
    {"_fused_plan", "_gemm_plan", "_plan"},
    {"_halo_plan"},
    {"_jit"},
    {"_arrays", "_backends"},
    {"_ops"},
    {"cuneigh"},
    {"torch", "jax"},
    {"compat"},
    {"cli"},
    {"__main__"},
)
"""The parts of the package, lowest first. A part imports only from lower layers and from itself."""

FACES = {("_arrays", "torch"), ("_arrays", "jax")}
"""The one exception: for an array whose framework has no face yet, it is imported by name."""


def part_of(name: str) -> str:
    """The part that the module called `name` belongs to."""
    return name.split(".")[1] if "." in name else name


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere, and those it imports by name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else str(node.module) for name in modules]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if is_module(node.value) else []
        yield from (name for name in names if name.split(".")[0] == "cuneigh")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name.startswith("cuneigh.") and (path.with_suffix(".py").is_file() or path.is_dir())


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_downwards(file):
    height = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}
    own = part_of(name_of(file))
    for imported in map(part_of, imports_of(file)):
        if imported != own and (own, imported) not in FACES:
            assert height[imported] < height[own], f"{own} imports {imported}"


def test_the_folder_of_kernels_is_no_python_package():
    # `cuda` is a namespace package of NVIDIA's; a package of that name here would hide it.
    assert (ROOT / "cuda").is_dir()
    assert not list((ROOT / "cuda").rglob("*.py"))


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
import numpy
start = time.process_time()
import cuneigh
print(time.process_time() - start)
"""
    # Bytecode, as every installed package has, also where none is to be written beside the sources
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    # Processor time, and the least of a few: the machine may be busy with something else.
    assert min(float(run(code, **bytecode)) for _ in range(5)) < 0.150


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


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_module_says_what_it_is(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def test_kernels_of_bfloat16_are_named_without_ml_dtypes():
    """NumPy has no such dtype of its own."""
    statement = (
        "import sys; from cuneigh._backends import fused, gemm, naive; "
        "from cuneigh._problem import Spec; from cuneigh._validate import *; "
        "from cuneigh._device import of_capability; "
        "spec = Spec((1, 8, 1, 64), 'bfloat16'); "
        "window = window_arguments('test', 1, 3, 1, 1, False); "
        "problem = attention_problem('test', 'forward', spec, spec, spec, window, None); "
        "device = of_capability((9, 0)); "
        "assert all(backend.kernels(problem, device) for backend in (fused, gemm, naive)); "
        "assert 'ml_dtypes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", statement], check=True)
