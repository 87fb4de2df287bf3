"""Compiled kernels on disk: one directory per kernel, safe to share between processes.

    <root>/<key>/nvrtc-<version>/kernel.cu       the translation unit
                                 kernel.cubin    what NVRTC made of it
                                 kernel.json     its symbol, resources and checksum

The key covers the sources, the plan, the options and the architecture. The version of NVRTC, its
build included, is a directory below it, so that a machine without NVRTC can use what any version
has compiled; where NVRTC is installed, only the entries of its own build count.

A directory is written under a name of its own and then renamed, so an entry is there as a whole or
not at all. An entry that is damaged (a full disk, a stray `rm`) counts as absent and is repaired.

Kernels are programs: only what this user or root has written counts, in directories that nobody
else may write to, unless CUNEIGH_TRUST_CACHE_DIR=1 says that whoever writes there is trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import uuid
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cuneigh._jit._compiler import Built, CompilationError, Resources
from cuneigh._settings import CACHE_DIR, TRUST_CACHE_DIR

UNIT, CUBIN, METADATA = "kernel.cu", "kernel.cubin", "kernel.json"

DRAFT = ".draft-"
DRAFT_SECONDS = 3600
"""After this time, whoever wrote a draft is not writing it any more."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled kernel in a cache."""

    cubin: Path
    symbol: str
    """The mangled name of the kernel in the cubin."""
    resources: Resources


class Cache:
    """The compiled kernels in one directory.

    With `spare`, a directory that cannot be written to is replaced by a temporary one, with a
    warning, for as long as the process lives; what the directory holds is still used.
    """

    def __init__(self, root: Path, *, spare: bool = False) -> None:
        self.root = root
        self._wants_spare = spare
        self._spares: dict[int, Cache] = {}

    def find(self, key: str, version: str | None) -> Compiled | None:
        """The intact entry of NVRTC `version`; that of the newest when `version` is None."""
        for entry in self._entries(key, version):
            compiled = _read(entry)
            if compiled is not None:
                return compiled
        return self._spare.find(key, version) if self._spare else None

    @property
    def _spare(self) -> Cache | None:
        """That of this process: a child does not use that of the process that it is a copy of."""
        return self._spares.get(os.getpid())

    def store(self, key: str, version: str, unit: str, built: Built) -> Compiled:
        """Add an entry, unless another process was faster; OSError if it cannot be written."""
        if self._spare:
            return self._spare.store(key, version, unit, built)
        try:
            return self._store(key, version, unit, built)
        except OSError as error:
            if not self._wants_spare:
                raise
            spare = self._spares[os.getpid()] = Cache(_temporary_directory(self, error))
            warn(
                f"cuneigh cannot write compiled kernels to {self.root} ({error}) and keeps them in "
                f"{spare.root} until this process ends; set CUNEIGH_CACHE_DIR to a directory that "
                "can be written to"
            )
            return spare.store(key, version, unit, built)

    def contents(self) -> tuple[int, int]:
        """Number of entries, and their size in bytes."""
        files = [file for file in self.root.glob("*/nvrtc-*/*") if file.is_file()]
        cubins = sum(file.name == CUBIN for file in files)
        return cubins, sum(file.stat().st_size for file in files)

    def _entries(self, key: str, version: str | None) -> list[Path]:
        if version is not None:
            return [self.root / key / f"nvrtc-{version}"]
        return sorted((self.root / key).glob("nvrtc-*"), key=_version_of, reverse=True)

    def make(self) -> None:
        """Make the directory; OSError if that cannot be, or others may write to it."""
        self.root.mkdir(mode=_mode(), parents=True, exist_ok=True)
        reason = distrusted(self.root)
        if reason is not None:
            raise PermissionError(reason)

    def _store(self, key: str, version: str, unit: str, built: Built) -> Compiled:
        metadata: dict[str, Any] = {"symbol": built.symbol, "resources": asdict(built.resources)}
        metadata["sha256"] = _checksum(metadata, built.cubin)
        (entry,) = self._entries(key, version)
        self.make()
        self._remove_old_drafts()
        entry.parent.mkdir(mode=_mode(), exist_ok=True)
        # Not tempfile.mkdtemp, whose directories nobody else may read: caches can be shared.
        draft = self.root / f"{DRAFT}{uuid.uuid4().hex}"
        draft.mkdir(mode=_mode())
        try:
            _write(draft / UNIT, unit.encode())
            _write(draft / CUBIN, built.cubin)
            _write(draft / METADATA, json.dumps(metadata, indent=2).encode())
            compiled = _install(draft, entry)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return compiled

    def _remove_old_drafts(self) -> None:
        """Those of processes that were killed while they wrote."""
        for draft in self.root.glob(f"{DRAFT}*"):
            try:
                if time.time() - draft.stat().st_mtime > DRAFT_SECONDS:
                    shutil.rmtree(draft, ignore_errors=True)
            except OSError:  # it has gone, or is another user's
                pass


