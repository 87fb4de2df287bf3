"""The JIT: what is compiled, when it is compiled again, and what is chosen for a device."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cubin import code_of, length
from helpers.toy_kernel import KERNEL, TOY, needs_nvrtc

from cuneigh import _device, _jit
from cuneigh._jit import Cache, CompilationError, Kernel, Sources
from cuneigh._jit import _build as build
from cuneigh._jit import _compiler as compiler
from cuneigh._jit import _load as load

pytest_plugins = ["helpers.toy_installation"]


# Compiling


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_90a"])
def test_compile_without_gpu(tree: Path, cache: Cache, arch: str) -> None:
    compiled = _jit.compile(KERNEL, arch, cache=cache, sources=Sources(tree))
    assert compiled.cubin.read_bytes().startswith(b"\x7fELF")
    assert compiled.symbol.encode() in compiled.cubin.read_bytes()
    assert (compiled.cubin.parent / "kernel.cu").read_text() == KERNEL.unit
    assert compiled.resources.registers > 0
    assert compiled.resources.spill_stores == compiled.resources.spill_loads == 0


@needs_nvrtc
def test_a_cubin_is_whole(tree: Path, cache: Cache) -> None:
    compiled = _jit.compile(KERNEL, "sm_90", cache=cache, sources=Sources(tree))
    cubin = compiled.cubin.read_bytes()
    assert len(cubin) >= length(cubin)


@needs_nvrtc
def test_resources_are_read_from_the_log(tree: Path, cache: Cache) -> None:
    many = ", ".join(f"x[{i}] + y" for i in range(200))
    (tree / "toy.cu").write_text(
        "namespace cuneigh { template <typename Plan>\n"
        "__global__ void __launch_bounds__(1024) toy(float* x, int at) {\n"
        "  __shared__ float shared[64]; shared[threadIdx.x] = x[at]; __syncthreads();\n"
        f"  float y = shared[at]; float a[] = {{{many}}}; __syncthreads();\n"
        "  for (int i = 0; i < 200; ++i) x[7 * i] = a[i] * a[199 - i]; x[at] += a[at]; } }"
    )
    compiled = _jit.compile(Kernel("toy", ""), "sm_80", cache=cache, sources=Sources(tree))
    assert compiled.resources.registers == 64, "65536 registers for 1024 threads"
    assert compiled.resources.shared == 64 * 4
    assert compiled.resources.stack >= 200 * 4


@needs_nvrtc
def test_spills_are_read_from_the_log(tree: Path, cache: Cache) -> None:
    names = [f"a{i}" for i in range(150)]
    (tree / "toy.cu").write_text(
        "namespace cuneigh { template <typename Plan>\n"
        "__global__ void __launch_bounds__(1024) toy(float* x) {\n"
        + "".join(f"float {name} = x[{i}];" for i, name in enumerate(names))
        + "__syncthreads();\n"
        + "".join(f"x[{7 * i}] = {name};" for i, name in enumerate(reversed(names)))
        + "} }"
    )
    resources = _jit.compile(
        Kernel("toy", ""), "sm_80", cache=cache, sources=Sources(tree)
    ).resources
    assert resources.spill_stores > 0
    assert resources.spill_loads > 0


@needs_nvrtc
def test_errors_name_file_and_line(tree: Path, cache: Cache) -> None:
    (tree / "cuneigh" / "toy.cuh").write_text("#pragma once\n\nint broken = ;\n")
    with pytest.raises(CompilationError, match=r"toy\.cuh\(3\): error") as caught:
        _jit.compile(KERNEL, "sm_80", cache=cache, sources=Sources(tree))
    assert "toy.cuh(3): error" in caught.value.log
    assert str(tree) in str(caught.value)
    assert KERNEL.plan in str(caught.value)
    assert not cache.root.exists(), "nothing is stored"


@needs_nvrtc
def test_errors_in_the_plan_name_the_line(tree: Path, cache: Cache) -> None:
    plan = Kernel("toy", "using Number = number;\nstatic constexpr int kStep = two;")
    with pytest.raises(CompilationError, match=r"plan\.cu\(5\): error"):
        _jit.compile(plan, "sm_80", cache=cache, sources=Sources(tree))
    assert "two" in plan.unit.splitlines()[4]


@needs_nvrtc
def test_errors_of_the_assembler_are_told(tree: Path, cache: Cache) -> None:
    """findings/nvrtc-log-loses-ptxas-error.sh: after statistics, NVRTC's log leaves them out."""
    (tree / "toy.cu").write_text(
        "namespace cuneigh { template <typename Plan> __global__ void toy(float* x) {\n"
        "  __shared__ float shared[100000]; shared[threadIdx.x] = x[0]; __syncthreads();\n"
        "  x[threadIdx.x] = shared[threadIdx.x + 1]; } }"
    )
    with pytest.raises(CompilationError, match="too much shared data"):
        _jit.compile(Kernel("toy", ""), "sm_80", cache=cache, sources=Sources(tree))


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_10", "sm_9O", "compute_90", "90", ""])
def test_unknown_architecture(tree: Path, cache: Cache, arch: str) -> None:
    with pytest.raises(CompilationError, match=rf"architecture '{arch}'; it compiles for sm_"):
        _jit.compile(KERNEL, arch, cache=cache, sources=Sources(tree))


