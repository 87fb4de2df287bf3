"""What the README shows is so."""

import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest

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
    code = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("cuneigh/**/*.py"))
    variables = set(re.findall(r'environ.*?"(CUNEIGH_\w+)"', code))
    assert variables == set(re.findall(r"^\| `(CUNEIGH_\w+)`", README, re.MULTILINE))


def test_the_error_message_is_the_real_one() -> None:
    (message,) = blocks("text")
    array = np.zeros((1, 56, 56, 1, 1))
    with pytest.raises(ValueError, match=f"^{re.escape(message.strip())}$"):
        cuneigh.na2d(array, array, array, kernel_size=9, dilation=7)
