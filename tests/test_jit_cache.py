"""The cache of compiled kernels: what survives on disk, damage, and many writers at once."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers.toy_kernel import KERNEL, built, entries, needs_nvrtc

from cuneigh import _jit
from cuneigh._jit import Cache, CompilationError, Kernel, Resources, Sources
from cuneigh._jit import _cache as cache_module
from cuneigh._jit import _compiler as compiler

pytest_plugins = ["helpers.toy_installation"]


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
    "missing field": write_metadata('{"symbol": "x"}'),
    "bad resources": change_metadata(resources={"registers": 1, "unknown": 2}),
    "bad checksum": change_metadata(sha256=None),
    "another symbol": change_metadata(symbol="symbo1"),
    "other resources": change_metadata(resources=asdict(Resources(9, 2, 3, 4, 5))),
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


def test_a_spare_is_no_error_where_warnings_are(
    unwritable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = Cache(unwritable, spare=True).store("key", "13.0", "unit", built())
    assert compiled.symbol == "symbol"
    assert "cannot write compiled kernels" in capsys.readouterr().err


def test_with_nothing_to_write_to_the_error_says_what_to_do(
    unwritable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(unwritable))
    with pytest.raises(CompilationError, match=r"neither in .* set CUNEIGH_CACHE_DIR"):
        Cache(unwritable, spare=True).store("key", "13.0", "unit", built())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_leaves_the_spare_of_its_parent(unwritable: Path) -> None:
    script = (
        "import os, warnings\n"
        "from pathlib import Path\n"
        "from cuneigh._jit import Cache, Resources\n"
        "from cuneigh._jit._compiler import Built\n"
        "warnings.simplefilter('ignore')\n"
        f"cache = Cache(Path({str(unwritable)!r}), spare=True)\n"
        "def store(key):\n"
        "    built = Built(b'x', 's', Resources(1, 2, 3, 4, 5))\n"
        "    return cache.store(key, '13.0', '', built).cubin\n"
        "first = store('first')\n"
        "child = os.fork()\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    assert first.exists() and store('second').parents[2] == first.parents[2]\n"
        "else:\n"
        "    assert store('third').parents[2] != first.parents[2]\n"
        "print(first.parents[2], flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.split()[0]).exists(), "it goes with the process that made it"


# Whose kernels are taken


posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are those of POSIX")


@posix
@pytest.mark.parametrize("up", range(-1, 3), ids=["file", "entry", "key", "root"])
def test_what_others_can_write_is_not_taken(
    up: int, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubin = cache.store("key", "13.0", "unit", built()).cubin
    place = cubin if up < 0 else cubin.parents[up]
    for mode in (0o020, 0o002):
        own = stat.S_IMODE(place.stat().st_mode)
        place.chmod(own | mode)
        assert cache.find("key", "13.0") is None
        if place == cache.root:
            with pytest.raises(PermissionError, match=r"others may write to .*TRUST_CACHE_DIR=1"):
                cache.store("other", "13.0", "unit", built())
        monkeypatch.setenv("CUNEIGH_TRUST_CACHE_DIR", "1")
        assert cache.find("key", "13.0") is not None
        monkeypatch.delenv("CUNEIGH_TRUST_CACHE_DIR")
        place.chmod(own)
        assert cache.find("key", "13.0") is not None


@posix
def test_what_another_user_has_written_is_not_taken(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubin = cache.store("key", "13.0", "unit", built()).cubin
    monkeypatch.setattr(os, "geteuid", lambda: cubin.stat().st_uid + 1)
    if cubin.stat().st_uid == 0:  # whose kernels everybody takes
        assert cache.find("key", "13.0") is not None
        for path in (cubin, *cubin.parents[:3]):
            os.chown(path, 12345, -1)
            assert cache.find("key", "13.0") is None
            os.chown(path, 0, -1)
        os.chown(cubin, 12345, -1)
    assert cache.find("key", "13.0") is None
    monkeypatch.setenv("CUNEIGH_TRUST_CACHE_DIR", "yes")
    assert cache.find("key", "13.0") is not None


@posix
def test_an_umask_that_lets_others_write_does_not_count(cache: Cache) -> None:
    mask = os.umask(0)
    try:
        compiled = cache.store("key", "13.0", "unit", built())
    finally:
        os.umask(mask)
    assert cache.find("key", "13.0") == compiled


def test_drafts_of_killed_processes_are_removed(cache: Cache) -> None:
    cache.make()
    old, new = cache.root / ".draft-old", cache.root / ".draft-new"
    for draft in (old, new):
        draft.mkdir()
        (draft / "kernel.cu").touch()
    before = time.time() - cache_module.DRAFT_SECONDS - 1
    os.utime(old, (before, before))
    cache.store("key", "13.0", "unit", built())
    assert not old.exists()
    assert new.exists(), "somebody may be writing it"


@needs_nvrtc
def test_precompile_does_not_fall_back(unwritable: Path, installation: None) -> None:
    with pytest.raises(OSError, match="file"):
        _jit.precompile([KERNEL], ["sm_80"], unwritable)


def test_contents(cache: Cache) -> None:
    assert cache.contents() == (0, 0)
    for version in ("12.9", "13.0"):
        cache.store("key", version, "unit", built(b"x" * 1000))
    (cache.root / "key" / "nvrtc-x").touch()
    (cache.root / "nvrtc-x").touch()
    kernels, size = cache.contents()
    assert kernels == 2
    assert 2000 < size < 4000


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


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
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert _jit.default_directory() == Path.home() / ".cache" / "cuneigh"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", no_home)
        directory = _jit.default_directory()
        assert directory.parent == Path(tempfile.gettempdir())
        assert directory.name.startswith("cuneigh-")
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
