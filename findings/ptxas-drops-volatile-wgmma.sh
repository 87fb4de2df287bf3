#!/usr/bin/env bash
# ptxas 13.0.88 and 13.5.37: a matrix product in `asm volatile` whose result nobody reads is removed.
#
# Versions: nvidia-cuda-nvrtc 13.0.88 and 13.5.37, nvidia-cuda-nvdisasm 13.5.37 (Linux x86-64;
# compiled only, no GPU needed), for sm_90a.
#
# Behavior. A kernel issues two products in a loop, each four `wgmma.mma_async` of m64n64k16 with
# the documented fence, commit and wait, all in `asm volatile` with a "memory" clobber, followed by
# an empty `asm volatile` that takes every register of the result as "+f". It stores the result of
# the first product. PTX has all eight instructions. In the machine code the four of the second
# product are gone, as soon as its result is not stored; in their place is one
# `HGMMA.64x8x16.F16 RZ` with null operands, which takes part in the counting of groups.
#
# Output seen (instructions with a result of 64 columns, and with one of 8):
#   NVRTC 13.0.88 both stored: PTX 8, machine code 8 and 0
#   NVRTC 13.0.88 first stored: PTX 8, machine code 4 and 1
#   NVRTC 13.5.37 both stored: PTX 8, machine code 8 and 0
#   NVRTC 13.5.37 first stored: PTX 8, machine code 4 and 1
#
# Expected: `volatile` keeps an instruction from being deleted, says the documentation of inline
# assembly; it reads shared memory, too. Nothing is printed about the removal.
#
# Why it matters: to learn what a part of a kernel costs, one leaves it out and measures again. With
# what is done to a product's result the product disappears, and its time is taken for that of the
# part: in one backward pass, storing a result seemed to take 23 %, most of which was the product.
# Results must be used, if only under a condition that is never true.
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

cat >"$work/kernel.py" <<'PYTHON'
"""Prints the source: two products of 64 rows and 64 columns, whose results are stored or not."""
import sys

REGISTERS = ", ".join(f"%{i}" for i in range(32))
OUTPUTS = ", ".join(f'"+f"(d[{i}])' for i in range(32))
print(f"""
typedef unsigned long long Descriptor;
__device__ inline Descriptor descriptor(const void* p) {{
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(p));
  return Descriptor((address & 0x3ffff) >> 4) | Descriptor(1) << 16 | Descriptor(64) << 32 |
         Descriptor(1) << 62;
}}
__device__ inline void step(float (&d)[32], Descriptor a, Descriptor b) {{
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{REGISTERS}}}, %32, %33, 1, "
               "1, 1, 0, 0;" : {OUTPUTS} : "l"(a), "l"(b) : "memory");
}}
__device__ inline void multiply(float (&d)[32], Descriptor a, Descriptor b) {{
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  for (int k = 0; k < 8; k += 2) step(d, a + k, b + k);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(d[i])::"memory");
}}
extern "C" __global__ void __launch_bounds__(128) kernel(float* out, int n) {{
  __shared__ __align__(1024) uint4 tiles[3][64][8];
  for (int i = threadIdx.x; i < 3 * 64 * 8; i += 128) tiles[0][0][i] = make_uint4(i, n, i, n);
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  float first[32] = {{}};
#pragma unroll 1
  for (int i = 0; i < n; ++i) {{
    float second[32] = {{}};
    multiply(first, descriptor(tiles[0]), descriptor(tiles[1]));
    multiply(second, descriptor(tiles[0]), descriptor(tiles[2]));
    if ({sys.argv[1]})
      for (int k = 0; k < 32; ++k) out[(i * 32 + k) * 128 + threadIdx.x] = second[k];
  }}
  for (int k = 0; k < 32; ++k) out[k * 128 + threadIdx.x] = first[k];
}}""")
PYTHON

cat >"$work/compile.py" <<'PYTHON'
"""compile.py PACKAGE SOURCE OUTPUT: PTX and machine code for sm_90a, by the NVRTC of a package."""
import ctypes
import sys
from pathlib import Path

package, source, output = sys.argv[1:]
folder = next(Path(package).rglob("libnvrtc.so*")).parent
ctypes.CDLL(str(next(folder.glob("libnvrtc-builtins.so*"))), mode=ctypes.RTLD_GLOBAL)
nvrtc = ctypes.CDLL(str(next(folder.glob("libnvrtc.so*"))))


def check(code):
    assert code == 0, f"NVRTC error {code}"


program = ctypes.c_void_p()
text = Path(source).read_bytes()
check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None))
options = (ctypes.c_char_p * 2)(b"-arch=sm_90a", b"-std=c++17")
check(nvrtc.nvrtcCompileProgram(program, 2, options))
for kind, suffix in (("PTX", "ptx"), ("CUBIN", "cubin")):
    size = ctypes.c_size_t()
    check(getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    check(getattr(nvrtc, f"nvrtcGet{kind}")(program, data))
    Path(f"{output}.{suffix}").write_bytes(data.raw)
PYTHON

nvdisasm=$(find "$work/nvdisasm" -type f -name nvdisasm)
chmod +x "$nvdisasm"
count() { grep -cE "$1" "$2" || true; }
for version in 13.0.88 13.5.37; do
  for stored in both first; do
    [ "$stored" = both ] && flag=true || flag=false
    python3 "$work/kernel.py" "$flag" >"$work/kernel.cu"
    python3 "$work/compile.py" "$work/$version" "$work/kernel.cu" "$work/out"
    "$nvdisasm" -c "$work/out.cubin" >"$work/out.sass"
    echo "NVRTC $version $stored stored: PTX $(count 'wgmma.mma_async' "$work/out.ptx")," \
      "machine code $(count 'HGMMA.64x64x16' "$work/out.sass")" \
      "and $(count 'HGMMA.64x8x16' "$work/out.sass")"
  done
done | tee "$work/seen"

cat >"$work/wanted" <<'OUTPUT'
NVRTC 13.0.88 both stored: PTX 8, machine code 8 and 0
NVRTC 13.0.88 first stored: PTX 8, machine code 4 and 1
NVRTC 13.5.37 both stored: PTX 8, machine code 8 and 0
NVRTC 13.5.37 first stored: PTX 8, machine code 4 and 1
OUTPUT
diff "$work/wanted" "$work/seen"
