"""Tables and progress: plain without rich and where there is no terminal."""

from __future__ import annotations

import sys
import time

import pytest

from cuneigh.cli import terminal

ROWS = (["one", "1.0"], ["longer", "22.5"], ["a remark about the rows"])


def test_a_plain_table(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(("", "ms"), ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "          ms",
        "one      1.0",
        "longer  22.5",
        "    a remark about the rows",
    ]


def test_a_table_of_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    terminal.print_table(("", "ms"), ROWS)
    printed = capsys.readouterr().out
    assert all(row[-1] in printed for row in ROWS)


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_only_where_it_can_be(
    installed: bool,
    is_terminal: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if installed:
        pytest.importorskip("rich")
    else:
        for module in ("rich", "rich.console", "rich.progress"):
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(terminal.progress(iter("abc"), "counting", 3)) == list("abc")
    error = capsys.readouterr().err
    assert ("counting" in error) == (installed and is_terminal)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_takes_long_says_so(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(terminal, "PATIENCE", 0.05)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.patience("denoising"):
        time.sleep(0.3)
    slow = capsys.readouterr().err
    assert "denoising" in slow
    assert is_terminal or slow == "denoising ..\n"
    monkeypatch.setattr(terminal, "PATIENCE", 10)
    with terminal.patience("denoising"):
        pass
    assert capsys.readouterr().err == ""
