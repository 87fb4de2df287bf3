"""Every kernel that ships: it compiles for all architectures, and keeps all it has in registers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from helpers.toy_kernel import needs_nvrtc

from cuneigh import _jit
from cuneigh._backends import BACKENDS, Backend, gemm, naive
from cuneigh._device import Device, of_capability
from cuneigh._problem import Operation, Problem
from cuneigh._window import Axis

# All kernels for all architectures, dtypes, numbers of axes and dimensions would take an hour.
# These have each architecture, and with some of them whatever else a kernel depends on:
#
# - Their sources ask for no architecture, so that what differs is what the CUDA headers make of
#   half types before sm_80 and sm_90, and the assembler. For sm_89 it makes what it makes for
#   sm_86: `test_code_for_sm_89_is_that_for_sm_86`.
# - Each dtype is compiled for sm_90 and for another architecture at least. float16 and bfloat16
#   take the same registers, mostly the most of all, and differ in conversions alone, of which the
#   headers have others for bfloat16 before sm_80.
# - What depends on the number of axes does not depend on the dtype. Three hold the most state.
# - 63 and 20 are loaded by single elements; 600 are more than the lanes of a warp hold.
COMPILED = [
    # architecture, dtype, axes, head_dim, value_dim, dtype of the bias, additional keys
    ("sm_75", "bfloat16", 3, 64, 64, "bfloat16", 1),
    ("sm_80", "float16", 3, 128, 128, "float32", 1),
    ("sm_86", "float32", 2, 32, 32, "float32", 1),
    ("sm_90", "float16", 1, 64, 64, "float16", 1),
    ("sm_90", "bfloat16", 3, 63, 20, None, None),
    ("sm_90", "float32", 3, 64, 64, "float32", 1),
    ("sm_90", "float64", 3, 600, 3, "float64", None),
    ("sm_100", "bfloat16", 3, 64, 64, "bfloat16", 1),
    ("sm_120", "float64", 3, 64, 64, "float64", 1),
]

FIRST_ORDER = tuple(each for each in get_args(Operation) if each != "hvp")


def device_of(arch: str) -> Device:
    return of_capability(divmod(int(arch.removeprefix("sm_")), 10))


def problems(
    dtype: str,
    ranks: Iterable[int],
    head_dim: int = 64,
    value_dim: int = 64,
    rpb_dtype: str | None = None,
    additional: int | None = None,
    length: int = 1,
    operations: Iterable[Operation] = FIRST_ORDER,
) -> Iterator[Problem]:
    """Every operation, but for those of second order unless they are among `operations`."""
    for rank, operation in itertools.product(ranks, operations):
        yield Problem(
            operation=operation,
            dtype=dtype,
            batch=1,
            heads=1,
            kv_heads=1,
            head_dim=head_dim,
            value_dim=value_dim,
            axes=(Axis(length, length, 1, 1, 1, False),) * rank,
            scale=1.0,
            additional=additional,
            rpb_dtype=rpb_dtype,
        )


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def assert_no_spills(
    of: Iterator[Problem], arch: str, cache: Path, backend: Backend = naive
) -> None:
    kernels = [kernel for problem in of for kernel in backend.kernels(problem, device_of(arch))]
    assert kernels
    for (kernel, _), compiled in _jit.precompile(kernels, [arch], cache).items():
        resources = compiled.resources
        assert resources.registers > 0, "the log of NVRTC was not understood"
        spilled = resources.spill_stores + resources.spill_loads
        assert not resources.advice, f"{kernel.name} on {arch}: {resources.advice}"
        assert spilled == 0, f"{kernel.name} spills {spilled} bytes on {arch}:\n{kernel.plan}"


CLUSTERS = "cuneigh/cluster.cuh"


def test_no_source_asks_for_an_architecture() -> None:
    """But those of the backends that test for themselves what they compile, and their clusters."""
    for name, text in _jit.packaged().texts.items():
        if name.split("/")[0] in ("cuneigh", "sums", "naive", "gemm") and name != CLUSTERS:
            assert "__CUDA_ARCH" not in text, name
            assert f'"{CLUSTERS}"' not in text, name


@pytest.mark.long
@needs_nvrtc
@pytest.mark.parametrize(
    ("arch", "dtype", "rank", "head_dim", "value_dim", "rpb_dtype", "additional"), COMPILED
)
def test_kernels_compile(
    arch: str,
    dtype: str,
    rank: int,
    head_dim: int,
    value_dim: int,
    rpb_dtype: str | None,
    additional: int | None,
    module_cache: Path,
) -> None:
    of = problems(dtype, [rank], head_dim, value_dim, rpb_dtype, additional)
    assert_no_spills(of, arch, module_cache)


@needs_nvrtc
def test_kernels_of_second_order_compile(module_cache: Path) -> None:
    """Which hold twice as many vectors as others: those with the most registers."""
    of = problems("bfloat16", [3], rpb_dtype="bfloat16", additional=1, operations=["hvp"])
    assert_no_spills(of, "sm_75", module_cache)


# The kernels around the batched products hold little; the longest rows of logits are their most. In
# float16 and bfloat16 a row is held in the same registers, once compiled for all of them.


@pytest.mark.long
@needs_nvrtc
@pytest.mark.parametrize(
    ("dtype", "arch", "additional"),
    [
        ("float16", "sm_90", 3000),
        ("bfloat16", "sm_75", 1),
        ("float32", "sm_120", 3000),
        ("float64", "sm_90", 3000),
    ],
)
def test_kernels_around_products_compile(
    dtype: str, arch: str, additional: int, module_cache: Path
) -> None:
    of = problems(dtype, [3], rpb_dtype=dtype, additional=additional)
    assert_no_spills(of, arch, module_cache, gemm)


@needs_nvrtc
def test_kernels_around_products_in_place_compile(module_cache: Path) -> None:
    of = problems("bfloat16", [2], length=32)
    assert_no_spills(of, "sm_90", module_cache, gemm)


@needs_nvrtc
@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
def test_all_headers_can_be_included_together(order: int, tmp_path: Path) -> None:
    """No two of them define the same name, and each includes what it needs."""
    texts = _jit.packaged().texts
    headers = [name for name in texts if name.endswith(".cuh")][::order]
    unit = "".join(f'#include "{name}"\n' for name in headers)
    unit += "namespace cuneigh { template <typename Plan> __global__ void all() {} }\n"
    for name, text in {**texts, "all.cu": unit}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    cache = _jit.Cache(tmp_path / "cache")
    kernel, sources = _jit.Kernel("all", ""), _jit.Sources(tmp_path)
    assert _jit.compile(kernel, "sm_90a", cache=cache, sources=sources).resources.registers > 0


def test_every_source_is_compiled() -> None:
    """There is no `.cu` that no backend names."""
    every = get_args(Operation)
    full = [*problems("float16", [3], rpb_dtype="float16", additional=1, operations=every)]
    plain = [*problems("float16", [1], length=32), *problems("float16", [1], head_dim=128)]
    plain += problems("float16", [1], head_dim=256)
    plain += problems("float16", [1], head_dim=32, value_dim=32, operations=every)
    masked = [replace(problem, has_key_mask=True) for problem in plain]
    few_queries = Axis(64, 2111, 2048, 1, 1, True, "shift", 8192, 4096, 2049)
    few = [Problem("forward", "float16", 1, 4, 1, 64, 64, (few_queries,), 0.125)]
    kernels = {
        kernel.name
        for problem in full + plain + masked + few
        for backend in BACKENDS
        if backend.unsupported(problem, device_of("sm_90")) is None
        for kernel in backend.kernels(problem, device_of("sm_90"))
    }
    sources = {name.removesuffix(".cu") for name in _jit.packaged().texts if name.endswith(".cu")}
    assert kernels == sources
