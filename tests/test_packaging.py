"""Wheel, sdist and editable install, each in an environment of its own and used from elsewhere."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import cuneigh
from cuneigh import _jit

CHECKOUT = Path(__file__).resolve().parents[1]
CUDA = CHECKOUT / "cuda"
SOURCES = {path.relative_to(CUDA).as_posix() for path in CUDA.rglob("*.cu*")}

USE = """
import numpy as np
import cuneigh
from cuneigh._jit._sources import packaged

value = np.arange(20, dtype="float32").reshape(1, 4, 5, 1, 1)
output = cuneigh.na2d(value, value, value, kernel_size=(4, 5), scale=0)
assert np.allclose(output, value.mean()), output
print(cuneigh.__version__, cuneigh.__file__, packaged().root, *packaged().texts, sep="\\n")
"""

Install = Callable[..., Path]


def run(*command: object, directory: Path = CHECKOUT) -> str:
    """What a command prints, run without this environment's Python settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=directory, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds the sdist, and the wheel that was built from the sdist."""
    directory = tmp_path_factory.mktemp("distributions")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, CHECKOUT)
    return directory


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Installs something in a fresh environment; returns the environment's Python.

    Nothing is downloaded: the packages of the environment that runs the tests are linked into the
    fresh one, all but cuneigh itself.
    """

    def install(*what: object) -> Path:
        environment = tmp_path / "environment"
        venv.create(environment)
        paths = sysconfig.get_paths(vars={"base": str(environment)})
        for package in Path(sysconfig.get_path("purelib")).iterdir():
            if "cuneigh" not in package.name:
                (Path(paths["purelib"]) / package.name).symlink_to(package)
        python = Path(paths["scripts"]) / "python"
        run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", *what)
        return python

    return install


def check(python: Path, elsewhere: Path, package: Path | None, sources: Path | None) -> None:
    """Use what is installed from another directory; None stands for inside the environment."""
    version, file, root, *texts = run(python, "-c", USE, directory=elsewhere).splitlines()
    environment = python.parents[1]
    assert version == cuneigh.__version__
    assert Path(file).is_relative_to(package or environment)
    assert Path(root).is_relative_to(sources or environment)
    assert set(texts) == SOURCES


def test_the_wheel_holds_the_library_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "cuneigh",
        f"cuneigh-{cuneigh.__version__}.dist-info",
    }
    carried = {name.removeprefix("cuneigh/_cuda/") for name in names if "/_cuda/" in name}
    assert carried == SOURCES
    assert "cuneigh/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_tests_and_benchmarks_too(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "tests/test_packaging.py"} <= names
    assert any(name.startswith("bench/") for name in names)
    assert {f"cuda/{name}" for name in SOURCES} <= names


def test_an_installed_sdist_works(distributions: Path, install: Install, tmp_path: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    python = install(sdist)
    check(python, tmp_path, None, None)


def test_an_editable_install_finds_the_sources(install: Install, tmp_path: Path) -> None:
    python = install("--editable", CHECKOUT)
    check(python, tmp_path, CHECKOUT / "cuneigh", CHECKOUT / "cuda")


def test_an_installed_wheel_works_and_compiles_its_kernels(
    distributions: Path, install: Install, tmp_path: Path
) -> None:
    (wheel,) = distributions.glob("*.whl")
    python = install(wheel)
    check(python, tmp_path, None, None)
    if _jit._compiler.version() is None:
        return  # NVRTC is not installed
    # The operation with the fewest kernels: which files a wheel has is a test of its own.
    problem = ("--rank=1", "--dtype=float16", "--head-dim=32", "--operation=av")
    target = ("--arch=sm_90", f"--cache-dir={tmp_path / 'cache'}")
    printed = run(python, "-m", "cuneigh", "compile", *problem, *target, directory=tmp_path)
    assert "naive/av" in printed
    assert list((tmp_path / "cache").rglob("*.cubin"))


def test_cuda_is_no_python_package() -> None:
    # With an __init__.py it would hide the namespace package that CuPy imports cuda.pathfinder of.
    assert not list(CUDA.rglob("*.py"))
