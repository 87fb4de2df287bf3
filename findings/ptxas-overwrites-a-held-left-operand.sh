#!/usr/bin/env bash
# ptxas 12.9.86 and 13.0.88 put the left operand of one wgmma into registers that hold the left
# operand of another, which the next round of the loop reads: the product is wrong, silently.
#
# Versions: nvidia-cuda-nvrtc-cu12 12.9.86, nvidia-cuda-nvrtc 13.0.48, 13.0.88, 13.1.115 and
# 13.5.37, nvidia-cuda-nvdisasm 13.5.37 (Linux x86-64; compiled only, no GPU needed), for sm_90a.
#
# Behavior. A loop has two matrix products, as attention has: scores = left right^T, and sum +=
# weights values, where weights are made of the scores. `wgmma.mma_async` takes a left operand from
# registers. Part of `left` is loaded into four registers before the loop and never written again;
# the weights are other variables. Between the products the sums are multiplied by a factor if some
# condition holds. All products have the documented fence, commit and wait. From 13.1 on weights get
# registers of their own. Before, those of the last step get the registers that hold `left`: they
# are written in the loop, and the first product of the next round multiplies by weights.
#
# Output seen (registers, the first of four):
#   12.9.86, most > top: held R88, weights R24 R32 R40 R88: overwritten
#   12.9.86, true: held R88, weights R24 R32 R40 R48: kept
#   13.0.48, most > top: held R88, weights R24 R32 R40 R88: overwritten
#   13.0.48, true: held R88, weights R24 R32 R40 R48: kept
#   13.0.88, most > top: held R88, weights R24 R32 R40 R88: overwritten
#   13.0.88, true: held R88, weights R24 R32 R40 R48: kept
#   13.1.115, most > top: held R88, weights R24 R32 R40 R48: kept
#   13.1.115, true: held R88, weights R24 R32 R40 R48: kept
#   13.5.37, most > top: held R88, weights R24 R32 R40 R48: kept
#   13.5.37, true: held R88, weights R24 R32 R40 R48: kept
# "most > top" is the condition; where it is "true", there is no branch.
#
# Expected: a register that is read in the next round of a loop is not written in this one. Nothing
# is printed: no advice, no warning.
#
# Why it matters: operands that do not change over a loop are what one wants in registers, since
# shared memory bounds such kernels. On an H200 an attention kernel built like this was right for
# most head dimensions and wrong by 100 % for a few, where the scores and the sums had as many
# columns; the NVRTC beside PyTorch 2.11 there was 13.0. Operands from shared memory, or loaded anew
# in each round, are not affected.
#
# Exits 0 while the behavior is as described, 1 if it has changed.
set -euo pipefail
export CUDA_CACHE_DISABLE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install() { python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$@"; }
install "$work/12.9.86" nvidia-cuda-nvrtc-cu12==12.9.86
for version in 13.0.48 13.0.88 13.1.115 13.5.37; do
  install "$work/$version" "nvidia-cuda-nvrtc==$version"
done
install "$work/nvdisasm" nvidia-cuda-nvdisasm==13.5.37

cat >"$work/check.py" <<'PYTHON'
import ctypes
import pathlib
import re
import subprocess
import sys

version = sys.argv[1]
here = pathlib.Path(__file__).parent
ROWS = ", ".join(f"%{i}" for i in range(32))
SUMS = ", ".join(f'"+f"(d[{i}])' for i in range(32))
TYPE = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"
LEFT = '"r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right)'
SOURCE = """
using Descriptor = unsigned long long;
__device__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void finish(float (&d)[32]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ void multiply(float (&d)[32], Descriptor left, Descriptor right) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 0, 0; %TYPE {%ROWS}, %32, %33, p, 1, 1, 0, 0; }"
               : %SUMS : "l"(left), "l"(right));
}
__device__ void add_rows(float (&d)[32], const unsigned (&left)[4], Descriptor right) {
  asm volatile("%TYPE {%ROWS}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;" : %SUMS : %LEFT);
}
__device__ void add_columns(float (&d)[32], const unsigned (&left)[4], Descriptor right) {
  asm volatile("%TYPE {%ROWS}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;" : %SUMS : %LEFT);
}
__device__ unsigned pack(float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
extern "C" __global__ void __launch_bounds__(128, 1)
    f(float* result, const uint4* rows, Descriptor left, Descriptor right, Descriptor values,
      int rounds) {
  const uint4 four = rows[threadIdx.x];
  const unsigned held[4] = {four.x, four.y, four.z, four.w};
  float sum[32] = {}, top = -1e30f;
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {
    float score[32];
    fence();
    multiply(score, left, right);
    add_rows(score, held, right + 2);
    finish(score);
    float most = score[0];
    for (float each : score) most = fmaxf(most, each);
    if (%CONDITION) {
      for (float& each : sum) each *= exp2f(top - most);
      top = most;
    }
    for (int half = 0; half < 2; ++half) {
      unsigned weight[2][4];
      for (int j = 0; j < 8; ++j)
        weight[j / 4][j % 4] = pack(score[16 * half + 2 * j], score[16 * half + 2 * j + 1]);
      fence();
      for (int j = 0; j < 2; ++j) add_columns(sum, weight[j], values + 128 * (2 * half + j));
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }
    finish(sum);
  }
  for (int i = 0; i < 32; ++i) result[i * 128 + threadIdx.x] = sum[i];
}
"""
for name, text in (("TYPE", TYPE), ("ROWS", ROWS), ("SUMS", SUMS), ("LEFT", LEFT)):
    SOURCE = SOURCE.replace(f"%{name}", text)

(folder,) = (each.parent for each in (here / version).rglob("libnvrtc.so.*"))
for builtins in folder.glob("libnvrtc-builtins.so.*"):  # NVRTC opens it by its bare name
    ctypes.CDLL(str(builtins))
(library,) = folder.glob("libnvrtc.so.*")
nvrtc = ctypes.CDLL(str(library))


def machine_code(condition):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = SOURCE.replace("%CONDITION", condition).encode()
    option = ctypes.c_char_p(b"--gpu-architecture=sm_90a")
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"f.cu", 0, None, None)
    assert not nvrtc.nvrtcCompileProgram(program, 1, ctypes.byref(option))
    assert not nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    assert not nvrtc.nvrtcGetCUBIN(program, cubin)
    (here / "f.cubin").write_bytes(cubin.raw)
    (tool,) = (here / "nvdisasm").rglob("bin/nvdisasm")
    tool.chmod(0o755)
    command = [tool, "-c", here / "f.cubin"]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)


