"""The CPU backend's loops that Numba compiles, and what becomes of them where it is missing.

Compiling takes seconds, and Numba is no part of what tests install: what needs it is skipped
without it. Heads have few sizes here, since loops are compiled for every one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tracemalloc
import types
from dataclasses import replace

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.brute_force import seers, visible_keys
from helpers.strategies import Inputs, generators, inputs, layouts, problems
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_cpu import assert_same_bits, attention, contiguous_copy

import cuneigh
from cuneigh._backends import cpu
from cuneigh._backends.cpu import compiled
from cuneigh._backends.cpu.compiled import choice, cuts, slabs, toolchain
from cuneigh._problem import Operands
from cuneigh._window import Promise
from cuneigh.cli import main

DIMS = 5, 19
"""Of a query and of a value: less than a vector, and more than one but not whole ones."""

needs_numba = pytest.mark.skipif(
    toolchain.missing() is not None, reason=f"{toolchain.missing()}: nothing can be compiled"
)


def forward(problem, operands, output, lse, allocate):
    assert compiled.forward(problem, operands, output, lse)


def backward(*arguments):
    assert compiled.backward(*arguments)


LOOPS = types.SimpleNamespace(NAME="compiled loops", forward=forward, backward=backward)
"""The loops as a backend, whether or not they are faster."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Nothing is written to the user's cache, and nothing said of compiling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUNEIGH_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("CUNEIGH_QUIET", "1")
        yield


@st.composite
def loop_problems(draw, **arguments):
    """Problems that loops can compute, with heads of `DIMS`."""
    drawn = draw(problems(operations=("forward", "backward"), budget=100_000, **arguments))
    bare = {"rpb_dtype": None, "additional": None, "has_key_mask": False}
    problem = replace(drawn, head_dim=DIMS[0], value_dim=DIMS[1], **bare)
    assume(not problem.is_empty)
    assume(choice.unsupported(problem) is None)
    return problem


@pytest.fixture(params=["whole", "rows", "threads"])
def cut(request, monkeypatch):
    """Problems are usually one slab; here they may be cut into many."""
    if request.param != "whole":
        monkeypatch.setattr(slabs, "PAIRS", 1500)
    monkeypatch.setenv("CUNEIGH_NUM_THREADS", "3" if request.param == "threads" else "1")
    forget_slabs()
    yield
    forget_slabs()


def forget_slabs():
    slabs.slab_shape.cache_clear()
    slabs.slabs_of_entry.cache_clear()


one_cut = settings(suppress_health_check=["function_scoped_fixture"], deadline=None)


@needs_numba
@one_cut
@given(data=st.data(), rng=generators(), layout=layouts())
def test_loops_agree_with_the_oracle(data, rng, layout, cut):
    problem = data.draw(loop_problems(ordinary=data.draw(st.booleans())))
    check_backend(LOOPS, problem, inputs(problem, rng, layout))


@needs_numba
@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize(
    ("tokens", "kernel_size", "window"),
    [
        ((300,), 33, {}),
        ((600,), 129, {"is_causal": True}),  # in tiles of two vectors
        ((40, 44), (8, 5), {"dilation": (2, 8), "is_causal": (False, True)}),
        ((9, 12, 14), (3, 5, 4), {"stride": (1, 2, 4)}),
        ((12, 13, 6), 5, {}),
    ],
)
def test_problems_of_many_slabs_agree_with_the_oracle(tokens, kernel_size, window, operation, cut):
    problem = attention(tokens, DIMS, "float32", kernel_size, operation, **window)
    check_backend(LOOPS, problem, inputs(problem, np.random.default_rng(0)))


