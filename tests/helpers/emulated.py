"""The kernels of `naive`, `fused` and `hopper` without a GPU: built by the host compiler.

python tests/helpers/emulated.py [--backend fused] [--seeds 4] [--longest 9]

Every thread of a block is a fiber, and what threads of a warp or block do together waits for all of
them (emulator/emulator.h). Instructions of tensor cores are replaced by what they compute, copies
by plain ones. Those of TMA and wgmma still go on beside the threads (emulator/tma.h, hopper.h), and
a wait without end is an error. So the logic of a kernel is tried, and who waits for whom, not its
timing, its fences or its registers. Blocks run one after another. All of cuda/hopper is emulated
but the kernel for a chunk of queries. Random problems with borders, parts and masks are compared
with the oracle.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import hashlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import part_problems
from helpers.accuracy import check_backend
from helpers.part_problems import FAMILIES, Family, part_problem
from helpers.strategies import inputs

from cuneigh import _jit
from cuneigh._backends import fused, naive
from cuneigh._device import Device, of_capability
from cuneigh._gpu.arrays import Pointer
from cuneigh._gpu.program import Launch, Program, Record, _Clear
from cuneigh._gpu.records import start_words
from cuneigh._gpu.tensor_map import TensorMap
from cuneigh._problem import JvpResults, OfResults, Operands, Problem, Spec

EMULATOR = Path(__file__).parent / "emulator"
H100 = of_capability((9, 0))
OPERATIONS = ("forward", "backward", "jvp", "hvp", "qk", "qk_backward", "av", "av_backward")

REPLACED = {
    "cuneigh/types.cuh": [
        (r'asm\("ex2[^;]*;[^;]*;', "y = exp2f(x);"),
        (r'asm\("rcp[^;]*;[^;]*;', "y = 1 / x;"),
        (r'asm\("lg2[^;]*;[^;]*;', "y = log2f(x);"),
    ],
    "fused/thread.cuh": [(r'asm volatile\("" : "\+r"\(thread\)\);', "")],
    "fused/async.cuh": [
        (
            r"const uint4 bytes = .*?#endif",
            "__builtin_memcpy((void*)(size_t)target, source, 16);\n#endif",
        )
    ],
    "fused/small/units.cuh": [
        (
            r'asm\("mad.wide.u32.*?\n.*?\n.*?\)\)\)\);',
            "address += (unsigned long long)units * (kUnit<Element> * int(sizeof(Element)));",
        )
    ],
    "cuneigh/barrier.cuh": [
        (
            r"// Whether this lane is the one that the warp elects.*(?=\n}  // namespace)",
            "using emulator::Barrier, emulator::fence_barrier_init;\n",
        ),
    ],
    "cuneigh/tma.cuh": [
        (
            r"// What cuTensorMapEncodeTiled writes.*(?=\n}  // namespace)",
            "using emulator::TensorMap, emulator::prefetch_map;\n"
            "using emulator::load_box, emulator::fence_shared;\n",
        ),
    ],
    "cuneigh/cluster.cuh": [
        (r"__cluster_dims__\(size, 1, 1\)", ""),
        (
            r"// What all threads of the cluster.*(?=\n}  // namespace)",
            "using emulator::cluster_sync, emulator::put;\n",
        ),
    ],
    "fused/split/forward.cu": [(r'asm volatile\("bar.sync[^;]*;[^;]*;', "__syncthreads();")],
    "fused/mma.cuh": [
        (r"// Four 8x8 matrices.*(?=// Two numbers rounded)", "using namespace emulator;\n\n"),
    ],
    # Acquire and release, between blocks
    "hopper/barrier.cuh": [
        (
            r"// Counters in global memory.*(?=// Where a ring of)",
            "using emulator::load_acquire, emulator::add_release;\n\n",
        ),
    ],
    # Bulk copies and additions
    "hopper/tma.cuh": [
        (r"// Copies what lies at.*(?=\n}  // namespace)", "using namespace emulator;\n"),
    ],
    # wgmma and its fences, registers that change hands, pairs of elements: all but descriptors
    "hopper/wgmma.cuh": [
        (
            r"__device__ inline void fence_registers.*(?=// Where an operand is)",
            "using namespace emulator;\n\n",
        ),
        (r"// One step of a product.*(?=\n}  // namespace)", ""),
    ],
    # stmatrix
    "hopper/products.cuh": [
        (
            r'asm volatile\("stmatrix.*?"memory"\);',
            "emulator::stmatrix_x4<true>(address + step * 16 * kLineBytes, operand[step]);",
        )
    ],
    # A store under a condition, stmatrix
    "hopper/results.cuh": [
        (
            r'asm volatile\(\s*"{ .reg .pred p.*?"memory"\);',
            "if (exists) memcpy(target, word, 16);",
        ),
        (r'asm volatile\("stmatrix.*?"memory"\);', "emulator::stmatrix_x4<false>(address, word);"),
    ],
    # The thread, read anew each time
    "hopper/mask.cuh": [
        (r'asm volatile\("mov.u32 %0, %%tid.x;[^;]*;', "thread = threadIdx.x;"),
    ],
}
"""Patterns in sources, and what the host compiles in their place."""


def sources(folder: Path) -> None:
    """Write the sources of all kernels as the host compiler takes them."""
    for name, text in _jit.packaged().texts.items():
        text = re.sub(r"extern __shared__.*?(\w+)\[\];", r"char* \1 = emulator::state.smem;", text)
        text = text.replace("__shared__ ", "static ")
        for pattern, replacement in REPLACED.get(name, []):
            text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
            assert count == 1, (name, pattern)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def compiler() -> str | None:
    return shutil.which("g++")


def compile_(*arguments: str) -> None:
    options = "-std=c++17 -Og -w -Wno-psabi -fpermissive"
    options += " -fPIC -fno-gnu-unique -fvisibility-inlines-hidden"
    subprocess.run([str(compiler()), *options.split(), *arguments, f"-I{EMULATOR}"], check=True)


@cache
def precompiled() -> Path:
    """A folder with the compiled header, which units then take half a second less to include."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    header = "emulator.h"
    compile_("-x", "c++-header", str(EMULATOR / header), "-o", str(folder / f"{header}.gch"))
    return folder


