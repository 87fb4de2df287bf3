#!/usr/bin/env bash
# NVRTC 13.0.88 and 13.5.37: --restrict, given for one program, holds for every later program of the
# process, so that reads move to a cache that code which writes in place must not use.
#
# Versions: nvidia-cuda-nvrtc 13.0.88 and 13.5.37 (Linux x86-64; compiled only, no GPU needed).
#
# Behavior. Options of nvrtcCompileProgram belong to one program. After a program was compiled with
# --restrict, others are compiled as if they had been given it, too, with no option of their own,
# whether the first program still exists or was destroyed. --restrict=false is refused (it
# "does not accept any argument"), so that nothing turns it off. A new process starts without it.
#
#   __global__ void f(float* x, float* y) { x[0] = y[0] + 1; x[1] = y[0]; }
#
# For x == y, which C++ allows, the second read must see what was written. With --restrict both reads
# are ld.global.nc, through a cache that PTX allows only for memory that the kernel does not write.
#
# Output seen, the same for both versions:
#   before: y[0] is read by ld.global
#   with --restrict: y[0] is read by ld.global.nc
#   after: y[0] is read by ld.global.nc
#   after, first program destroyed: y[0] is read by ld.global.nc
#   in a new process: y[0] is read by ld.global
#
# Expected: "after" as "before".
#
# Why it matters: one library of a process that compiles with --restrict (which is right for its own
# kernels) changes what all others get, those that write in place first of all. What they get depends,
# without any message, on the order of first calls, and stays so once it is in a cache
# on disk under a key made of source and options. A library can only pass --restrict itself, always,
# and write its kernels so that it holds.
#
# Exits 0 while the behavior is as described, 1 if it has changed.
set -euo pipefail
export CUDA_CACHE_DISABLE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 13.0.88 13.5.37; do
  python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$work/$version" \
    "nvidia-cuda-nvrtc==$version"
done

cat >"$work/check.py" <<'PYTHON'
import ctypes
import pathlib
import re
import sys

folder = pathlib.Path(__file__).parent / sys.argv[1] / "nvidia/cu13/lib"
for builtins in folder.glob("libnvrtc-builtins.so.*"):  # NVRTC opens it by its bare name
    ctypes.CDLL(str(builtins))
nvrtc = ctypes.CDLL(str(folder / "libnvrtc.so.13"))
SOURCE = b'extern "C" __global__ void f(float* x, float* y) { x[0] = y[0] + 1; x[1] = y[0]; }'


def compiled(*options):
    """The program, and how its PTX reads y[0]."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [b"--gpu-architecture=compute_90", *options]
    array = (ctypes.c_char_p * len(options))(*options)
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE, b"f.cu", 0, None, None)
    assert not nvrtc.nvrtcCompileProgram(program, len(options), array)
    assert not nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    assert not nvrtc.nvrtcGetPTX(program, ptx)
    text = ptx.value.decode()
    (how,) = set(re.findall(r"ld\.global(?:\.nc)?", text))
    return program, f"y[0] is read by {how}"


RIGHT = "y[0] is read by ld.global"
FAST = "y[0] is read by ld.global.nc"
seen = []


def show(name, reads):
    print(f"NVRTC {sys.argv[1]}, {name}: {reads}")
    seen.append(reads)


if sys.argv[2:] == ["new"]:
    show("in a new process", compiled()[1])
    raise SystemExit(0 if seen == [RIGHT] else "The behavior has changed")
show("before", compiled()[1])
restricted, reads = compiled(b"--restrict")
show("with --restrict", reads)
show("after", compiled()[1])
assert not nvrtc.nvrtcDestroyProgram(ctypes.byref(restricted))
show("after, first program destroyed", compiled()[1])
raise SystemExit(0 if seen == [RIGHT, FAST, FAST, FAST] else "The behavior has changed")
PYTHON
for version in 13.0.88 13.5.37; do
  python3 "$work/check.py" "$version"
  python3 "$work/check.py" "$version" new
done