@needs_numba
@one_cut
@given(problem=loop_problems(), rng=generators(), layout=layouts())
def test_neither_layout_nor_threads_nor_other_entries_change_a_bit(problem, rng, layout):
    strided = inputs(problem, rng, layout)
    expected = run_backend(LOOPS, problem, strided)
    contiguous = Inputs(
        Operands(*map(contiguous_copy, strided.operands)),
        *map(contiguous_copy, strided[1:5]),
        wants_lse=strided.wants_lse,
    )
    assert_same_bits(run_backend(LOOPS, problem, contiguous), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUNEIGH_NUM_THREADS", "4")
        assert_same_bits(run_backend(LOOPS, problem, contiguous), expected)
    first = Inputs(
        Operands(*(None if array is None else array[:1] for array in contiguous.operands)),
        *(None if array is None else array[:1] for array in contiguous[1:5]),
        wants_lse=strided.wants_lse,
    )
    got = run_backend(LOOPS, replace(problem, batch=1), first)
    assert_same_bits(got, {name: array[:1] for name, array in expected.items()})


@needs_numba
@one_cut
@given(
    data=st.data(),
    rng=generators(),
    poison=st.sampled_from([np.nan, np.inf, -np.inf, 1e3, 1e34]),
    what=st.sampled_from(["key", "value"]),
)
def test_a_token_reaches_only_the_queries_that_see_it(data, rng, poison, what):
    problem = data.draw(loop_problems(dtypes=("float32", "float64"), cross=False))
    plain = inputs(problem, rng)._replace(wants_lse=True)
    token = tuple(data.draw(st.integers(0, length - 1)) for length in problem.tokens)
    changed = getattr(plain.operands, what).copy()
    changed[(slice(None), *token)] = poison
    touched = plain._replace(operands=plain.operands._replace(**{what: changed}))
    before, after = (run_backend(LOOPS, problem, each) for each in (plain, touched))
    blind = ~seers(problem, token)
    for name in {"output", "lse", "grad query"} & before.keys():
        assert_same_bits({name: after[name][:, blind]}, {name: before[name][:, blind]})


@needs_numba
@one_cut
@given(
    problem=loop_problems(dtypes=("float16", "bfloat16")),
    rng=generators(),
    layout=layouts(),
    converts=st.booleans(),
)
def test_half_precision_is_what_float32_gives_rounded(problem, rng, layout, converts):
    problem = replace(problem, operation="forward")
    given_inputs = inputs(problem, rng, layout)

    def widened(array):
        return None if array is None else array.astype("float32")

    wide = Inputs(
        Operands(*map(widened, given_inputs.operands)),
        *map(widened, given_inputs[1:5]),
        wants_lse=given_inputs.wants_lse,
    )
    with pytest.MonkeyPatch.context() as patch:
        if not converts:  # as processors do that have no instructions for it
            patch.setattr(toolchain, "converts", lambda dtype: False)
        got = run_backend(LOOPS, problem, given_inputs)
    expected = run_backend(LOOPS, replace(problem, dtype="float32"), wide)
    assert_same_bits(got, {name: each.astype(got[name].dtype) for name, each in expected.items()})


@needs_numba
@pytest.mark.parametrize("magnitude", [1e4, -1e4, 90.0])
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_large_logits_and_large_values(magnitude, operation):
    problem = attention((40,), DIMS, "float32", 9, operation)
    rng = np.random.default_rng(0)
    drawn = inputs(problem, rng)
    query = np.full(problem.specs.query.shape, np.sqrt(abs(magnitude)) / 2, "float32")
    key = np.copysign(query * 4 * np.abs(rng.normal(size=query.shape)), magnitude)
    query[0, ::2] /= 1e3  # among rows of large logits, rows that need no maximum
    value = drawn.operands.value * np.float32(1e18)
    changed = drawn.operands._replace(query=query, key=key.astype("float32"), value=value)
    check_backend(LOOPS, problem, drawn._replace(operands=changed))


@needs_numba
def test_workspace_is_bounded(monkeypatch):
    monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", "16MiB")
    monkeypatch.setenv("CUNEIGH_NUM_THREADS", "2")
    query = np.zeros((1, 400, 400, 2, DIMS[0]), "float32")
    value = np.zeros((1, 400, 400, 2, DIMS[1]), "float32")
    problem = attention((400, 400), DIMS, kernel_size=3)
    output = np.empty_like(value)
    forget_slabs()
    tracemalloc.start()
    assert compiled.forward(problem, Operands(query, query, value), output, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    forget_slabs()
    assert peak <= 16 << 20


# How axes are cut into tiles


@given(data=st.data(), most=st.integers(1, 20))
def test_tiles_hold_every_query_once_and_the_keys_that_it_sees(data, most):
    drawn = data.draw(problems(operations=("forward",)))
    axis = data.draw(st.sampled_from(drawn.axes))
    assume(Promise.INSIDE in axis.promises)
    cut = cuts.cut(axis, most)
    assert cut.keys.counts.sum() <= cuts.keys_of(axis, most)
    assert sorted(cut.order) == list(range(axis.key_length))
    seen_by = [sorted(visible_keys(axis, token)) for token in range(axis.length)]
    found = []
    for run, count in enumerate(cut.queries.counts):
        assert 1 <= count <= most
        block = cut.order[cut.keys.first[run] :][: cut.keys.counts[run]]
        for lane in range(most):
            token, begin, length = (each[run, lane] for each in cut.queries[:3])
            assert list(block[begin : begin + length]) == seen_by[token]
            if lane < count:
                found.append(token)
            else:
                assert token == cut.queries.tokens[run, 0]
    assert sorted(found) == list(range(axis.length))


@pytest.mark.parametrize(
    ("tokens", "kernel_size", "window", "shape"),
    [
        ((4096,), 129, {}, (16,)),
        ((64, 64), 7, {}, (4, 4)),
        ((64, 3), 3, {}, (5, 3)),
        ((64, 64), (1, 33), {}, (1, 16)),
        ((64, 64), 7, {"dilation": (1, 8)}, (2, 8)),
        ((32, 32, 32), 3, {}, (2, 2, 4)),
    ],
)
def test_tiles_have_the_shape_whose_queries_share_most(tokens, kernel_size, window, shape):
    axes = attention(tokens, DIMS, kernel_size=kernel_size, **window).axes
    assert cuts.tile_shape(axes, 16) == shape


# When they are taken


@needs_numba
def test_what_is_worth_compiling_for_takes_loops():
    small = attention((16, 28, 28), (32, 32), kernel_size=3, heads=4)
    assert compiled.is_faster(small)
    assert compiled.is_faster(replace(small, operation="backward"))
    assert compiled.is_faster(attention((4096,), (64, 64), kernel_size=1025, heads=4))
    tiny = attention((8, 9), (32, 32))  # not worth compiling for, however many entries it has
    assert not any(compiled.is_faster(replace(tiny, batch=batch)) for batch in (1, 7, 10_000))
    assert compiled.is_faster(replace(small, batch=7))


@needs_numba
def test_a_dry_run_says_that_loops_are_taken(capsys):
    problem = ["-i", "16", "28", "28", "-n", "4", "-d", "32", "-w", "3"]
    assert main(["profile", *problem, "--dry-run", "--backward"]) == 0
    told = f"cpu: forward: loops that numba {toolchain.version()} compiles, tiles of "
    assert told in capsys.readouterr().out
    assert "in loops that numba" in cpu.about()


def test_a_dry_run_says_why_loops_are_not_taken(monkeypatch, capsys):
    monkeypatch.setattr(toolchain, "version", lambda: None)
    assert main(["profile", "-i", "4096", "-w", "9", "--dry-run"]) == 0
    reason = "matrix products, not compiled loops: numba is not installed"
    assert f"cpu: forward: {reason}" in capsys.readouterr().out
    assert reason in cpu.about()


@needs_numba
def test_compiled_loops_are_kept_for_the_next_process(tmp_path):
    code = """
import numpy, cuneigh
x = numpy.ones((1, 8, 32, 32, 2, 8), "float32")
print(round(float(cuneigh.na3d(x, x, x, 3).mean()), 3), "numba" in __import__("sys").modules)
"""
    variables = {"CUNEIGH_CACHE_DIR": str(tmp_path), "CUNEIGH_QUIET": "0"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | variables | more,
        )
        for more in ({}, {}, {"NUMBA_DISABLE_JIT": "1"})
    ]
    assert [run.stdout for run in runs] == ["1.0 True\n", "1.0 True\n", "1.0 False\n"]
    told = [run.stderr for run in runs]
    assert told[0].count("cuneigh: compiling") == 2
    assert str(tmp_path) in told[0]
    assert told[1:] == ["", ""]


OF_SIZES = """
import sys, numpy, cuneigh
for dim in map(int, sys.argv[1:]):
    x = numpy.random.default_rng(dim).standard_normal((1, 8, 32, 32, 2, dim), dtype="float32")
    part = x[:, :6, :6, :6]  # so small that products serve
    got, wanted = (cuneigh.na3d(each, each, each, 3)[:, :5, :5, :5] for each in (x, part))
    assert numpy.abs(got - wanted).max() < 1e-4, dim
"""


@needs_numba
def test_what_other_processes_have_compiled_is_told_apart_and_mended(tmp_path):
    """Numba numbers the functions of every process anew."""

    def run(*dims):
        done = subprocess.run(
            [sys.executable, "-c", OF_SIZES, *dims],
            capture_output=True,
            text=True,
            env=os.environ | {"CUNEIGH_CACHE_DIR": str(tmp_path), "CUNEIGH_QUIET": "0"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert run("8").count("cuneigh: compiling") == run("16").count("cuneigh: compiling") == 2
    assert run("16", "8") == ""
    for kept in (tmp_path / "numba").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    assert run("8").count("\n") == 2
    assert run("8") == ""


@needs_numba
def test_a_fork_while_another_thread_compiles_leaves_the_child_products():
    problem = attention((16, 28, 28), (32, 32), kernel_size=3, heads=4)
    entered, done = threading.Event(), threading.Event()

    def hold():
        with toolchain._lock:
            entered.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(30)
    child = os.fork()
    if child == 0:  # pragma: no cover
        os._exit(0 if "forked" in (choice.unsupported(problem) or "") else 1)
    done.set()
    holder.join()
    assert os.waitpid(child, 0)[1] == 0
    assert choice.unsupported(problem) is None


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "numba is not installed"), ("0.60.1", "numba 0.60.1 is too old: 0.61 or later")],
)
def test_without_numba_products_serve(version, reason, monkeypatch):
    monkeypatch.setattr(toolchain, "version", lambda: version)
    problem = attention((16, 28, 28), (32, 32), kernel_size=3, heads=4)
    assert (choice.unsupported(problem) or "").startswith(reason)
    assert not compiled.is_faster(problem)
    assert cpu.unsupported(problem, cuneigh._device.CPU) is None


