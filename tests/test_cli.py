"""The command line: `compile` fills a cache that serves real calls, `doctor` sees what is wrong."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cuneigh import _backends, _device, _jit
from cuneigh._backends import BACKENDS, Backend, cpu, fused, hopper, naive
from cuneigh._device import of_capability
from cuneigh._jit import _build as build
from cuneigh._jit import _compiler as compiler
from cuneigh._parameters import Window
from cuneigh._problem import DTYPES, Spec
from cuneigh._validate import attention_problem, qk_problem
from cuneigh.cli import doctor, main

needs_nvrtc = pytest.mark.skipif(
    compiler.version() is None or compiler.header_directory() is None,
    reason="NVRTC and the CUDA headers are not installed",
)


@pytest.fixture(autouse=True)
def cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUNEIGH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_runs_as_a_module_from_anywhere(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cuneigh", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("doctor", "demo", "compile"):
        assert command in result.stdout


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["compile"], ["doctor", "extra"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: python -m cuneigh" in capsys.readouterr().err


# compile


def assert_cached(kernels: list[_jit.Kernel], arch: str, directory: Path) -> None:
    assert kernels
    cache = _jit.Cache(directory)
    for kernel in kernels:
        assert build.find(kernel, arch, cache=cache), f"{kernel.name}:\n{kernel.plan}"


@needs_nvrtc
def test_compile_serves_a_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled is what a call of any size and window loads.

    It is a matter of names, so that nothing is compiled: kernels of the same backends are by the
    next two tests, and those of this problem by the tests of their backends.
    """
    built = compiler.Built(b"cubin", "entry", _jit.Resources(1, 0, 0, 0, 0))
    monkeypatch.setattr(compiler, "build", lambda kernel, arch, sources: built)
    options = "--rank 2 --dtype bfloat16 --head-dim 32 --arch sm_90a sm_80"
    assert main(["compile", *options.split(), "--cache-dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert str(tmp_path) in output.splitlines()[-1]
    assert "naive/forward" in output

    window = Window((7, 8), (2, 1), (1, 3), (False, True))
    query, key = (Spec((3, 56, 40, heads, 32), "bfloat16") for heads in (8, 4))
    not_dilated = Window((7, 8), (2, 1), (1, 1), (False, True))
    for operation, of_call in itertools.product(("forward", "backward"), (window, not_dilated)):
        problem = attention_problem("test", operation, query, key, key, of_call, None)
        for arch in ("sm_90a", "sm_80"):
            device = of_capability((9, 0) if arch == "sm_90a" else (8, 0))
            for backend in (hopper, fused, naive):
                if backend.unsupported(problem, device) is None:
                    assert_cached(backend.kernels(problem, device), arch, tmp_path)


@needs_nvrtc
def test_compile_with_features(tmp_path: Path) -> None:
    options = (
        "--rank 1 --dtype float16 --head-dim 64 --operation qk_backward qk --additional-keys "
        "--rpb float32 --arch sm_90 --jobs 1"
    )
    assert main(["compile", *options.split(), "--cache-dir", str(tmp_path)]) == 0
    window = Window((5,), (1,), (1,), (False,))
    query = Spec((1, 20, 2, 64), "float16")
    rpb, additional = Spec((2, 9), "float32"), Spec((1, 3, 2, 64), "float16")
    for operation in ("qk", "qk_backward"):
        problem = qk_problem("test", operation, query, query, window, 1.0, rpb, additional)
        assert_cached(naive.kernels(problem, of_capability((9, 0))), "sm_90", tmp_path)


def test_compile_for_any_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: set[_jit.Kernel] = set()

    def precompile(kernels: list[_jit.Kernel], *_: Any, **__: Any) -> dict[Any, Any]:
        compiled.update(kernels)
        return {}

    monkeypatch.setattr(_jit, "precompile", precompile)
    options = "--any-scale --rank 1 --dtype float16 --head-dim 64 --operation forward --arch sm_90"
    assert main(["compile", *options.split()]) == 0
    query, window = Spec((1, 64, 2, 64), "float16"), Window((3,), (1,), (1,), (False,))
    for scale in (None, 0.0, -2.0):
        problem = attention_problem("test", "forward", query, query, query, window, scale)
        for backend in (hopper, fused):
            assert compiled.issuperset(backend.kernels(problem, of_capability((9, 0))))


@needs_nvrtc
def test_compile_fills_the_usual_cache(cache_directory: Path) -> None:
    options = "--arch sm_80 --rank 1 --dtype float32 --head-dim 8 --value-dim 4"
    assert main(["compile", *options.split(), "--operation", "av"]) == 0  # the fewest kernels
    assert _jit.Cache(cache_directory).contents()[0] > 0


@needs_nvrtc
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_10"], "does not know the architecture 'sm_10'; it compiles for sm_"),
        (["--arch", "sm_80", "--cache-dir", "{file}/cache"], "Not a directory"),
    ],
)
def test_compile_fails(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = [argument.format(file=tmp_path / "file") for argument in arguments]
    options = ["--rank", "1", "--dtype", "float32", "--head-dim", "8"]
    assert main(["compile", *options, *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--head-dim", "0"), ("--rank", "4"), ("--dtype", "int8")]
)
def test_compile_refuses(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"--arch": "sm_80", "--rank": "1", "--dtype": "float32", "--head-dim": "8"}
    arguments = [word for pair in (options | {option: value}).items() for word in pair]
    with pytest.raises(SystemExit):
        main(["compile", *arguments])
    assert f"argument {option}: invalid" in capsys.readouterr().err


# doctor


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "All that should work here works." in output
    assert "PROBLEM" not in output
    tested = output[output.index("Self-test") :]
    for dtype in DTYPES:
        assert any(
            line.split()[:4] == ["cpu,", "CPU", dtype, "ok,"] for line in tested.splitlines()
        )


@pytest.mark.parametrize("backend", [each for each in BACKENDS if each.NAME != "cpu"])
def test_doctor_has_a_problem_for_every_backend(backend: Backend) -> None:
    device = of_capability((9, 0))
    reasons = [doctor._case(backend, device, dtype)[1] for dtype in DTYPES]
    assert None in reasons, reasons


@pytest.mark.gpu
def test_doctor_tests_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for dtype in DTYPES:
        assert any(
            line.split()[:5] == ["naive,", "GPU", "0", dtype, "ok,"] for line in output.splitlines()
        )


def test_doctor_without_cupy() -> None:
    script = (
        "import sys; sys.modules['cupy'] = None\n"
        "from cuneigh.cli import main; sys.exit(main(['doctor']))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == (1 if doctor._driver()[1] else 0), result.stderr
    assert "pip install 'cuneigh[cuda13]'" in result.stdout or sys.platform == "darwin"


def test_doctor_finds_a_gpu_without_cupy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: (13000, 1))
    monkeypatch.setattr(_jit, "unavailable", lambda: "CuPy is not installed: pip install it")
    assert main(["doctor"]) == 1
    assert "1. CuPy: there is a GPU, but CuPy is not installed" in capsys.readouterr().out


@needs_nvrtc
def test_doctor_finds_an_old_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cupy

    def refuse() -> Any:
        raise cupy.cuda.runtime.CUDARuntimeError(35)

    monkeypatch.setattr(doctor, "_driver", lambda: (12040, 1))
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", refuse)
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "the driver supports CUDA 12.4" in output
    assert "update the driver" in output


def test_doctor_finds_an_unwritable_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUNEIGH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(_backends, "BACKENDS", ())
    code = main(["doctor"])
    assert code == (1 if doctor._driver()[1] else 0), "the cache is for GPUs"
    assert "set CUNEIGH_CACHE_DIR to a directory" in capsys.readouterr().out


def test_doctor_finds_illegal_environment_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    illegal = {"CUNEIGH_CACHE_DIR": "~nosuchuser/x", "CUNEIGH_WORKSPACE_BYTES": "abc"}
    for name, text in illegal.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("CUNEIGH_NUM_THREADS", "2")
    monkeypatch.setattr(_backends, "BACKENDS", ())
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    for name, text in illegal.items():
        assert f"{name}: the environment has {name}={text!r}, but it must be" in output
    assert ["CUNEIGH_NUM_THREADS", "2"] in [line.split() for line in output.splitlines()]
    assert (
        main(
            [
                "compile",
                *["--arch", "sm_80", "--rank", "1", "--dtype", "float32", "--head-dim", "8"],
            ]
        )
        == 1
    )
    assert "CUNEIGH_CACHE_DIR='~nosuchuser/x'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["compile", "--help"])


@pytest.mark.parametrize(
    ("driver", "installed", "advised"),
    [
        (0, set(), {"cuda13", "cuda12"}),
        (0, {"cupy-cuda12x"}, {"cuda12"}),
        (0, {"cupy-cuda13x"}, {"cuda13"}),
        (12080, set(), {"cuda12"}),
        (12080, {"cupy-cuda13x"}, {"cuda12"}),
        (13000, {"cupy-cuda12x"}, {"cuda12"}),
        (13010, set(), {"cuda13"}),
    ],
)
def test_what_to_install_fits_the_machine(
    driver: int, installed: set[str], advised: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_device, "driver_version", lambda: driver)
    monkeypatch.setattr(_device, "_is_installed", installed.__contains__)
    assert set(re.findall(r"'cuneigh\[(\w+)\]'", _device.installation())) == advised


def wrong(problem: Any, operands: Any, output: Any, lse: Any, allocate: Any) -> None:
    cpu_forward(problem, operands, output, lse, allocate)
    output *= 1.5


def crashing(*arguments: Any) -> None:
    raise ZeroDivisionError("no reason")


cpu_forward = cpu.forward


@pytest.mark.parametrize(
    ("forward", "message"),
    [(wrong, "float32: output is wrong"), (crashing, "float32: ZeroDivisionError: no reason")],
)
def test_doctor_finds_a_broken_backend(
    forward: Callable[..., None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cpu, "forward", forward)
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "Problems" in output
    assert f"cpu, CPU: {message}" in output
