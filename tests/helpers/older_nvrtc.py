"""Compile Hopper's kernels with an NVRTC that is not the installed one; a script.

python tests/helpers/older_nvrtc.py DIRECTORY    of the wheel nvidia-cuda-nvrtc, unpacked

Prints the version of NVRTC, and a line for each kernel that spills or that the assembler gives
advice for.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

# CuPy takes the library that the process has loaded already.
for name in ("libnvrtc-builtins.so.*", "libnvrtc.so.*"):
    (library,) = Path(sys.argv[1]).rglob(name)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

from cuneigh import _jit  # noqa: E402
from cuneigh._backends import hopper  # noqa: E402
from cuneigh._device import of_capability  # noqa: E402
from cuneigh._jit import _compiler  # noqa: E402
from cuneigh._parameters import window_arguments  # noqa: E402
from cuneigh._problem import Spec  # noqa: E402
from cuneigh._validate import attention_problem  # noqa: E402

DEVICE = of_capability((9, 0))


def kernels(
    operation: str, rank: int, dim: int, dilation: int, has_mask: bool = True
) -> list[_jit.Kernel]:
    spec = Spec((1, *(16,) * rank, 2, dim), "bfloat16")
    additional = Spec((1, 5, 2, dim), "bfloat16") if dilation > 1 else None
    mask = Spec(spec.shape[:-2], "bool") if has_mask and operation != "jvp" else None
    window = window_arguments("test", rank, 4, 1, dilation, False)
    problem = attention_problem(
        "test", operation, spec, spec, spec, window, None, *(additional,) * 2, None, None, mask
    )
    found = hopper.kernels(problem, DEVICE)
    return [kernel for kernel in found if kernel.name.startswith("hopper/")]


def main() -> None:
    print(_compiler.version())
    # Of each pass the kernel that needs the most registers: three axes, dilated, long vectors, a
    # mask; those of all gradients, which take no dilation, of long and short vectors; those of
    # gradients of the longest; and one that leaves its producers few registers
    heaviest = [kernel for each in hopper.LONGEST for kernel in kernels(each, 3, 128, 2)]
    candidates = [*kernels("backward", 1, 128, 1), *kernels("backward", 3, 64, 1)]
    of_all = [each for each in candidates if "kSums = true" in each.plan]
    found = kernels("backward", 2, 128, 1, has_mask=False)
    ahead = [each for each in found if "kAhead = true" in each.plan]
    assert ahead
    long = kernels("backward", 3, 256, 2)
    for kernel in dict.fromkeys(heaviest + of_all + ahead + long):
        resources = _compiler.build(kernel, kernel.target("sm_90"), _jit.packaged()).resources
        if resources.spill_stores or resources.advice:
            print(kernel.name, resources)


if __name__ == "__main__":
    main()
