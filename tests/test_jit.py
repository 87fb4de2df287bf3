"""The JIT: what is compiled, when it is compiled again, and what survives on disk."""

from __future__ import annotations

import itertools
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest

from cuneigh import _device, _jit
from cuneigh._backends import fused, gemm, naive
from cuneigh._jit import Cache, CompilationError, Kernel, Resources, Sources
from cuneigh._jit import _build as build
from cuneigh._jit import _compiler as compiler
from cuneigh._jit import _load as load
from cuneigh._problem import DTYPES, Operation, Problem
from cuneigh._window import Axis

needs_nvrtc = pytest.mark.skipif(
    compiler.version() is None or compiler.header_directory() is None,
    reason="NVRTC and the CUDA headers are not installed",
)

TOY = """\
#include "cuneigh/toy.cuh"
namespace cuneigh {
template <typename Plan>
__global__ void toy(typename Plan::Number* x) { x[threadIdx.x] += kOffset + Plan::kStep; }
}
"""
KERNEL = Kernel("toy", "using Number = number;\nstatic constexpr int kStep = 2;")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "cuda"
    (root / "cuneigh").mkdir(parents=True)
    (root / "toy.cu").write_text(TOY)
    header = (
        "#pragma once\nnamespace cuneigh { using number = float; constexpr int kOffset = 1; }\n"
    )
    (root / "cuneigh" / "toy.cuh").write_text(header)
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def installation(tree: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy sources and the cache take the place of the real ones."""
    sources = Sources(tree)
    monkeypatch.setattr(build, "packaged", lambda: sources)
    monkeypatch.setenv("CUNEIGH_CACHE_DIR", str(cache.root))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to make NVRTC disappear."""

    def disappear() -> None:
        def missing() -> Any:
            raise CompilationError("NVRTC is missing")

        monkeypatch.setattr(compiler, "_nvrtc", missing)
        for cached in (compiler.version, compiler.architectures):
            monkeypatch.setattr(compiler, cached.__name__, cached.__wrapped__)

    return disappear


def built(cubin: bytes = b"cubin") -> compiler.Built:
    return compiler.Built(cubin, "entry", Resources(1, 2, 3, 4, 5))


def entries(cache: Cache) -> list[Path]:
    """Everything in the directory, drafts included, down to the entries."""
    return sorted(entry for key in cache.root.iterdir() for entry in (key, *key.iterdir()))


# Compiling


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_90a"])
def test_compile_without_gpu(tree: Path, cache: Cache, arch: str) -> None:
    compiled = _jit.compile(KERNEL, arch, cache=cache, sources=Sources(tree))
    assert compiled.cubin.read_bytes().startswith(b"\x7fELF")
    assert compiled.entry.encode() in compiled.cubin.read_bytes()
    assert (compiled.cubin.parent / "kernel.cu").read_text() == KERNEL.unit
    assert compiled.resources.registers > 0
    assert compiled.resources.spill_stores == compiled.resources.spill_loads == 0


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


# The key


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


# The cache


@needs_nvrtc
def test_second_compile_is_a_cache_hit(
    tree: Path, cache: Cache, no_compiler: Callable[[], None]
) -> None:
    first = _jit.compile(KERNEL, "sm_80", cache=cache, sources=Sources(tree))
    no_compiler()
    assert compiler.version() is None
    assert _jit.compile(KERNEL, "sm_80", cache=cache, sources=Sources(tree)) == first
    with pytest.raises(CompilationError, match="NVRTC is missing"):
        _jit.compile(KERNEL, "sm_86", cache=cache, sources=Sources(tree))


@needs_nvrtc
def test_filled_cache_is_used_without_cupy(tree: Path, cache: Cache) -> None:
    expected = _jit.compile(KERNEL, "sm_80", cache=cache, sources=Sources(tree))
    script = (
        "import sys; sys.modules['cupy'] = None\n"
        "from pathlib import Path\n"
        "from cuneigh import _jit\n"
        f"print(_jit.compile(_jit.{KERNEL!r}, 'sm_80', cache=_jit.Cache(Path({str(cache.root)!r})),"
        f" sources=_jit.Sources(Path({str(tree)!r}))).cubin)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(expected.cubin)


def test_version_rule(cache: Cache) -> None:
    """NVRTC's own version counts where it is installed, the newest one elsewhere."""
    for version in ("12.9", "13.0", "12.10"):
        cache.store("key", version, "unit", built(version.encode()))

    def found(version: str | None) -> bytes | None:
        compiled = cache.find("key", version)
        return compiled and compiled.cubin.read_bytes()

    assert found("12.9") == b"12.9"
    assert found("13.1") is None
    assert found(None) == b"13.0"
    (cache.root / "key" / "nvrtc-13.0" / "kernel.cubin").unlink()
    assert found(None) == b"12.10"
    assert cache.find("another", None) is None


def truncate(entry: Path) -> None:
    cubin = entry / "kernel.cubin"
    cubin.write_bytes(cubin.read_bytes()[:-1])


def flip_a_bit(entry: Path) -> None:
    cubin = entry / "kernel.cubin"
    content = bytearray(cubin.read_bytes())
    content[len(content) // 2] ^= 1
    cubin.write_bytes(content)


def write_metadata(text: str) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        (entry / "kernel.json").write_bytes(text.encode("latin-1"))

    return damage


def change_metadata(**changes: object) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        metadata = json.loads((entry / "kernel.json").read_text()) | changes
        (entry / "kernel.json").write_text(json.dumps(metadata))

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda entry: (entry / name).unlink()


def empty(entry: Path) -> None:
    for file in entry.iterdir():
        file.unlink()


DAMAGES = {
    "truncated cubin": truncate,
    "flipped bit": flip_a_bit,
    "no cubin": remove("kernel.cubin"),
    "no metadata": remove("kernel.json"),
    "empty metadata": write_metadata(""),
    "garbage metadata": write_metadata("\xff\xfe{"),
    "other JSON": write_metadata("[1, 2]"),
    "missing field": write_metadata('{"entry": "x"}'),
    "bad resources": change_metadata(resources={"registers": 1, "unknown": 2}),
    "bad checksum": change_metadata(sha256=None),
    "empty directory": empty,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_entry_is_rebuilt(cache: Cache, damage: Callable[[Path], None]) -> None:
    first = cache.store("key", "13.0", "unit", built())
    damage(first.cubin.parent)
    assert cache.find("key", "13.0") is None
    assert cache.find("key", None) is None
    assert cache.store("key", "13.0", "unit", built()) == first
    assert cache.find("key", "13.0") == first
    assert first.cubin.read_bytes() == b"cubin"
    assert len(entries(cache)) == 2, "one key, one version and no draft"


@needs_nvrtc
def test_damaged_entry_is_compiled_again(tree: Path, cache: Cache) -> None:
    first = _jit.compile(KERNEL, "sm_80", cache=cache, sources=Sources(tree))
    cubin = first.cubin.read_bytes()
    truncate(first.cubin.parent)
    assert _jit.compile(KERNEL, "sm_80", cache=cache, sources=Sources(tree)) == first
    assert len(first.cubin.read_bytes()) == len(cubin)


def test_first_writer_wins(cache: Cache) -> None:
    first = cache.store("key", "13.0", "unit", built(b"first"))
    assert cache.store("key", "13.0", "unit", built(b"second")) == first
    assert first.cubin.read_bytes() == b"first"
    assert len(entries(cache)) == 2, "the loser's draft is gone"


def test_many_writers_at_once(cache: Cache) -> None:
    """Every thread always sees a whole entry, even while others repair a damaged one."""
    threads, rounds = 4, 30
    ready = threading.Barrier(threads)
    wrong: list[object] = []

    def write() -> None:
        for round_ in range(rounds):
            try:
                if ready.wait() == 0 and round_ % 2:
                    truncate(cache.root / f"key{round_ - 1}" / "nvrtc-13.0")
                ready.wait()
                key = f"key{round_ - round_ % 2}"  # written in even rounds, repaired in odd ones
                compiled = cache.store(key, "13.0", "unit", built())
                if compiled.cubin.read_bytes() != b"cubin" or cache.find(key, "13.0") != compiled:
                    wrong.append(compiled)
            except BaseException as error:
                wrong.append(error)
                ready.abort()
                return

    pool = [threading.Thread(target=write) for _ in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert not wrong
    assert len(entries(cache)) == rounds


@needs_nvrtc
def test_processes_compile_the_same_kernel_at_once(tree: Path, cache: Cache) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cuneigh import _jit\n"
        "_jit._compiler.version()\n"  # all that takes long before the race
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"print(_jit.compile(_jit.{KERNEL!r}, 'sm_80', cache=_jit.Cache(Path({str(cache.root)!r})),"
        f" sources=_jit.Sources(Path({str(tree)!r}))).cubin)"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", script], **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    cubins = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    (cubin,) = cubins
    assert cubin.strip() == str(
        _jit.compile(KERNEL, "sm_80", cache=cache, sources=Sources(tree)).cubin
    )
    assert len(entries(cache)) == 2


def test_entries_can_be_read_by_all_that_the_umask_allows(cache: Cache) -> None:
    """A cache that root fills in a container image must serve the image's users."""
    mask = os.umask(0o022)
    try:
        compiled = cache.store("key", "13.0", "unit", built())
    finally:
        os.umask(mask)
    if os.name == "posix":
        for path in (compiled.cubin, *compiled.cubin.parents[:2]):
            assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A directory that not even root can make."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "cache"


def test_unwritable_cache_falls_back_to_a_temporary_directory(unwritable: Path) -> None:
    cache = Cache(unwritable, spare=True)
    assert cache.find("key", "13.0") is None
    with pytest.warns(RuntimeWarning, match=r"cannot write .*CUNEIGH_CACHE_DIR"):
        compiled = cache.store("key", "13.0", "unit", built())
    assert compiled.cubin.read_bytes() == b"cubin"
    assert cache.find("key", "13.0") == compiled
    cache.store("other", "13.0", "unit", built())  # warns once: warnings are errors here
    del cache
    assert not compiled.cubin.exists(), "the temporary directory goes with its cache"


def test_read_only_cache_is_still_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cache.store("key", "13.0", "unit", built())

    def refuse(*arguments: object) -> Any:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Cache, "_store", refuse)
    assert Cache(cache.root, spare=True).find("key", "13.0") == expected


@needs_nvrtc
def test_precompile_does_not_fall_back(unwritable: Path, installation: None) -> None:
    with pytest.raises(OSError, match="file"):
        _jit.precompile([KERNEL], ["sm_80"], unwritable)


def test_contents(cache: Cache) -> None:
    assert cache.contents() == (0, 0)
    for version in ("12.9", "13.0"):
        cache.store("key", version, "unit", built(b"x" * 1000))
    kernels, size = cache.contents()
    assert kernels == 2
    assert 2000 < size < 4000


def test_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUNEIGH_CACHE_DIR", str(tmp_path))
    assert _jit.default_directory() == tmp_path
    monkeypatch.setenv("CUNEIGH_CACHE_DIR", "~/kernels")
    assert _jit.default_directory() == Path.home() / "kernels"
    monkeypatch.setenv("CUNEIGH_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert _jit.default_directory() == tmp_path / "cuneigh"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _jit.default_directory() == Path.home() / ".cache" / "cuneigh"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _jit.default_directory() == Path.home() / "Library" / "Caches" / "cuneigh"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert _jit.default_directory() == tmp_path / "cuneigh" / "Cache"


@needs_nvrtc
@pytest.mark.usefixtures("installation")
def test_precompile(cache: Cache) -> None:
    other = Kernel("toy", KERNEL.plan.replace("2", "3"))
    compiled = _jit.precompile(
        iter([KERNEL, other, KERNEL]), iter(["sm_80", "sm_90a"]), cache.root, jobs=2
    )
    assert list(compiled) == [
        (KERNEL, "sm_80"),
        (KERNEL, "sm_90a"),
        (other, "sm_80"),
        (other, "sm_90a"),
    ]
    assert cache.contents()[0] == 4
    for (kernel, arch), result in compiled.items():
        assert _jit.compile(kernel, arch) == result


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


# Every kernel that ships


ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def problems(
    dtype: str,
    ranks: Iterable[int],
    head_dim: int = 64,
    value_dim: int = 64,
    rpb_dtype: str | None = None,
    additional: int | None = None,
    length: int = 1,
) -> Iterator[Problem]:
    """Every operation."""
    for rank, operation in itertools.product(ranks, get_args(Operation)):
        yield Problem(
            operation=operation,
            dtype=dtype,
            batch=1,
            heads=1,
            kv_heads=1,
            head_dim=head_dim,
            value_dim=value_dim,
            axes=(Axis(length, length, 1, 1, 1, False),) * rank,
            scale=1.0,
            additional=additional,
            rpb_dtype=rpb_dtype,
        )


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def assert_no_spills(
    of: Iterator[Problem], arch: str, cache: Path, backend: ModuleType = naive
) -> None:
    kernels = [kernel for problem in of for kernel in backend.kernels(problem)]
    assert kernels
    for (kernel, _), compiled in _jit.precompile(kernels, [arch], cache).items():
        resources = compiled.resources
        assert resources.registers > 0, "the log of NVRTC was not understood"
        spilled = resources.spill_stores + resources.spill_loads
        assert spilled == 0, f"{kernel.name} spills {spilled} bytes on {arch}:\n{kernel.plan}"


# All of the variants on all of the architectures would take many minutes. 3-D kernels hold the most
# state, so they are compiled for every architecture and the others for one.


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile(arch: str, dtype: str, module_cache: Path) -> None:
    of = problems(dtype, [3], rpb_dtype=dtype, additional=1)
    assert_no_spills(of, arch, module_cache)


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_fewer_axes_compile(dtype: str, module_cache: Path) -> None:
    of = problems(dtype, [1, 2], rpb_dtype=dtype, additional=1)
    assert_no_spills(of, "sm_90", module_cache)


@needs_nvrtc
@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim", "rpb_dtype"),
    [
        ("float32", 32, 32, None),
        ("float16", 128, 128, "float32"),
        ("bfloat16", 63, 20, None),  # loads of single elements
        ("float64", 600, 3, "float64"),  # more than the lanes of a warp hold
    ],
)
def test_kernels_of_other_dimensions_compile(
    dtype: str, head_dim: int, value_dim: int, rpb_dtype: str | None, module_cache: Path
) -> None:
    of = problems(dtype, [2, 3], head_dim, value_dim, rpb_dtype)
    assert_no_spills(of, "sm_90", module_cache)


# The kernels around the batched products hold little; the longest rows of logits are their most.


@needs_nvrtc
@pytest.mark.parametrize(
    ("dtype", "arch"),
    [("float16", "sm_90"), ("bfloat16", "sm_75"), ("float32", "sm_120"), ("float64", "sm_90")],
)
def test_kernels_around_products_compile(dtype: str, arch: str, module_cache: Path) -> None:
    of = problems(dtype, [3], rpb_dtype=dtype, additional=3000)
    assert_no_spills(of, arch, module_cache, gemm)


@needs_nvrtc
def test_kernels_around_products_in_place_compile(module_cache: Path) -> None:
    of = problems("bfloat16", [1, 2], length=32)
    assert_no_spills(of, "sm_90", module_cache, gemm)


def test_every_source_is_compiled() -> None:
    """There is no `.cu` that no backend names."""
    full = [*problems("float16", [3], rpb_dtype="float16", additional=1)]
    plain = [*problems("float16", [1], length=32)]
    kernels = {
        kernel.name
        for problem in full + plain
        for backend in (naive, gemm, fused)
        for kernel in backend.kernels(problem)
    }
    sources = {name.removesuffix(".cu") for name in _jit.packaged().texts if name.endswith(".cu")}
    assert kernels == sources