ROLES = {
    "TMA": (-1, 0),
    "loaders": (0, 64),
    "adders": (32, 64),
    "makers of masks": (64, 128),
    "first consumers": (128, 256),
    "second consumers": (256, 384),
    "consumers": (128, 1024),
}
"""Threads of kernels in cuda/hopper; TMA is a thread of its own (emulator/fibers.h)."""


class Emulator:
    """Kernels built in a folder, and run with what they need of a device."""

    def __init__(self, folder: Path, device: Device = H100) -> None:
        self.folder, self.device = folder, device
        self.slow: str | None = None
        """One of `ROLES` that goes on only when no other can."""
        self.in_turns = False
        """Whether blocks go on in turns, where there are few: else one after another."""
        sources(folder / "cuda")
        precompiled()
        self.built = lru_cache(maxsize=None)(self._built)

    def _built(self, kernel: _jit.Kernel) -> Any:
        name = hashlib.sha256(kernel.unit.encode()).hexdigest()[:20]
        unit, library = self.folder / f"{name}.cpp", self.folder / f"{name}.so"
        cluster = re.search(r"int kCluster = (\d+);", kernel.plan)
        blocks = cluster[1] if cluster else 1
        unit.write_text(
            f'#include "emulator.h"\n{kernel.unit}\n'
            'extern "C" const char* run(unsigned x, unsigned y, int threads, void** parameters,\n'
            "                           int slow_begin, int slow_end, bool in_turns) {\n"
            f"  return emulator::launch(&{kernel.instance}, x, y, threads, parameters, {blocks},\n"
            "                          slow_begin, slow_end, in_turns);\n}\n"
        )
        folders = (precompiled(), self.folder / "cuda")
        compile_(*(f"-I{each}" for each in folders), "-shared", str(unit), "-o", str(library))
        run = ctypes.CDLL(str(library)).run
        run.restype = ctypes.c_char_p
        return run

    def run(self, program: Program, addresses: Sequence[int]) -> None:
        """`Program.run` on memory of the host."""

        def at(pointer: Pointer) -> int:
            return addresses[pointer.slot] + pointer.offset

        with ThreadPoolExecutor() as pool:
            list(pool.map(self.built, program.kernels))
        for each in program._recorded:
            if isinstance(each, _Clear):
                target = each.target
                ctypes.memset(at(target.pointer), 0, target.size * target.itemsize)
                continue
            assert isinstance(each, Launch), "arrays are contiguous, so that nothing is copied"
            kept = [ctypes.create_string_buffer(packed(p, at)) for p in each.parameters]
            parameters = (ctypes.c_void_p * len(kept))(*map(ctypes.addressof, kept))
            run = self.built(each.kernel)
            slow = ROLES.get(self.slow, (0, 0))
            error = run(*each.grid, each.threads, parameters, *slow, self.in_turns)
            assert error is None, self._said(each.kernel, error.decode())

    def _said(self, kernel: _jit.Kernel, error: str) -> str:
        error = error.replace(f"{self.folder / 'cuda'}/", "")
        return f"{kernel.name}, {self.slow or 'nobody'} slow: {error}"

    def adapt(self, backend: ModuleType) -> Any:
        """`backend` as one that fills NumPy arrays at once."""
        functions = {name: self._at_once(getattr(backend, name, None)) for name in OPERATIONS}
        return SimpleNamespace(NAME=backend.NAME, **functions)

    def _at_once(self, function: Any) -> Any:
        def call(problem: Problem, *arguments: Any) -> None:
            *arguments, workspace = arguments
            program, given = Program(self.device), []

            def described(argument: Any) -> Any:
                if isinstance(argument, (Operands, JvpResults, OfResults)):
                    return type(argument)(*map(described, argument))
                if argument is None:
                    return None
                given.append(argument)
                return program.array(Spec(argument.shape, argument.dtype.name))

            function(problem.anywhere, *map(described, arguments), program)
            given += [workspace(*spec) for spec in program.workspace]
            self.run(program, [*(a.ctypes.data for a in given), *start_words(problem)])

        return call

    def check(self, backend: ModuleType, problem: Problem, seed: int) -> None:
        """Compare the results of a problem with the oracle."""
        check_backend(backend, problem, inputs(problem, np.random.default_rng(seed)), **self.native)

    @property
    def native(self) -> dict[str, Any]:
        """The keyword arguments of `run_backend`."""
        return {"to_native": aligned, "allocate": allocate, "adapt": self.adapt}


