"""Environment variables: legal texts, and errors that say which variable holds what."""

from __future__ import annotations

import os

import pytest

from cuneigh import _settings
from cuneigh._backends import gemm
from cuneigh._backends.cpu.threads import thread_count
from cuneigh._messages import SHOWN
from cuneigh._settings import SETTINGS

ILLEGAL = {
    "CUNEIGH_WORKSPACE_BYTES": ["abc", "-1", "512MiBs", "1e999", "nan", "1,5", "0x10", "5 M"],
    "CUNEIGH_NUM_THREADS": ["many", "0", "-2", "1.5", "100000", "2,2"],
    "CUNEIGH_ALLOW_TF32": ["2", "maybe"],
    "CUNEIGH_PRINT_PLANS": ["2", "11"],
    "CUNEIGH_TRUST_CACHE_DIR": ["all"],
    "CUNEIGH_TUNED": ["-1"],
    "CUNEIGH_QUIET": ["very"],
    "CUNEIGH_LINE_INFO": ["3"],
    "CUNEIGH_CACHE_DIR": ["~nosuchuser/x"],
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_an_illegal_text_is_named_with_what_is_legal(setting, monkeypatch):
    for text in ILLEGAL[setting.name]:
        monkeypatch.setenv(setting.name, text)
        with pytest.raises(ValueError, match="must be") as error:
            setting.read()
        for word in (setting.name, repr(text), setting.legal):
            assert word in str(error.value)
    monkeypatch.setenv(setting.name, "y" * 10**6)
    if setting is not _settings.CACHE_DIR:
        with pytest.raises(ValueError, match="must be") as error:
            setting.read()
        assert len(str(error.value)) < SHOWN + 200
    for text in ("", "  "):
        monkeypatch.setenv(setting.name, text)
        assert setting.read() is None
    monkeypatch.delenv(setting.name)
    assert setting.read() is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000000", 10**6),
        (" 1e9 ", 10**9),
        ("512MiB", 512 << 20),
        ("1.5 GB", 1_500_000_000),
        ("2kb", 2000),
        ("1TiB", 1 << 40),
        ("100B", 100),
    ],
)
def test_sizes(text, size, monkeypatch):
    monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", text)
    assert _settings.WORKSPACE_BYTES.read() == gemm.plan.workspace_limit() == size


@pytest.mark.parametrize("text", ["1", "yes", "True", "on", "0", "no", "FALSE", "off"])
def test_flags(text, monkeypatch):
    monkeypatch.setenv("CUNEIGH_ALLOW_TF32", text)
    assert gemm.plan.allows_tf32() is (text in ("1", "yes", "True", "on"))


def test_the_number_of_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUNEIGH_NUM_THREADS", "5")
    assert thread_count() == 5
    monkeypatch.delenv("CUNEIGH_NUM_THREADS")
    for text, count in {"3": 3, "1,1": 1, " 4 , 2": 4}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert thread_count() == count
    for text in ("0", "many", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert 1 <= thread_count() <= os.cpu_count()
