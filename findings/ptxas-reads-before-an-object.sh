#!/usr/bin/env bash
# ptxas 13.0.88 and 13.5.37: a load from shared memory reads 4 bytes before the object that the
# program reads, another thread's, so that racecheck reports races that the program does not have.
#
# Versions: nvidia-cuda-nvrtc 13.0.88 and 13.5.37, nvidia-cuda-nvdisasm 13.5.37 (Linux x86-64;
# compiled only, no GPU needed), for sm_80, sm_90, sm_100 and sm_120.
#
# Behavior. Each thread has an entry of four ints in an array in shared memory, writes it and reads
# it, nobody else's. The array begins 4 bytes after a multiple of 16. The entry's four words
# are read by one load of 16 bytes from 4 bytes before the entry, which is where the last word of
# the previous thread's entry lies, and a load of 4 bytes for its own last word. The word before
# is thrown away. In PTX each of the four words is loaded by itself; the stores keep to the entry.
#
# Output seen (the table begins at 0, the array at 4, an entry's words are at 4, 8, 12 and 16):
#   NVRTC 13.0.88 sm_80: stores at 4..20, loads at 0..20
#   NVRTC 13.0.88 sm_90: stores at 4..20, loads at 0..20
#   NVRTC 13.0.88 sm_100: stores at 4..20, loads at 0..20
#   NVRTC 13.0.88 sm_120: stores at 4..20, loads at 0..20
#   NVRTC 13.5.37 sm_80: stores at 4..20, loads at 0..20
#   NVRTC 13.5.37 sm_90: stores at 4..20, loads at 0..20
#   NVRTC 13.5.37 sm_100: stores at 4..20, loads at 0..20
#   NVRTC 13.5.37 sm_120: stores at 4..20, loads at 0..20
#
# Expected: loads of the entry's own 16 bytes: a load of 4, one of 8 and one of 4, like the stores.
#
# Why it matters: the results are right, but racecheck of compute-sanitizer watches what the machine
# code reads. In a larger kernel of this form on an H200 it named a read-after-write hazard between
# every two neighboring lanes, in lines of source where each thread touches its own entry. One looks
# for a missing barrier that is not missing. With the array at a multiple of 16 bytes the reports
# are gone, and each entry is one load.
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
python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$work/nvdisasm" \
  nvidia-cuda-nvdisasm==13.5.37

cat >"$work/kernel.cu" <<'CUDA'
struct Entry { int a, b, c, d; };
struct Table { int head; Entry entry[64]; };

extern "C" __global__ void kernel(int* out, int n) {
  __shared__ __align__(16) Table table;
  const int t = threadIdx.x;
  table.entry[t] = {n + t, n - t, n * t, n ^ t};
  int count = 0;
  for (int i = 0; i < n; ++i) {
    const Entry mine = table.entry[t];
    if (i >= mine.b || mine.a <= i) count += 1;
    if (i >= mine.c && mine.d > i) count += 3;
    asm volatile("" ::: "memory");  // read it again each time
  }
  out[t] = count;
}
CUDA

cat >"$work/check.py" <<'PYTHON'
import ctypes
import re
import subprocess
import sys
from pathlib import Path

here, version = Path(sys.argv[1]), sys.argv[2]
folder = here / version / "nvidia/cu13/lib"
for builtins in folder.glob("libnvrtc-builtins.so.*"):  # NVRTC opens it by its bare name
    ctypes.CDLL(str(builtins))
nvrtc = ctypes.CDLL(str(folder / "libnvrtc.so.13"))
nvdisasm = next((here / "nvdisasm").rglob("nvdisasm"))


def cubin(arch):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = (here / "kernel.cu").read_bytes()
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={arch}".encode())
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None)
    assert nvrtc.nvrtcCompileProgram(program, 1, options) == 0
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, code)
    return code.raw


def accesses(text, name):
    """The bytes (begin, end) of all instructions of this name, from the first of the table on."""
    found = re.findall(rf"\b{name}(\.64|\.128)?\b[^\[]*\[R\d+(?:\.X16)?(?:\+(0x[0-9a-f]+))?\]", text)
    spans = [(int(at or "0", 16), int(bits[1:] or 32) // 8 if bits else 4) for bits, at in found]
    return min(at for at, _ in spans), max(at + size for at, size in spans)


as_described = True
for arch in ("sm_80", "sm_90", "sm_100", "sm_120"):
    file = here / "kernel.cubin"
    file.write_bytes(cubin(arch))
    text = subprocess.run([nvdisasm, "-c", file], capture_output=True, text=True, check=True).stdout
    stores, loads = accesses(text, "STS"), accesses(text, "LDS")
    print(
        f"NVRTC {version} {arch}: stores at {stores[0]}..{stores[1]}, loads at {loads[0]}..{loads[1]}"
    )
    as_described &= stores == (4, 20) and loads == (0, 20)
sys.exit(not as_described)
PYTHON

chmod -R u+x "$work/nvdisasm"
for version in 13.0.88 13.5.37; do python3 "$work/check.py" "$work" "$version"; done
