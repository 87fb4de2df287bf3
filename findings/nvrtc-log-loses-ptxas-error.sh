#!/usr/bin/env bash
# NVRTC 13.0.88 and 13.5.37: when ptxas has said anything else before, the log of a compilation that
# fails in ptxas does not contain the error. --ptxas-options=-v is enough.
#
# Versions: nvidia-cuda-nvrtc 13.0.88 and 13.5.37; for comparison ptxas of nvidia-cuda-nvcc 13.0.88
# and 13.5.37 (Linux x86-64, no GPU needed).
#
# Behavior. nvrtcCompileProgram with a real architecture (sm_..) runs ptxas inside. Where it fails
# with NVRTC_ERROR_COMPILATION (6), the log has ptxas's errors only if ptxas printed no information,
# advice or warning; otherwise it has these alone. The program ptxas, given the same PTX, prints
# both.
#
# Output seen, the same for both versions:
#   too much shared memory: fails (6), log tells the error: yes
#   too much shared memory, -v: fails (6), log tells the error: no
#   too much shared memory, setmaxnreg dropped: fails (6), log tells the error: no
#   unknown instruction: fails (6), log tells the error: yes
#   unknown instruction, too low a limit of registers: fails (6), log tells the error: no
#   the program ptxas, too much shared memory, -v: fails, output tells the error: yes
# The whole log of the third is
#   ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
# and that of the second ends, as that of a success does, with registers used and the compile time.
#
# Expected: the error in the log, whatever else is there.
#
# Why it matters: libraries that compile at run time pass -v in order to learn of spills, and put the
# log in the message of their exception. Their users then read that compilation failed, and under it
# a report of registers that looks like success, or advice on performance that is not the cause.
# Compiling once more without -v brings the error back, unless advice or a warning remains; for that
# case, compile to PTX (compute_..) and give that to ptxas.
#
# Exits 0 while the behavior is as described, 1 if it has changed.
set -euo pipefail
export CUDA_CACHE_DISABLE=1  # what comes from NVRTC's cache has no log
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 13.0.88 13.5.37; do
  python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$work/$version" \
    "nvidia-cuda-nvrtc==$version" "nvidia-cuda-nvcc==$version"
done

cat >"$work/check.py" <<'PYTHON'
import ctypes
import pathlib
import subprocess
import sys

version = sys.argv[1]
here = pathlib.Path(__file__).parent
root = here / version / "nvidia/cu13"
for builtins in (root / "lib").glob("libnvrtc-builtins.so.*"):  # NVRTC opens it by its bare name
    ctypes.CDLL(str(builtins))
nvrtc = ctypes.CDLL(str(root / "lib/libnvrtc.so.13"))

# 240000 bytes of shared memory, more than a block can have
SHARED = """
extern "C" __global__ void __launch_bounds__(128) f(float* x) {
  __shared__ float all[60000];
  BEGIN
  all[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = all[threadIdx.x ^ 1];
}
"""
UNKNOWN = 'extern "C" __global__ void f() { asm volatile("no_such_instruction;"); }'
SETMAXNREG = '-DBEGIN=asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");'
VERBOSE = "--ptxas-options=-v"


def compiled(source, arch, *options):
    program = ctypes.c_void_p()
    options = [f"--gpu-architecture={arch}", *options]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    assert not nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"f.cu", 0, None, None
    )
    return program, nvrtc.nvrtcCompileProgram(program, len(options), array)


def text(program, what):
    size = ctypes.c_size_t()
    assert not getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    assert not getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode()


as_described = True
TOO_MUCH, NO_NAME = "uses too much shared data", "Not a name of any known instruction"
for what, source, options, error, told in (
    ("too much shared memory", SHARED, ["-DBEGIN="], TOO_MUCH, True),
    ("too much shared memory, -v", SHARED, ["-DBEGIN=", VERBOSE], TOO_MUCH, False),
    ("too much shared memory, setmaxnreg dropped", SHARED, [SETMAXNREG], TOO_MUCH, False),
    ("unknown instruction", UNKNOWN, [], NO_NAME, True),
    (
        "unknown instruction, too low a limit of registers",
        UNKNOWN,
        ["--maxrregcount=16"],
        NO_NAME,
        False,
    ),
):
    program, result = compiled(source, "sm_90a", *options)
    log = text(program, "ProgramLog")
    seen = error in log
    print(
        f"NVRTC {version}, {what}: fails ({result}), "
        f"log tells the error: {'yes' if seen else 'no'}"
    )
    as_described &= result == 6 and seen == told and log != ""
    as_described &= told or not any(word in log for word in ("error", "fatal"))
    if options == [SETMAXNREG]:
        as_described &= log.count("\n") == 1 and "(C7508)" in log

program, result = compiled(SHARED, "compute_90a", "-DBEGIN=")
assert result == 0
(here / "f.ptx").write_text(text(program, "PTX"))
ptxas = root / "bin/ptxas"
ptxas.chmod(0o755)
done = subprocess.run(
    [ptxas, "-v", "--gpu-name=sm_90a", here / "f.ptx", "-o", here / "f.cubin"],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
)
seen = TOO_MUCH in done.stdout and "Used " in done.stdout
print(
    f"the program ptxas {version}, too much shared memory, -v: fails, "
    f"output tells the error: {'yes' if seen else 'no'}"
)
as_described &= done.returncode != 0 and seen
if not seen:
    print(done.stdout)
raise SystemExit(0 if as_described else "The behavior has changed")
PYTHON
for version in 13.0.88 13.5.37; do python3 "$work/check.py" "$version"; done
