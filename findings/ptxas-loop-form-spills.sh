#!/usr/bin/env bash
# NVRTC / ptxas 13.0.88 and 13.5.37, sm_90a: how the head of a loop is written decides whether
# registers spill.
#
# Versions: nvidia-cuda-nvrtc 13.0.88 and 13.5.37 (Linux x86-64; compiled only, no GPU needed).
#
# Behavior. A warpgroup with 160 registers (setmaxnreg) goes over items and does wgmma products for
# each that is not to be skipped. `skip()` is a lambda that goes past items to be skipped. Two forms
# of the loop do the same things in the same order:
#   step:   for (skip(); left > 0; next(), skip()) products();
#   middle: while (true) { skip(); if (left <= 0) break; products(); next(); }
# "step" spills, "middle" does not. What can be seen in PTX: skip() stands in two places of "step"
# and is inlined at both, so that there are two copies of its wait for a barrier instead of one
# (one wait more is in the products). Why this costs registers, the log does not say. With 168
# registers, which is more than three such warpgroups can have, neither form spills.
#
# Output seen:
#   NVRTC 13.0.88, 160 registers: step spills 72 bytes (loads 76), middle 0 (0); waits in PTX 3 and 2
#   NVRTC 13.0.88, 168 registers: step spills 0 bytes (loads 0), middle 0 (0); waits in PTX 3 and 2
#   NVRTC 13.5.37, 160 registers: step spills 72 bytes (loads 76), middle 0 (0); waits in PTX 3 and 2
#   NVRTC 13.5.37, 168 registers: step spills 0 bytes (loads 0), middle 0 (0); waits in PTX 3 and 2
#
# Expected: the same registers for both forms, as the accumulators, which fill most of them, live
# alike in both; the second copy of skip() holds no more than a counter and a slot.
#
# Why it matters: attention and GEMM kernels for Hopper run at the last free register, and 160 is
# all that three consumer warpgroups can have (128 * 32 + 384 * 160 = 65536). A change of style, or
# moving the skip into an iterator, can then cost spills. Nothing fails, and without
# --ptxas-options=-v nothing is logged. Worth trying before one gives up a tile size: make the
# helper stand in one place.
#
# Exits 0 while the behavior is as described, 1 if it has changed.
set -euo pipefail
export CUDA_CACHE_DISABLE=1  # what comes from NVRTC's cache has no log
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 13.0.88 13.5.37; do
  python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$work/$version" \
    "nvidia-cuda-nvrtc==$version"
done

cat >"$work/kernel.cu" <<'CUDA'
// Only to be compiled: nobody fills the shared memory. check.py defines NAMES and OPERANDS.
using Descriptor = unsigned long long;

// d += a b, [64, 16] [16, 128]; a in shared memory or in registers
__device__ void multiply(float (&d)[64], Descriptor a, Descriptor b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" NAMES
               "}, %64, %65, 1, 1, 1, 0, 0;" : OPERANDS(d) : "l"(a), "l"(b));
}
__device__ void multiply(float (&d)[64], const unsigned* a, Descriptor b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" NAMES
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
               : OPERANDS(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ void finish(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (float& x : d) asm volatile("" : "+f"(x)::"memory");
}
__device__ unsigned pack(float low, float high) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ void wait(const Descriptor& barrier) {
  asm volatile(
      "{ .reg .pred p; again%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @!p bra "
      "again%=; }" ::"r"(unsigned(__cvta_generic_to_shared(&barrier))) : "memory");
}

extern "C" __global__ void __launch_bounds__(512, 1)
    f(float* out, Descriptor q, Descriptor k, Descriptor v, int left, float scale) {
  __shared__ Descriptor full[4];
  __shared__ volatile int kind[4];
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));

  float o[64] = {}, sum = 0;
  int slot = 0;
  auto next = [&] {
    --left;
    slot = (slot + 1) % 4;
  };
  auto skip = [&] {
    for (; left > 0 && kind[slot] == 0; next()) wait(full[slot]);
  };
  auto products = [&] {  // s = q k^T, o += exp(s) v, in halves
    float s[64] = {};
    begin();
    for (int i = 0; i < 8; ++i) multiply(s, q + 2 * i, k + 1024 * slot + 2 * i);
    commit();
    finish(s);
    for (int half = 0; half < 2; ++half) {
      unsigned p[16];
      for (int i = 32 * half; i < 32 * half + 32; ++i) sum += s[i] = exp2f(s[i] * scale);
      for (int i = 0; i < 16; ++i) p[i] = pack(s[32 * half + 2 * i], s[32 * half + 2 * i + 1]);
      if (half == 0) wait(full[slot]);
      begin();
      for (int i = 0; i < 4; ++i) multiply(o, p + 4 * i, v + 1024 * slot + 512 * half + 128 * i);
      commit();
    }
    finish(o);
  };

#if STEP
  for (skip(); left > 0; next(), skip()) products();
#else
  while (true) {
    skip();
    if (left <= 0) break;
    products();
    next();
  }
#endif
  for (int i = 0; i < 64; ++i) out[64 * threadIdx.x + i] = o[i] * sum;
}
CUDA

cat >"$work/check.py" <<'PYTHON'
import ctypes
import pathlib
import re
import sys

here = pathlib.Path(__file__).parent
version = sys.argv[1]
folder = here / version / "nvidia/cu13/lib"
for builtins in folder.glob("libnvrtc-builtins.so.*"):  # NVRTC opens it by its bare name
    ctypes.CDLL(str(builtins))
nvrtc = ctypes.CDLL(str(folder / "libnvrtc.so.13"))
NAMES = ", ".join(f"%{i}" for i in range(64))
OPERANDS = ", ".join(f'"+f"(d[{i}])' for i in range(64))
SOURCE = f'#define NAMES "{NAMES}"\n#define OPERANDS(d) {OPERANDS}\n'
SOURCE += (here / "kernel.cu").read_text()


def text(program, what):
    size = ctypes.c_size_t()
    assert not getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    assert not getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode()


def compiled(arch, *options):
    program = ctypes.c_void_p()
    options = [f"--gpu-architecture={arch}", "--std=c++17", *options]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    assert not nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), SOURCE.encode(), b"f.cu", 0, None, None
    )
    result = nvrtc.nvrtcCompileProgram(program, len(options), array)
    assert result == 0, text(program, "ProgramLog")
    return program


def spills(*options):
    log = text(compiled("sm_90a", "--ptxas-options=-v", *options), "ProgramLog")
    assert "C75" not in log, log  # neither setmaxnreg nor wgmma was given up
    (found,) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return tuple(int(count) for count in found)


def waits(*options):
    return text(compiled("compute_90a", *options), "PTX").count("mbarrier.try_wait")


as_described = True
for registers in 160, 168:
    limit = f"-DREGISTERS={registers}"
    step, middle = spills(limit, "-DSTEP=1"), spills(limit, "-DSTEP=0")
    counts = waits(limit, "-DSTEP=1"), waits(limit, "-DSTEP=0")
    print(
        f"NVRTC {version}, {registers} registers: step spills {step[0]} bytes (loads {step[1]}), "
        f"middle {middle[0]} ({middle[1]}); waits in PTX {counts[0]} and {counts[1]}"
    )
    as_described &= counts == (3, 2) and middle == (0, 0)
    as_described &= step == ((72, 76) if registers == 160 else (0, 0))
raise SystemExit(0 if as_described else "The behavior has changed")
PYTHON
for version in 13.0.88 13.5.37; do python3 "$work/check.py" "$version"; done
