"""How the tests run: hypothesis profiles, GPU tests where there is a GPU, the count of examples,
and kernels that are compiled once.

A plain run draws the same examples every time, so that a failure is the change's and not the day's.
``--examples N`` draws N fresh ones in every property test. The summary states how many examples
passed, since the number of tests says little about property tests.
"""

from __future__ import annotations

import functools
import gc
import os
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

from cuneigh import _jit
from cuneigh._jit import _build, _compiler

# Building problems and arrays is slow beside hypothesis's own examples, on busy machines above all.
slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("plain", max_examples=50, derandomize=True, print_blob=True, **slow)

examples: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--examples", type=int, help="draw this many fresh examples a property test")


def pytest_configure(config: pytest.Config) -> None:
    count = config.getoption("--examples")
    if count is None:
        settings.load_profile("plain")
    else:
        settings.register_profile("fresh", max_examples=count, print_blob=True, **slow)
        settings.load_profile("fresh")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    properties = {item.function for item in items if is_hypothesis_test(item.function)}
    for function in properties:
        function.hypothesis.inner_test = count_calls(function.hypothesis.inner_test)
    # Worksteal ends well when what is left for the end is short.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    reason = no_gpu_reason() if any(item.get_closest_marker("gpu") for item in items) else None
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"no CUDA device: {reason}"))


def pytest_collection_finish() -> None:
    """Collections of garbage, which some tests ask for, leave out what imports have made."""
    gc.collect()
    gc.freeze()


def count_calls(test):
    """`test` with every example that passes counted."""

    @functools.wraps(test)
    def counting(*args, **kwargs):
        result = test(*args, **kwargs)
        examples["passed"] += 1
        return result

    return counting


def no_gpu_reason() -> str | None:
    """Why GPU tests cannot run; None when they can."""
    try:
        import cupy
    except ImportError as error:
        return str(error)
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return str(error)
    return None if count else "the driver lists none"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"hypothesis: {examples['passed']} examples passed")


# With pytest-xdist the tests run in worker processes, which hand their counts to the main one.


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["examples passed"] = examples["passed"]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    examples["passed"] += getattr(node, "workeroutput", {}).get("examples passed", 0)


@pytest.fixture(scope="session", autouse=True)
def each_kernel_is_compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """NVRTC makes a kernel of the package once for all tests, and for all workers of pytest-xdist.

    What it made is kept on disk and returned to whoever compiles the same kernel again. Whatever
    lies above the compiler, such as the cache of compiled kernels, runs as it always does.
    """
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # which the workers share
    kept = _jit.Cache(directory / "kernels")
    build, packaged = _compiler.build, _jit.packaged()

    def build_once(kernel: _jit.Kernel, arch: str, sources: _jit.Sources) -> _compiler.Built:
        if sources is not packaged:
            return build(kernel, arch, sources)
        key, version = _build.key_of(kernel, arch, sources), _compiler.version()
        compiled = kept.find(key, version) if version else None
        if compiled is None:
            built = build(kernel, arch, sources)  # an error if NVRTC is missing
            compiled = kept.store(key, str(version), kernel.unit, built)
        return _compiler.Built(compiled.cubin.read_bytes(), compiled.symbol, compiled.resources)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compiler, "build", build_once)
        yield