def operands(code):
    """The first registers of left operands: of rows that are held, and of weights."""
    found = re.findall(
        r"HGMMA\.64x64x16\.F32\.BF16 R\d+, R(\d+), gdesc\[UR\d+\](\.tnspB)?", code
    )
    of_rows = sorted({int(number) for number, transposed in found if not transposed})
    return of_rows, sorted({int(number) for number, transposed in found if transposed})


def writers(code, register):
    """What writes a register between the first product and the last one, which are in the loop."""
    loop = code[code.index("HGMMA") : code.rindex("HGMMA")]
    return set(re.findall(rf"\*/\s+(?:@!?U?P\d+ )?([A-Z]\w*)\S*\s+R{register},", loop))


as_described = True
for condition, is_old in (("most > top", version < "13.1"), ("true", False)):
    code = machine_code(condition)
    held, weights = operands(code)
    written = writers(code, held[0])
    overwritten = held[0] in weights and written == {"F2FP"}  # which packs weights
    as_described &= len(held) == 1 and overwritten == is_old and bool(written) == is_old
    print(
        f"{version}, {condition}: held R{held[0]}, "
        f"weights {' '.join(f'R{each}' for each in weights)}: "
        f"{'overwritten' if overwritten else 'kept'}"
    )
raise SystemExit(0 if as_described else "The behavior has changed")
PYTHON
for version in 12.9.86 13.0.48 13.0.88 13.1.115 13.5.37; do
  python3 "$work/check.py" "$version"
done
