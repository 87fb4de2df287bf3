"""CUDA kernels, compiled when they are first needed: source and plan -> cubin -> loaded kernel.

`compile` needs no GPU, `load` needs no compiler when the cache holds the kernel, and `precompile`
fills a cache ahead of time. One file for each step:

- `_sources`: the `.cu` and `.cuh` texts, their digest, and the translation unit of a kernel;
- `_compiler`: NVRTC, and nothing else of CUDA;
- `_cache`: one directory per compiled kernel, shared by any number of processes;
- `_build`: `compile` and `precompile`, which join these three;
- `_threads`: those that compile, side by side;
- `_load`: the kernels of this process, ready to launch, those it lacks compiled meanwhile;
- `_progress`: what a user is told meanwhile.

Environment: `CUNEIGH_CACHE_DIR` moves the cache, `CUNEIGH_TRUST_CACHE_DIR=1` shares it,
`CUNEIGH_QUIET=1` says nothing of compiling, `CUNEIGH_LINE_INFO=1` has kernels name their lines.
"""

from cuneigh._jit._build import compile, precompile
from cuneigh._jit._cache import Cache, Compiled, default_directory, distrusted, warn
from cuneigh._jit._compiler import CompilationError, Resources, unavailable
from cuneigh._jit._load import load, start
from cuneigh._jit._sources import Kernel, Sources, packaged, plan_source

__all__ = [
    "Cache",
    "CompilationError",
    "Compiled",
    "Kernel",
    "Resources",
    "Sources",
    "compile",
    "default_directory",
    "distrusted",
    "load",
    "packaged",
    "plan_source",
    "precompile",
    "start",
    "unavailable",
    "warn",
]
