"""The table of backends: what a new one must be, and where it then appears."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from helpers import toy_backend
from helpers.toy_kernel import needs_nvrtc

import cuneigh
from cuneigh import _backends, _jit
from cuneigh._backends import BACKENDS, Backend, BackendName, fused
from cuneigh._backends.fused.small.plan import SmallPlan
from cuneigh._device import CPU, of_capability
from cuneigh._jit import _build
from cuneigh._parameters import window_arguments
from cuneigh._problem import Spec
from cuneigh._validate import attention_problem
from cuneigh.cli import main

TOY_SOURCES = Path(toy_backend.__file__).parent / "cuda"


def attention(dtype: str):
    query = Spec((1, 8, 2, 16), dtype)
    window = window_arguments("test", 1, 3, 1, 1, False)
    return attention_problem("test", "forward", query, query, query, window, None)


def test_the_type_of_names_lists_all_backends():
    assert get_args(BackendName) == tuple(backend.NAME for backend in BACKENDS)


@pytest.mark.parametrize("backend", [*BACKENDS, toy_backend], ids=lambda backend: backend.NAME)
def test_a_backend_has_what_the_contract_asks_for(backend):
    assert isinstance(backend.NAME, str)
    assert all(isinstance(name, str) for name in backend.SETTINGS)
    for name in ("unsupported", "predicted_ms", "kernels", "forward", "backward"):
        asked = list(inspect.signature(getattr(Backend, name)).parameters)[1:]
        offered = list(inspect.signature(getattr(backend, name)).parameters)
        if name in ("forward", "backward"):  # whose last argument is called after the space
            asked, offered = asked[:-1], offered[:-1]
        assert offered == asked, f"{backend.NAME}.{name}"


@pytest.fixture
def with_toy(monkeypatch, tmp_path):
    """The toy backend stands behind the others: one folder, and one element of `BACKENDS`."""
    monkeypatch.setattr(_backends, "BACKENDS", (*BACKENDS, toy_backend))
    monkeypatch.setenv("CUNEIGH_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("with_toy")
def test_a_new_backend_is_found_by_its_name():
    query = np.random.default_rng(0).standard_normal((1, 8, 2, 16), dtype=np.float32)
    found = cuneigh.na1d(query, query, query, 3, backend="toy")
    np.testing.assert_allclose(found, cuneigh.na1d(query, query, query, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("with_toy")
def test_a_new_backend_is_asked_when_none_is_named():
    assert _backends.choose(attention("float32"), of_capability((9, 0)), "toy") is toy_backend
    with pytest.raises(ValueError, match=r"is not one of .*'cpu', 'toy'"):
        _backends.choose(attention("float32"), CPU, "another")
    with pytest.raises(RuntimeError, match="toy: computes in float32, not in float16"):
        _backends.choose(attention("float16"), CPU, "toy")


def test_every_backend_gives_its_reason(monkeypatch):
    *on_gpu, _ = BACKENDS
    monkeypatch.setattr(_backends, "BACKENDS", (*on_gpu, toy_backend))
    with pytest.raises(RuntimeError, match="no backend can run") as caught:
        _backends.choose(attention("float16"), CPU, None)
    told = str(caught.value)
    assert told.index("fused: needs arrays on a CUDA device") < told.index("toy: computes in float")


@pytest.mark.usefixtures("with_toy")
def test_doctor_shows_and_tests_a_new_backend(capsys):
    assert main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any(line[:3] == ["toy", "on", "CPU"] for line in lines)
    assert any(line[:4] == ["toy,", "CPU", "float32", "ok,"] for line in lines)


@needs_nvrtc
@pytest.mark.parametrize("arch_specific", [False, True])
def test_compile_compiles_the_kernels_of_a_new_backend(
    arch_specific, monkeypatch, tmp_path, capsys
):
    """For the architecture that was asked for, or the variant of it that the kernels need."""
    monkeypatch.setattr(_backends, "BACKENDS", (toy_backend,))
    sources = _jit.Sources(TOY_SOURCES)
    monkeypatch.setattr(_build, "packaged", lambda: sources)
    kernels = [
        replace(kernel, arch_specific=arch_specific)
        for kernel in toy_backend.kernels(attention("float32"), CPU)
    ]
    monkeypatch.setattr(toy_backend, "kernels", lambda problem, device: kernels)
    options = "--arch sm_90 --rank 1 --dtype float32 float16 --head-dim 16"
    assert main(["compile", *options.split(), "--cache-dir", str(tmp_path)]) == 0
    kernel, last = capsys.readouterr().out.splitlines()
    assert kernel.split()[:2] == ["sm_90a" if arch_specific else "sm_90", "toy/fill"]
    assert last.startswith("1 kernels in")


@pytest.mark.usefixtures("with_toy")
def test_the_settings_of_a_new_backend_are_read(monkeypatch):
    before = _backends.settings()
    monkeypatch.setenv("TOY_SETTING", "1")
    assert _backends.settings() != before
    monkeypatch.setenv("ANOTHER", "1")
    monkeypatch.delenv("TOY_SETTING")
    assert _backends.settings() == before


def test_settings_are_what_the_backends_name(monkeypatch):
    names = {name for backend in BACKENDS for name in backend.SETTINGS}
    assert len(_backends.settings()) == len(names)
    for name in ("CUNEIGH_WORKSPACE_BYTES", "CUNEIGH_ALLOW_TF32"):
        before = _backends.settings()
        monkeypatch.setenv(name, "1")
        assert _backends.settings() != before


@pytest.mark.parametrize(
    ("tokens", "kernel_size", "heads", "dim", "forward", "backward"),
    [
        ((14, 14), 7, 4, 64, "fused", "fused"),
        ((28, 28), 7, 2, 32, "fused", "fused"),
        ((56, 56), 7, 1, 64, "fused", "fused"),
        ((16, 16), 3, 8, 32, "naive", "fused"),
        ((2048,), 512, 1, 128, "hopper", "hopper"),
    ],
)
def test_small_problems_take_what_was_the_fastest(
    tokens, kernel_size, heads, dim, forward, backward
):
    """Of a few blocks, as measured on an H200 (bench/NOTES.md, "Choice on small problems").

    `fused` takes its kernels for small windows there.
    """
    query = Spec((1, *tokens, heads, dim), "bfloat16")
    window = window_arguments("test", len(tokens), kernel_size, 1, 1, False)
    problem = attention_problem("test", "forward", query, query, query, window, None)
    h200 = replace(of_capability((9, 0)), name="NVIDIA H200", sm_count=132, memory=139 << 30)
    for operation, wanted in ((problem, forward), (problem.gradient, backward)):
        name = _backends.choose(operation, h200, None).NAME
        assert name == wanted
        if wanted == "fused":
            plans = fused.plans(operation, h200)
            assert all(isinstance(each[0], SmallPlan) for each in plans.values())