@needs_nvrtc
def test_unknown_kernel(tree: Path, cache: Cache) -> None:
    with pytest.raises(CompilationError, match=r"there is no absent\.cu in .*cuda"):
        _jit.compile(Kernel("absent", ""), "sm_80", cache=cache, sources=Sources(tree))


def test_missing_cupy_says_what_to_install(
    tree: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    compiler._nvrtc.cache_clear()
    monkeypatch.setattr(compiler, "version", compiler.version.__wrapped__)
    with pytest.raises(CompilationError, match=r"pip install 'cuneigh\[cuda13\]'|macOS"):
        _jit.compile(KERNEL, "sm_80", cache=cache, sources=Sources(tree))


@needs_nvrtc
def test_missing_headers_say_what_to_install(
    tree: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_header_directory", compiler._header_directory.__wrapped__)
    monkeypatch.setattr(compiler, "header_directory", lambda: None)
    with pytest.raises(CompilationError, match=r"headers are missing: pip install"):
        _jit.compile(KERNEL, "sm_80", cache=cache, sources=Sources(tree))


WGMMA = """\
#define MULTIPLY \\
  asm volatile("{ wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16" \\
               " {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0; }" \\
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
namespace cuneigh { template <typename Plan>
__global__ void __launch_bounds__(128) toy(float* x, unsigned long long a, unsigned long long b) {
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = x[threadIdx.x + 128 * i];
  asm volatile("wgmma.fence.sync.aligned;");
  MULTIPLY
  BETWEEN
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) x[threadIdx.x + 128 * i] = d[i];
} }
"""


@needs_nvrtc
@pytest.mark.parametrize(("between", "serialized"), [("", False), ("d[0] += 1; MULTIPLY", True)])
def test_advice_is_read_from_the_log(
    tree: Path, cache: Cache, between: str, serialized: bool
) -> None:
    """A sum that is touched before its product is complete makes the assembler wait for each."""
    (tree / "toy.cu").write_text(WGMMA.replace("BETWEEN", between))
    kernel = Kernel("toy", "", arch_specific=True)
    first = _jit.compile(kernel, "sm_90", cache=cache, sources=Sources(tree))
    advice = first.resources.advice
    assert bool(advice) == serialized
    assert all("C75" in line and "wgmma" in line for line in advice)
    assert _jit.compile(kernel, "sm_90", cache=cache, sources=Sources(tree)) == first


@needs_nvrtc
def test_what_only_one_architecture_has_is_compiled_for_it(tree: Path, cache: Cache) -> None:
    """`wgmma` exists in sm_90a alone: asked for sm_90, that is what is meant."""
    (tree / "toy.cu").write_text(WGMMA.replace("BETWEEN", ""))
    sources = Sources(tree)
    with pytest.raises(CompilationError, match="wgmma"):
        _jit.compile(Kernel("toy", ""), "sm_90", cache=cache, sources=sources)
    kernel = Kernel("toy", "", arch_specific=True)
    compiled = _jit.compile(kernel, "sm_90", cache=cache, sources=sources)
    assert compiled == _jit.compile(kernel, "sm_90a", cache=cache, sources=sources)
    assert "sm_90a" in str(compiled.cubin)


def compilations(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parent / "helpers" / "compilations.py"
    return subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@needs_nvrtc
def test_first_compilations_side_by_side_and_after_somebody_elses() -> None:
    done = compilations()
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("OLDER_NVRTC" not in os.environ, reason="OLDER_NVRTC names no other NVRTC")
def test_first_compilations_of_nvrtc_13_0() -> None:
    """In which threads do not wait for a library that the first of them loads."""
    directory = os.environ["OLDER_NVRTC"]
    (library,) = Path(directory).rglob("libnvrtc.so.*")
    done = compilations(directory, LD_LIBRARY_PATH=str(library.parent))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["13.0"]


def test_an_empty_kernel_is_compiled_alone_before_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that large ones, the first of a process included, are compiled side by side."""
    empty, kernels = 0, range(1, 5)
    side_by_side = threading.Barrier(len(kernels), timeout=60)
    compiled: list[int] = []
    destroyed: list[int] = []

    class Compiler:
        def createProgram(self, *_: object) -> int:  # noqa: N802 - NVRTC's
            return empty

        def compileProgram(self, program: int, options: object) -> None:  # noqa: N802
            if program != empty:
                side_by_side.wait()
            time.sleep(0.02)
            compiled.append(program)
            if compiled == [empty]:
                raise ValueError("the first one fails")

        def destroyProgram(self, program: int) -> None:  # noqa: N802
            destroyed.append(program)

    monkeypatch.setattr(compiler, "_has_compiled", False)
    with pytest.raises(ValueError, match="the first one fails"):
        compiler._compile(Compiler(), kernels[0], ())
    threads = [
        threading.Thread(target=compiler._compile, args=(Compiler(), program, ()))
        for program in kernels
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled[:2] == destroyed == [empty, empty]
    assert sorted(compiled[2:]) == [*kernels]


@needs_nvrtc
def test_the_build_of_nvrtc_counts(tmp_path: Path) -> None:
    version = compiler.build_version()
    assert version is not None
    assert version.startswith(f"{compiler.version()}-")
    library = tmp_path / "library"
    prints = set()
    for content in (b"a", b"b", b"b" * 2, b"x" * 200_000, b"x" * 199_999 + b"y"):
        library.write_bytes(content)
        prints.add(compiler._fingerprint(library))
    assert len(prints) == 5


def test_sources_are_read_from_an_archive(tree: Path, tmp_path: Path) -> None:
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in tree.rglob("*.cu*"):
            file.write(path, f"cuneigh/_cuda/{path.relative_to(tree).as_posix()}")
    zipped = Sources(zipfile.Path(archive, "cuneigh/_cuda/"))
    assert zipped.texts == Sources(tree).texts
    assert zipped.digest == Sources(tree).digest


@needs_nvrtc
def test_lines_of_the_source_are_told_on_request(
    tree: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And change nothing but the size."""
    plain = _jit.compile(KERNEL, "sm_80", cache=cache, sources=Sources(tree)).cubin.read_bytes()
    monkeypatch.setenv("CUNEIGH_LINE_INFO", "1")
    told = _jit.compile(KERNEL, "sm_80", cache=cache, sources=Sources(tree)).cubin.read_bytes()
    assert b"toy.cu" not in plain
    assert b"toy.cu" in told
    assert code_of(plain) == code_of(told)


# The key


@needs_nvrtc
def test_a_kernel_in_a_folder_has_one_directory_and_no_slash_in_its_name(
    tree: Path, cache: Cache
) -> None:
    (tree / "of").mkdir()
    text = TOY.replace("namespace cuneigh", "namespace cuneigh::of")
    (tree / "of" / "toy.cu").write_text(text)
    kernel = Kernel("of/toy", KERNEL.plan)
    compiled = _jit.compile(kernel, "sm_80", cache=cache, sources=Sources(tree))
    assert kernel.instance == "cuneigh::of::toy<cuneigh::Plan>"
    key, *_ = compiled.cubin.relative_to(cache.root).parts
    assert key == build.key_of(kernel, "sm_80", Sources(tree))
    assert key.startswith("of.toy-sm_80-")
    assert cache.contents()[0] == 1


def test_key_covers_all_that_a_cubin_depends_on(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(kernel: Kernel = KERNEL, arch: str = "sm_80") -> str:
        return build.key_of(kernel, arch, Sources(tree))

    keys = [key(), key(arch="sm_90"), key(arch="sm_90a"), key(Kernel("toy", KERNEL.plan + " "))]
    assert keys[0] == keys[-1], "white space around a plan is no difference"
    keys[-1] = key(Kernel("toy", KERNEL.plan.replace("2", "3")))
    keys.append(key(Kernel("other", KERNEL.plan)))
    (tree / "cuneigh" / "toy.cuh").write_text("// another header\n")
    keys.append(key())
    (tree / "toy.cu").write_text(TOY + "\n")
    keys.append(key())
    (tree / "cuneigh" / "unused.cuh").write_text("")
    keys.append(key())
    (tree / "cuneigh" / "unused.cuh").rename(tree / "cuneigh" / "renamed.cuh")
    keys.append(key())
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "--use_fast_math"))
    keys.append(key())
    monkeypatch.setenv("CUNEIGH_LINE_INFO", "1")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_key_does_not_depend_on_where_the_sources_are(tree: Path) -> None:
    before = build.key_of(KERNEL, "sm_80", Sources(tree))
    assert build.key_of(KERNEL, "sm_80", Sources(tree.rename(tree.parent / "moved"))) == before


@needs_nvrtc
def test_what_is_hashed_is_what_is_compiled(tree: Path, cache: Cache) -> None:
    """An edit while the process runs must not end up under the key of the text before it."""
    sources = Sources(tree)
    key = build.key_of(KERNEL, "sm_80", sources)
    (tree / "toy.cu").write_text("broken")
    assert _jit.compile(KERNEL, "sm_80", cache=cache, sources=sources).cubin.parts[-3] == key


# What is chosen for a device


def device(major: int, minor: int) -> _device.Device:
    return _device.Device("cuda", name="a GPU", capability=(major, minor))


def test_architectures_of_a_device() -> None:
    assert load.architectures_of(device(7, 5)) == (
        ["sm_75"],
        ["sm_74", "sm_73", "sm_72", "sm_71", "sm_70"],
    )
    assert load.architectures_of(device(9, 0)) == (["sm_90a", "sm_90"], [])
    assert load.architectures_of(device(12, 1)) == (["sm_121a", "sm_121"], ["sm_120"])


@needs_nvrtc
@pytest.mark.usefixtures("installation")
class TestChoose:
    def arch(self, capability: tuple[int, int]) -> str:
        key = load.choose(KERNEL, device(*capability)).cubin.parts[-3]
        return key.removeprefix("toy-").split("-")[0]

    def test_own_architecture(self) -> None:
        assert self.arch((8, 6)) == "sm_86"
        assert self.arch((9, 0)) == "sm_90a"
        assert self.arch((12, 0)) == "sm_120a"

    def test_what_was_compiled_for_the_device_is_used(self) -> None:
        _jit.precompile([KERNEL], ["sm_80", "sm_90"])
        assert self.arch((9, 0)) == "sm_90"
        assert self.arch((8, 6)) == "sm_86", "what is older is compiled anew"

    def test_what_only_one_architecture_has_is_not_taken_from_another(self) -> None:
        kernel = Kernel(KERNEL.name, KERNEL.plan, arch_specific=True)
        _jit.precompile([KERNEL], ["sm_90"])
        assert "sm_90a" in str(load.choose(kernel, device(9, 0)).cubin)

    def test_unknown_device_takes_the_closest_older_architecture(self) -> None:
        newest = max(int(arch[3:]) for arch in compiler.architectures() if arch[3:-1] == "8")
        assert self.arch((8, newest % 10 + 3)) == f"sm_{newest}"

    def test_no_architecture_at_all(self) -> None:
        with pytest.raises(CompilationError, match="none of these runs on a GPU, which is sm_30"):
            load.choose(KERNEL, device(3, 0))

    def test_without_nvrtc_anything_that_runs_will_do(
        self, no_compiler: Callable[[], None]
    ) -> None:
        _jit.precompile([KERNEL], ["sm_80", "sm_90a"])
        no_compiler()
        assert self.arch((8, 6)) == "sm_80"
        assert self.arch((9, 0)) == "sm_90a"
        for other in ((7, 5), (10, 0)):
            with pytest.raises(CompilationError, match="NVRTC is missing"):
                load.choose(KERNEL, device(*other))


# On a GPU


@pytest.mark.gpu
@pytest.mark.usefixtures("installation")
class TestLoad:
    @pytest.fixture(autouse=True)
    def _forget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(load, "_loaded", {})

    def test_loads_once_for_each_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import cupy

        for index in range(cupy.cuda.runtime.getDeviceCount()):
            first = _jit.load(KERNEL, _device.cuda(index))
            with monkeypatch.context() as patch:
                patch.setattr(load, "_load", None)
                assert _jit.load(KERNEL, _device.cuda(index)) is first
            with cupy.cuda.Device(index):
                x = cupy.arange(32, dtype=np.float32)
                first((1,), (32,), (x,))
                np.testing.assert_array_equal(x.get(), np.arange(32) + 3)

    def test_threads_load_once(self) -> None:
        functions: list[Any] = []
        threads = [
            threading.Thread(target=lambda: functions.append(_jit.load(KERNEL, _device.cuda(0))))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(functions) == 8
        assert len(set(map(id, functions))) == 1

    def test_what_the_driver_refuses(self, cache: Cache) -> None:
        here = _device.cuda(0)
        (own, *_), _older = load.architectures_of(here)
        compiled = _jit.compile(KERNEL, own)
        foreign = next(
            arch for arch in compiler.architectures() if arch[:-1] != f"sm_{here.capability[0]}"
        )
        # An intact entry under a name that is not its own
        other = _jit.compile(KERNEL, foreign)
        compiled.cubin.parent.rename(cache.root / "aside")
        other.cubin.parent.rename(compiled.cubin.parent)
        with pytest.raises(CompilationError, match=r"the driver.* does not load"):
            _jit.load(KERNEL, here)
