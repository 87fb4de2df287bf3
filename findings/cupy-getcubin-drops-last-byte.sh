#!/usr/bin/env bash
# CuPy 14.2.0: `cupy.cuda.nvrtc.getCUBIN` returns a cubin without its last byte.
#
# Versions: cupy-cuda13x 14.2.0, nvidia-cuda-nvrtc 13.0.88, pyelftools 0.33, nvdisasm of triton
# 3.5.0 (Linux x86-64, CPython 3.11, no GPU needed).
#
# Behavior. NVRTC's sizes of PTX and of the log count a final NUL, which a binding takes away. A
# cubin is an ELF file and has no such NUL, but getCUBIN takes its last byte away, too. For these
# architectures the file ends with its program headers, so that the last of these is cut short;
# readers of ELF and NVIDIA's own tools reject the file. The lost byte is the top byte of the last
# header's p_align, a zero: with b"\0" appended the file is exactly NVRTC's.
#
# Output seen:
#   sm_80: NVRTC 3112 bytes, CuPy 3111, program headers end at 3112; ELF reader: rejected, with a zero appended: read
#   sm_90a: NVRTC 3568 bytes, CuPy 3567, program headers end at 3568; ELF reader: rejected, with a zero appended: read
#   sm_100: NVRTC 5144 bytes, CuPy 5143, program headers end at 5144; ELF reader: rejected, with a zero appended: read
#   nvdisasm of CuPy's sm_90a: rejected; with a zero appended: disassembled
#
# Expected: nvrtcGetCUBINSize bytes, as nvrtcGetCUBIN writes them.
#
# Why it matters: one who compiles kernels with CuPy and writes the cubins to a cache, or looks at
# them with nvdisasm, cuobjdump or pyelftools, gets files that look broken, and for a moment suspects
# everything but the binding. CuPy makes its own kernels from such bytes by default, so that using it
# shows nothing. A checksum or size noted elsewhere does not match either.
#
# Exits 0 while the behavior is as described, 1 if it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip install -qq --disable-pip-version-check \
  cupy-cuda13x==14.2.0 nvidia-cuda-nvrtc==13.0.88 pyelftools==0.33
# For its nvdisasm only
"$python" -m pip install -qq --disable-pip-version-check --no-deps triton==3.5.0

cat >"$work/check.py" <<'PYTHON'
import ctypes
import io
import pathlib
import struct
import subprocess
import sysconfig

from cupy.cuda import nvrtc
from elftools.elf.elffile import ELFFile

SOURCE = 'extern "C" __global__ void f(float* x) { x[threadIdx.x] *= 2; }'
assert nvrtc.getVersion() == (13, 0)
(path,) = {line.split()[-1] for line in open("/proc/self/maps") if "/libnvrtc.so" in line}
library = ctypes.CDLL(path)  # the one that CuPy has loaded


def by_cupy(arch):
    program = nvrtc.createProgram(SOURCE, "f.cu", (), ())
    nvrtc.compileProgram(program, (f"--gpu-architecture={arch}",))
    return nvrtc.getCUBIN(program)


def by_nvrtc(arch):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    option = (ctypes.c_char_p * 1)(f"--gpu-architecture={arch}".encode())
    assert not library.nvrtcCreateProgram(
        ctypes.byref(program), SOURCE.encode(), b"f.cu", 0, None, None
    )
    assert not library.nvrtcCompileProgram(program, 1, option)
    assert not library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    assert not library.nvrtcGetCUBIN(program, cubin)
    return cubin.raw


def reads(cubin):
    try:
        [segment["p_type"] for segment in ELFFile(io.BytesIO(cubin)).iter_segments()]
    except Exception:
        return False
    return True


as_described = True
for arch in "sm_80", "sm_90a", "sm_100":
    ours, whole = by_cupy(arch), by_nvrtc(arch)
    (headers,) = struct.unpack_from("<Q", whole, 32)  # e_phoff
    each, count = struct.unpack_from("<HH", whole, 54)  # e_phentsize, e_phnum
    before, after = reads(ours), reads(ours + b"\0")
    print(
        f"{arch}: NVRTC {len(whole)} bytes, CuPy {len(ours)}, "
        f"program headers end at {headers + each * count}; "
        f"ELF reader: {'read' if before else 'rejected'}, "
        f"with a zero appended: {'read' if after else 'rejected'}"
    )
    as_described &= ours + b"\0" == whole and len(whole) == headers + each * count
    as_described &= after and not before

packages = pathlib.Path(sysconfig.get_path("purelib"))
nvdisasm = packages / "triton/backends/nvidia/bin/nvdisasm"
seen = []
for cubin in by_cupy("sm_90a"), by_cupy("sm_90a") + b"\0":
    file = pathlib.Path(__file__).with_name("f.cubin")
    file.write_bytes(cubin)
    done = subprocess.run([nvdisasm, file], capture_output=True, text=True)
    seen.append("disassembled" if done.returncode == 0 and "EXIT" in done.stdout else "rejected")
print(f"nvdisasm of CuPy's sm_90a: {seen[0]}; with a zero appended: {seen[1]}")
as_described &= seen == ["rejected", "disassembled"]
raise SystemExit(0 if as_described else "The behavior has changed")
PYTHON
"$python" "$work/check.py"