def test_a_numba_that_does_not_work_is_told_once_and_products_serve(monkeypatch):
    def broken(*_):
        raise ImportError("Numba needs an older NumPy")

    monkeypatch.setattr(toolchain, "version", lambda: "0.99")
    monkeypatch.setattr(toolchain, "_failure", None)
    monkeypatch.setattr(toolchain, "_compiled", broken)
    monkeypatch.setattr(toolchain, "vector_size", lambda bits: 512 // bits)
    query = np.ones((1, 16, 32, 32, 2, 4), "float32")
    with pytest.warns(RuntimeWarning, match=r"without it: numba 0.99 .* needs an older NumPy"):
        output = cuneigh.na3d(query, query, query, 3)
    np.testing.assert_allclose(output, 1, rtol=1e-6)
    np.testing.assert_array_equal(cuneigh.na3d(query, query, query, 3), output)
    assert "needs an older NumPy" in (toolchain.missing() or "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"operation": "jvp"}, "jvp is left"),
        ({"additional": 2}, "additional keys"),
        ({"has_key_mask": True}, "key masks"),
        ({"rpb_dtype": "float32"}, "rpb"),
        ({"head_dim": 129}, "heads of more than 128"),
    ],
)
def test_what_loops_leave_to_products(change, reason):
    problem = attention((16, 28, 28), (32, 32), kernel_size=3)
    assert reason in (choice.unsupported(replace(problem, **change)) or "")