def _install(draft: Path, entry: Path) -> Compiled:
    """Turn `draft` into `entry`, unless there is an intact entry by now."""
    try:
        draft.rename(entry)
    except OSError:
        compiled = _read(entry)
        if compiled is not None:
            return compiled
        # A damaged entry is repaired file by file: another process may have repaired it in this
        # instant and be about to load it, and must not find it gone.
        for name in (UNIT, CUBIN, METADATA):
            (draft / name).replace(entry / name)
    compiled = _read(entry)
    if compiled is None:
        raise OSError(f"{entry} does not hold what was just written to it")
    return compiled


def _read(entry: Path) -> Compiled | None:
    """The kernel in `entry`; None if there is none, it is damaged or not to be trusted."""
    try:
        places = entry.parents[1], entry.parent, entry, entry / METADATA, entry / CUBIN
        if any(map(distrusted, places)):
            return None
        metadata = json.loads((entry / METADATA).read_text(encoding="utf-8"))
        cubin = (entry / CUBIN).read_bytes()
        if _checksum(metadata, cubin) != metadata["sha256"]:
            return None
        fields = metadata["resources"]
        resources = Resources(**{**fields, "advice": tuple(fields.get("advice", ()))})
        return Compiled(entry / CUBIN, str(metadata["symbol"]), resources)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(metadata: Mapping[str, Any], cubin: bytes) -> str:
    """Of a kernel and all that is said about it."""
    about = json.dumps([metadata["symbol"], metadata["resources"]], sort_keys=True)
    return hashlib.sha256(about.encode() + b"\0" + cubin).hexdigest()


def _mode() -> int:
    """Of directories that are made, as far as the umask allows."""
    return 0o777 if TRUST_CACHE_DIR.read() else 0o755


def _write(file: Path, content: bytes) -> None:
    with open(file, "wb", opener=lambda path, flags: os.open(path, flags, _mode() & 0o666)) as out:
        out.write(content)


def distrusted(path: Path) -> str | None:
    """Why what is in a file or directory may be another user's; None if it is not."""
    if os.name != "posix" or TRUST_CACHE_DIR.read():
        return None
    status = path.stat()
    advice = "; CUNEIGH_TRUST_CACHE_DIR=1 trusts all who can write there"
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {status.st_uid}{advice}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        return f"others may write to {path}, whose mode is {mode:o}{advice}"
    return None


def _version_of(entry: Path) -> tuple[int, ...]:
    numbers = entry.name.removeprefix("nvrtc-").split(".")
    return tuple(int(number) for number in numbers if number.isdecimal())


def _temporary_directory(owner: Cache, reason: OSError) -> Path:
    """A directory that goes with its owner, or with the process; `reason`: why it is needed."""
    try:
        directory = tempfile.mkdtemp(prefix="cuneigh-")
    except OSError as error:
        raise CompilationError(
            f"compiled kernels can be kept neither in {owner.root} ({reason}) nor in a temporary "
            f"directory ({error}): set CUNEIGH_CACHE_DIR to a directory that can be written to"
        ) from error
    weakref.finalize(owner, _remove, directory, os.getpid())
    return Path(directory)


def _remove(directory: str, process: int) -> None:
    """Remove a directory, but not in a child of the process that made it."""
    if os.getpid() == process:
        shutil.rmtree(directory, ignore_errors=True)


def warn(text: str) -> None:
    """Warn, without failing where warnings are errors: the kernel that is asked for is there."""
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        print(text, file=sys.stderr, flush=True)


def default_directory() -> Path:
    """`CUNEIGH_CACHE_DIR`, or else the platform's place for caches.

    Where there is no home directory, it is one of the user in the directory for temporary files.
    """
    chosen = CACHE_DIR.read()
    if chosen is not None:
        return chosen
    try:
        return _of_platform()
    except RuntimeError:  # of Path.home
        user = os.getuid() if hasattr(os, "getuid") else "user"
        return Path(tempfile.gettempdir()) / f"cuneigh-{user}"


def _of_platform() -> Path:
    if sys.platform == "win32":
        local = _absolute("LOCALAPPDATA")
        return (local or Path.home() / "AppData" / "Local") / "cuneigh" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cuneigh"
    return (_absolute("XDG_CACHE_HOME") or Path.home() / ".cache") / "cuneigh"


def _absolute(variable: str) -> Path | None:
    """The path in an environment variable; None for a relative one, which its rules exclude."""
    path = Path(os.environ.get(variable, ""))
    return path if path.is_absolute() else None


@cache
def shared(directory: Path) -> Cache:
    """The one `Cache` of this process in `directory`, with a spare."""
    return Cache(directory, spare=True)