def packed(parameter: Any, at: Any) -> bytes:
    """A parameter of a launch as the kernel takes it."""
    words: dict[int, int] = {}
    if isinstance(parameter, TensorMap):
        return tensor_map(parameter, at(parameter.pointer))
    if isinstance(parameter, Record):
        words = {place: at(pointer) for place, pointer in parameter.words}
        parameter = parameter.values
    if not isinstance(parameter, np.ndarray):
        numbers = [at(word) if isinstance(word, Pointer) else word for word in parameter]
        return np.array(numbers, np.int64).tobytes()
    data = bytearray(parameter.tobytes() + bytes(-parameter.nbytes % 8))
    for place, word in words.items():
        data[8 * place : 8 * place + 8] = word.to_bytes(8, "little", signed=True)
    return bytes(data)


def tensor_map(described: TensorMap, address: int) -> bytes:
    """`TensorMap` of emulator/emulator.h."""
    numbers = (*described.strides, *described.dims, *described.box)
    steps = described.element_strides
    return struct.pack("Q4Q5I5H6B52x", address, *numbers, *steps, described.swizzle)


def allocate(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array at a multiple of 16, every byte of which is 0xff."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + 16, 0xFF, np.uint8)
    first = -memory.ctypes.data % 16
    return memory[first : first + size].view(dtype).reshape(shape)


def aligned(array: np.ndarray) -> np.ndarray:
    copy = allocate(array.shape, array.dtype)
    copy[...] = array
    return copy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("naive", "fused"), default="fused")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--longest", type=int, default=9, help="tokens along an axis")
    options = parser.parse_args()
    backend = {"naive": naive, "fused": fused}[options.backend]
    part_problems.LONGEST.update(dict.fromkeys((1, 2, 3), options.longest))
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        emulator = Emulator(Path(folder))
        families = [*FAMILIES, Family("float32", 2, 16, 16)]
        kinds = [(f, o, m) for f in families for o in OPERATIONS for m in (False, True)]
        for family, operation, has_mask in kinds:
            for seed in range(options.seeds):
                rng = np.random.default_rng(seed)
                problem = part_problem(rng, family, operation, has_mask)
                if backend.unsupported(problem, H100) is None:
                    try:
                        emulator.check(backend, problem, seed)
                    except AssertionError as error:
                        wrong += 1
                        print(f"WRONG {problem}: {error}", flush=True)
            print(family, operation, "masked" if has_mask else "", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
