"""What the parameters of a kernel are, by its declaration: NVRTC makes no code of it."""

from __future__ import annotations

from collections.abc import Sequence

from cuneigh import _jit
from cuneigh._jit import _compiler

CHECK = """
template <unsigned long long... sizes> struct Sizes {{}};
template <typename... Parameters> Sizes<sizeof(Parameters)...> sizes_of(void (*)(Parameters...));
__device__ Sizes<{sizes}> expected = decltype(sizes_of(&{instance}))();
"""


def check_sizes(kernel: _jit.Kernel, arch: str, sizes: Sequence[int]) -> None:
    """Raise AssertionError with NVRTC's words unless the parameters have these sizes in bytes."""
    nvrtc, texts = _compiler._nvrtc(), _jit.packaged().texts
    check = CHECK.format(sizes=", ".join(map(str, sizes)), instance=kernel.instance)
    program = nvrtc.createProgram(
        kernel.unit + check,
        "plan.cu",
        tuple(text.encode() for text in texts.values()),
        tuple(name.encode() for name in texts),
    )
    target = f"--gpu-architecture={kernel.target(arch)}"
    options = (*_compiler.options(), target, f"-I{_compiler._header_directory()}")
    try:
        _compiler._compile(nvrtc, program, (*options, "-fdevice-syntax-only"))
    except nvrtc.NVRTCError:
        raise AssertionError(f"{kernel.name}:\n{_compiler._log(nvrtc, program)}") from None
    finally:
        nvrtc.destroyProgram(program)
