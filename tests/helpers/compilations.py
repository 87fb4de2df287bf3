"""Compile in a fresh process, side by side and after somebody else's program; a script.

python tests/helpers/compilations.py [DIRECTORY]    of the wheel nvidia-cuda-nvrtc, unpacked

Prints the version of NVRTC, the installed one unless a directory is given. Fails where one of the
first compilations does, or where a kernel depends on what was compiled before.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if len(sys.argv) > 1:  # CuPy takes the library that the process has loaded already.
    (library,) = Path(sys.argv[1]).rglob("libnvrtc.so.*")
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

from cuneigh._jit import Kernel, Sources, _compiler

THREADS = 4

TOY = """
namespace cuneigh { template <typename Plan> __global__ void toy(float* x, const float* y) {
  x[0] = Plan::kStep * y[0];
  x[1] = y[0];
} }
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "toy.cu").write_text(TOY)
        sources = Sources(Path(directory))
        _ = sources.texts, _compiler.architectures(), _compiler.header_directory()
        ready = threading.Barrier(THREADS)

        def build(step: int) -> bytes:
            ready.wait(60)
            kernel = Kernel("toy", f"static constexpr int kStep = {step};")
            return _compiler.build(kernel, "sm_80", sources).cubin

        with ThreadPoolExecutor(THREADS) as pool:
            first = list(pool.map(build, range(THREADS)))
            compile_foreign()
            second = list(pool.map(build, range(THREADS)))
    assert first == second, "a kernel depends on what was compiled before it"
    print(_compiler.version())


def compile_foreign() -> None:
    """What somebody else may compile: NVRTC keeps the option for the programs after it."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram("__global__ void f(float* x) { *x = 1; }", "f.cu", (), ())
    nvrtc.compileProgram(program, ("--restrict", "--gpu-architecture=sm_80"))
    nvrtc.destroyProgram(program)


if __name__ == "__main__":
    main()
