"""What the README shows is so."""

import re
import shlex
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from helpers.imports import Package, strings_of

import cuneigh
from cuneigh import cli
from cuneigh._backends import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", blocks("python"))
def test_examples_run(code: str) -> None:
    for framework in re.findall(r"^import (jax|torch)$", code, re.MULTILINE):
        pytest.importorskip(framework)
    if "natten" in code:
        pytest.importorskip("torch")
    exec(compile(code, "README.md", "exec"), {})


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {name for names in re.findall(r"'\.\[(.+?)\]'", README) for name in names.split(",")}
    assert named
    assert named <= project["optional-dependencies"].keys()


def test_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"python -m cuneigh (.*)", "".join(blocks("sh")))
    assert len(commands) > 1
    for command in commands:
        name, *arguments = shlex.split(command)
        monkeypatch.setattr(cli.COMMANDS[name], "run", lambda options: 0)
        assert cli.main([name, *arguments]) == 0


def test_backends_are_those_of_the_code() -> None:
    table = README.split("## Backends")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [each.NAME for each in BACKENDS]


def test_environment_variables_are_those_of_the_code() -> None:
    """Wherever a module has the name of one as a string, whatever it reads it with."""
    package = Package(ROOT / "cuneigh")
    strings = {constant.value for tree in package.trees.values() for constant in strings_of(tree)}
    names = {text for text in strings if re.fullmatch(r"CUNEIGH_[A-Z0-9_]+", text)}
    kernels = "".join(path.read_text() for path in (ROOT / "cuda").rglob("*.cuh"))
    variables = names - set(re.findall(r"^#ifdef (CUNEIGH_\w+)", kernels, re.MULTILINE))
    assert variables == set(re.findall(r"^\| `(CUNEIGH_\w+)`", README, re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md", "bench/NOTES.md"])
def test_files_that_documents_name_are_there(document: str) -> None:
    """Folders, files, and modules without their suffix."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:cuneigh|cuda|bench|tests)/[\w./-]*\w", text):
        assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), path


def test_the_error_message_is_the_real_one() -> None:
    (message,) = blocks("text")
    array = np.zeros((1, 56, 56, 1, 1))
    with pytest.raises(ValueError, match=f"^{re.escape(message.strip())}$"):
        cuneigh.na2d(array, array, array, kernel_size=9, dilation=7)


# What is made of results and of backends


@pytest.fixture(scope="module")
def made() -> Any:
    """`bench/readme.py`."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return import_module("readme")
    finally:
        sys.path.remove(str(ROOT / "bench"))


def test_it_is_short() -> None:
    assert README.count("\n") <= 200


def test_numbers_and_the_support_matrix_are_up_to_date(made: Any) -> None:
    assert made.with_parts(README) == README, "run python bench/readme.py"
    assert made.BENCHMARKS.read_text(encoding="utf-8") == made.benchmarks()


def test_figures_are_those_of_the_committed_results(made: Any) -> None:
    drawn = {name for name, figure in made.figures.FIGURES_BY_NAME.items() if figure.can_be_drawn}
    assert {path.name for path in made.FIGURES.iterdir()} == drawn | {made.PLAN.name}
    for name in drawn:
        with PIL.Image.open(made.FIGURES / name) as picture:
            digest = made.figures.FIGURES_BY_NAME[name].digest()
            assert picture.text["Source"] == digest, "run python bench/readme.py"
    with PIL.Image.open(made.PLAN) as picture:
        assert picture.text["Source"] == made.plan_source(made.plan_scene())


def test_pictures_are_there_and_small() -> None:
    for document in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        pictures = re.findall(r"!\[.*?\]\((.+?)\)", document.read_text(encoding="utf-8"))
        assert pictures
        for picture in pictures:
            assert (document.parent / picture).stat().st_size < 200_000, picture
