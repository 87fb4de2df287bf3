"""Compiled kernels on disk: one directory per kernel, safe to share between processes.

    <root>/<key>/nvrtc-<version>/kernel.cu       the translation unit
                                 kernel.cubin    what NVRTC made of it
                                 kernel.json     its symbol, resources and checksum

The key covers the sources, the plan, the options and the architecture. The version of NVRTC is a
directory below it, so that a machine without NVRTC can use what any version has compiled; where
NVRTC is installed, only the entries of its own version count.

A directory is written under a name of its own and then renamed, so an entry is there as a whole or
not at all. An entry that is damaged (a full disk, a stray `rm`) counts as absent and is repaired.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import uuid
import warnings
import weakref
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from cuneigh._jit._compiler import Built, Resources

UNIT, CUBIN, METADATA = "kernel.cu", "kernel.cubin", "kernel.json"


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
        self._spare: Cache | None = None

    def find(self, key: str, version: str | None) -> Compiled | None:
        """The intact entry of NVRTC `version`; that of the newest when `version` is None."""
        for entry in self._entries(key, version):
            compiled = _read(entry)
            if compiled is not None:
                return compiled
        return self._spare.find(key, version) if self._spare else None

    def store(self, key: str, version: str, unit: str, built: Built) -> Compiled:
        """Add an entry, unless another process was faster; OSError if it cannot be written."""
        if self._spare:
            return self._spare.store(key, version, unit, built)
        try:
            return self._store(key, version, unit, built)
        except OSError as error:
            if not self._wants_spare:
                raise
            self._spare = Cache(_temporary_directory(self))
            warnings.warn(
                f"cuneigh cannot write compiled kernels to {self.root} ({error}) and keeps them "
                f"in {self._spare.root} until this process ends; set CUNEIGH_CACHE_DIR to a "
                "directory that can be written to",
                RuntimeWarning,
                stacklevel=2,
            )
            return self._spare.store(key, version, unit, built)

    def contents(self) -> tuple[int, int]:
        """Number of entries, and their size in bytes."""
        files = [file for entry in self.root.glob("*/nvrtc-*") for file in entry.iterdir()]
        cubins = sum(file.name == CUBIN for file in files)
        return cubins, sum(file.stat().st_size for file in files)

    def _entries(self, key: str, version: str | None) -> list[Path]:
        if version is not None:
            return [self.root / key / f"nvrtc-{version}"]
        return sorted((self.root / key).glob("nvrtc-*"), key=_version_of, reverse=True)

    def _store(self, key: str, version: str, unit: str, built: Built) -> Compiled:
        metadata = {
            "symbol": built.symbol,
            "resources": asdict(built.resources),
            "sha256": hashlib.sha256(built.cubin).hexdigest(),
        }
        (entry,) = self._entries(key, version)
        entry.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile.mkdtemp, whose directories nobody else may read: caches can be shared.
        draft = self.root / f".draft-{uuid.uuid4().hex}"
        draft.mkdir()
        try:
            (draft / UNIT).write_text(unit, encoding="utf-8")
            (draft / CUBIN).write_bytes(built.cubin)
            (draft / METADATA).write_text(json.dumps(metadata, indent=2), encoding="utf-8")
            compiled = _install(draft, entry)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return compiled


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
    """The kernel in `entry`; None if there is none, or it is damaged."""
    try:
        metadata = json.loads((entry / METADATA).read_text(encoding="utf-8"))
        cubin = (entry / CUBIN).read_bytes()
        if hashlib.sha256(cubin).hexdigest() != metadata["sha256"]:
            return None
        fields = metadata["resources"]
        resources = Resources(**{**fields, "advice": tuple(fields.get("advice", ()))})
        return Compiled(entry / CUBIN, str(metadata["symbol"]), resources)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _version_of(entry: Path) -> tuple[int, ...]:
    numbers = entry.name.removeprefix("nvrtc-").split(".")
    return tuple(int(number) for number in numbers if number.isdecimal())


def _temporary_directory(owner: Cache) -> Path:
    directory = tempfile.mkdtemp(prefix="cuneigh-")
    weakref.finalize(owner, shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def default_directory() -> Path:
    """`CUNEIGH_CACHE_DIR`, or else the platform's place for caches."""
    chosen = os.environ.get("CUNEIGH_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "cuneigh" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cuneigh"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "cuneigh"


@cache
def shared(directory: Path) -> Cache:
    """The one `Cache` of this process in `directory`, with a spare."""
    return Cache(directory, spare=True)
