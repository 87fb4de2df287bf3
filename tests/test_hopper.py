"""The Hopper backend, no GPU needed: what it refuses, when it is chosen, what its kernels take."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.accuracy import run_backend
from helpers.hopper import ALL_DIMS, H200, assert_agree, supported
from helpers.strategies import generators, inputs
from helpers.toy_kernel import needs_nvrtc
from hypothesis import given
from hypothesis import strategies as st

from cuneigh import _device, _jit
from cuneigh._backends import choose, cpu, fused, hopper, serving
from cuneigh._backends.hopper import launch
from cuneigh._backends.hopper.choice import cheapest, make_plan, passes
from cuneigh._backends.hopper.forms import forms_of
from cuneigh._backends.hopper.plan import WIDTHS, division, ways
from cuneigh._backends.hopper.tensor_maps import Folding
from cuneigh._gpu.arrays import Array, Pointer, contiguous
from cuneigh._gpu.passes import BACKWARD, DKV, DQ, FORWARD
from cuneigh._parameters import window_arguments
from cuneigh._problem import Operation, Problem, Spec
from cuneigh._validate import attention_problem
from cuneigh._window import Axis

H100 = replace(H200, name="NVIDIA H100")
B200 = replace(H200, name="NVIDIA B200", capability=(10, 0))


def long_windows(tokens=(4096,), kernel_size=1024, dim=128, batch=1, **changes) -> Problem:
    """A problem for which the backend is there."""
    query = Spec((batch, *tokens, 8, dim), "bfloat16")
    window = window_arguments("test", len(tokens), kernel_size, 1, 1, False)
    problem = attention_problem("test", "forward", query, query, query, window, None)
    return replace(problem, **changes)


def arrays_of(problem: Problem, **changes) -> dict[str, Array | None]:
    """The arrays of a contiguous call, but for those that `changes` names."""
    specs = {**problem.specs._asdict(), "result_output": problem.output, "result_lse": problem.lse}
    if problem.operation == "backward":
        specs["grad_output"] = problem.output
    if problem.operation == "jvp":
        specs |= {f"tangent_{name}": spec for name, spec in problem.specs._asdict().items()}
    arrays = {
        name: Array(Pointer(slot), *spec, contiguous(spec.shape), 0)
        for slot, (name, spec) in enumerate(specs.items())
        if spec is not None
    }
    return {**arrays, **{name: replace(arrays[name], **made) for name, made in changes.items()}}


# What it refuses


def dilated(dilation: int) -> Problem:
    axis = Axis(4096, 4096, 128, 1, dilation, False)
    return long_windows(axes=(axis,))


def cross(operation: Operation) -> Problem:
    return long_windows(operation=operation, axes=(Axis(4096, 2048, 2048, 1, 1, False),))


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (long_windows(), _device.CPU, "needs arrays on a CUDA device"),
        (long_windows(operation="qk"), H200, "its gradients and its tangents, not qk"),
        (long_windows(operation="backward", head_dim=264), H200, "up to 256 in steps of 8"),
        (long_windows(operation="jvp", dim=136), H200, "up to 128 in steps of 8, not head_dim=136"),
        (long_windows(operation="jvp", has_key_mask=True), H200, "no key mask for tangents"),
        (long_windows(), B200, "needs compute capability 9.0, but NVIDIA B200 has sm_100"),
        (long_windows(dtype="float32"), H200, "in float16, bfloat16, not in float32"),
        (long_windows(head_dim=264), H200, "up to 256 in steps of 8, not head_dim=264"),
        (long_windows(value_dim=68), H200, "up to 256 in steps of 8, not value_dim=68"),
        (long_windows(rpb_dtype="float32"), H200, "does not take rpb"),
        (dilated(9), H200, "takes dilations up to 8, not 9 on axis 0"),
        (long_windows((1,), 1, dim=8, batch=2**28), H200, "head vectors of queries or of keys"),
        (long_windows(scale=1e-30), H200, "takes scales from 1e-30 to 1e+30, not 1e-30"),
        (long_windows(scale=-1e31), H200, "takes scales from 1e-30 to 1e+30, not -1e+31"),
        (
            long_windows((16, 16, 16), 8, dim=72, batch=2),
            H200,
            "needs query with heads that are neighbors in memory and of a multiple of 16",
        ),
    ],
)
def test_what_is_refused(problem, device, reason):
    told = hopper.unsupported(problem, device)
    assert told is not None
    assert reason in told
    assert hopper.kernels(problem, device) == []


@pytest.mark.parametrize(
    "problem",
    [
        long_windows(),
        long_windows(operation="backward"),
        long_windows(operation="jvp", additional=3),
        long_windows(dim=256),
        cross("forward"),
        cross("backward"),
        dilated(8),
        long_windows(scale=0.0),
        long_windows(scale=-2.0),
        long_windows(additional=0, batch=2),
        long_windows((16, 16, 16), 8, dim=72),
        long_windows((16, 16, 16), 8, dim=80, batch=2),
    ],
)
def test_what_is_taken(problem):
    for device in (H200, H100):
        assert hopper.unsupported(problem, device) is None
        assert hopper.unsupported(problem, device, arrays_of(problem)) is None


def test_tangents_that_lie_in_memory_unlike_what_they_are_of_are_told():
    """Of three token axes: TMA has none left for the heads."""
    problem = long_windows((16, 16, 16), 8, dim=64, batch=2, operation="jvp")
    first = contiguous((2, 8, 16, 16, 16, 64))  # heads before tokens
    heads_first = {"strides": (first[0], *first[2:5], first[1], 1)}
    assert hopper.unsupported(problem, H200, arrays_of(problem)) is None
    both = arrays_of(problem, query=heads_first, tangent_query=heads_first)
    assert hopper.unsupported(problem, H200, both) is None
    one = arrays_of(problem, query=heads_first)
    assert "needs tangent_query with heads that lie" in str(hopper.unsupported(problem, H200, one))


def test_a_gradient_that_it_cannot_read_is_told_ahead():
    """The heads of a value, a single one, are neighbors; those of its query are too short."""
    problem = long_windows((16, 16, 16), 8, dim=72, batch=2, head_dim=64, kv_heads=1)
    assert hopper.unsupported(problem, H200) is None
    backward = replace(problem, operation="backward")
    assert "needs grad_output with heads" in str(hopper.unsupported(backward, H200))


@given(problem=supported(tuple(hopper.LONGEST), dims=ALL_DIMS))
def test_contiguous_arrays_are_told_as_none_at_all(problem):
    assert hopper.unsupported(problem, H200, arrays_of(problem)) is None


# When it is chosen

LONG, TOKENS = long_windows(), (8, 4096 * 8 * 128, 8 * 128, 128, 1)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("query", {"misalignment": 8}, "needs query at an address that is a multiple of 16"),
        ("result_output", {"misalignment": 8}, "needs output of the results at a multiple of 16"),
        (
            "key",
            {"strides": (4096 * 8 * 132, 8 * 132, 132, 1)},
            "needs strides of key that are positive multiples of 16 bytes, not 264 along axis 2",
        ),
        ("value", {"strides": (0, 8 * 128, 128, -1)}, "needs head vectors of value to be contig"),
    ],
)
def test_arrays_that_it_cannot_read_go_to_fused(name, change, reason, monkeypatch, capsys):
    monkeypatch.setenv("CUNEIGH_PRINT_PLANS", "1")
    # A problem that no other test asks for: reasons are printed once
    problem = replace(LONG, scale=0.25)
    assert choose(problem, H200, None) is hopper
    assert choose(problem, H200, None, arrays_of(problem)) is hopper
    assert capsys.readouterr().err == ""
    arrays = arrays_of(problem, **{name: change})
    for _ in range(2):
        assert choose(problem, H200, None, arrays) is fused
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cuneigh: hopper forward of bfloat16, 4096 tokens, kernel_size 1024")
    assert reason in line
    with pytest.raises(RuntimeError, match=re.escape(f"hopper: {reason}")):
        choose(problem, H200, "hopper", arrays)


def test_views_with_heads_first_are_served():
    """[batch, heads, tokens, dim] in memory, as most PyTorch code has it."""
    for problem in (LONG, long_windows((16, 16, 16), 8, batch=2)):
        tokens, dim = problem.specs.query.shape[1:-2], problem.head_dim
        strides = contiguous((problem.batch, 8, *tokens, dim))
        views = {"strides": (strides[0], *strides[2:-1], strides[1], 1)}
        arrays = arrays_of(problem, query=views, key=views, value=views)
        assert hopper.unsupported(problem, H200, arrays) is None


CASES = json.loads((Path(__file__).parents[1] / "bench" / "cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_long_windows_are_its_and_small_ones_are_not(case):
    """It has 128 keys for 192 queries at a time, of which a small window leaves most unseen."""
    spec = Spec((case["batch"], *case["tokens"], case["heads"], case["dim"]), "bfloat16")
    sizes = (tuple(case[name]) for name in ("kernel", "stride", "dilation", "causal"))
    window = window_arguments("test", len(case["tokens"]), *sizes)
    problem = attention_problem("test", "forward", spec, spec, spec, window, None)
    small = ("seq4k-w65", "nat-", "dinat-", "hdit-", "vit-", "ltx-377")
    wanted = fused if case["name"].startswith(small) else hopper
    assert choose(problem, H200, None) is wanted


@pytest.mark.parametrize(
    ("group_size", "queries", "heads"),
    [(1, 64, 1), (2, 64, 2), (3, 64, 3), (4, 64, 2), (6, 64, 3), (8, 20, 2), (4, 65, 1)],
)
def test_few_queries_have_tiles_of_several_heads(group_size, queries, heads):
    """If as many as there are warpgroups share a key head; one warpgroup has all queries of one."""
    axis = Axis(queries, 4096, 4000, 1, 1, True, "shift", 1 << 16, 40_000, 37_000)
    problem = long_windows(heads=2 * group_size, kv_heads=2, axes=(axis,), batch=32)
    (plan,) = cheapest(problem, H200, FORWARD)
    assert plan.heads == heads
    assert launch.kernel(problem, plan.form, FORWARD) in hopper.kernels(problem, H200)


# Its kernels


def test_tangents_of_long_windows_are_its():
    """Where it has a kernel: it is left to others for longer vectors, whoever is asked by name."""
    for dim, wanted in ((64, hopper), (128, hopper), (136, fused)):
        problem = long_windows(dim=dim, operation="jvp")
        assert choose(problem, H200, None) is wanted
        assert serving("hopper", problem) == ("hopper" if wanted is hopper else None)


@given(problem=supported(tuple(hopper.LONGEST), dims=ALL_DIMS))
def test_records_have_the_size_that_the_struct_asserts(problem):
    """And what they hold is in range: NumPy raises OverflowError otherwise."""
    for pass_ in itertools.chain(*ways(problem)):
        plan = make_plan(problem, H200, pass_)
        work = division(problem, plan, H200, pass_)
        record = launch._record(problem, plan, pass_, work, [Folding(0, 0, 0)] * 4)
        assert record.nbytes == 60 * problem.rank + 188


# Consumers differ by the dimensions, the dtype and the sign of the scale, producers by the number
# of axes and by the flags; how many registers either has follows from the dimensions. Those fill
# them that have the longest vectors beside three and two warpgroups. These are compiled with every
# number of axes, with all flags or none in turn, so that each flag is there, and is not, for each
# number of axes, each dimension and each dtype. Shorter vectors have shorter loops beside the same
# producers, and are compiled once, mostly for one axis, which takes NVRTC half the time.
FLAGS = ("kDilated", "kAdditional", "kSigned", "kKeyMask")
LONGEST = [
    *(("forward", dim) for dim in (128, 256)),
    *(("backward", dim) for dim in (64, 128, 256)),
]
FULL = [
    (operation, rank, "float16" if (rank + i) % 4 < 2 else "bfloat16", dim, dim, (rank + i) % 2)
    for i, (operation, dim) in enumerate(LONGEST)
    for rank in (1, 2, 3)
]
COMPILED = [
    *FULL,
    ("forward", 1, "float16", 32, 32, 1),
    ("forward", 1, "float16", 64, 64, 0),
    ("forward", 1, "bfloat16", 96, 96, 0),
    ("forward", 1, "bfloat16", 192, 192, 1),
    ("forward", 3, "bfloat16", 64, 128, 1),
    ("forward", 1, "float16", 128, 64, 0),
    ("backward", 1, "bfloat16", 32, 96, 0),
    ("backward", 1, "bfloat16", 64, 64, 0),
    ("backward", 3, "bfloat16", 64, 64, 0),
    ("backward", 2, "bfloat16", 256, 128, 1),
    ("jvp", 1, "float16", 64, 64, 0),
    ("jvp", 3, "bfloat16", 128, 128, 1),
]


def kernels_of(
    operation: Operation, rank: int, dtype: str, head_dim: int, value_dim: int, flags: int
) -> list[_jit.Kernel]:
    axes = (Axis(8, 8, 2, 1, 2 if flags else 1, False),) * rank
    scale, additional = (-1.0, 3) if flags else (1.0, None)
    dims = head_dim, value_dim
    has_key_mask = bool(flags) and operation != "jvp"
    problem = Problem(
        operation, dtype, 1, 1, 1, *dims, axes, scale, additional, has_key_mask=has_key_mask
    )
    kernels = [kernel for kernel in hopper.kernels(problem, H200) if "hopper/" in kernel.name]
    for kernel in kernels:
        expected = FLAGS if flags else ()
        if kernel.name in ("hopper/dkv", "hopper/dkv_long", "hopper/backward"):  # columns: queries
            expected = tuple(flag for flag in expected if flag != "kAdditional")
        if operation == "jvp":
            expected = tuple(flag for flag in expected if flag != "kKeyMask")
        assert tuple(flag for flag in FLAGS if f"{flag} = true" in kernel.plan) == expected
    return kernels


def test_the_kernels_below_have_every_flag_and_width():
    for operation in ("forward", "backward"):
        for which in (1, 2, 3):  # number of axes, dtype, dimension
            for value in {case[which] for case in FULL if case[0] == operation}:
                alike = [case for case in FULL if (case[0], case[which]) == (operation, value)]
                assert {case[5] for case in alike} == {0, 1}
    assert {case[3] for case in COMPILED if case[0] == "forward"} == set(WIDTHS)


@pytest.mark.long
@needs_nvrtc
@pytest.mark.parametrize(("operation", "rank", "dtype", "head_dim", "value_dim", "flags"), COMPILED)
def test_kernels_do_not_spill(operation, rank, dtype, head_dim, value_dim, flags, tmp_path):
    kernels = kernels_of(operation, rank, dtype, head_dim, value_dim, flags)
    longest = max(head_dim, value_dim)
    has_sums = head_dim > (64 if longest > 64 else 32) and longest <= 128 and not flags
    expected = {"backward": 4 if has_sums else 2}.get(operation, 1)
    if flags and operation != "jvp":  # with a mask, one kernel more looks at it
        expected += 1
    assert len(kernels) == expected
    for compiled in _jit.precompile(kernels, ["sm_90a"], tmp_path).values():
        resources = compiled.resources
        assert resources.registers > 0, "the log of NVRTC was not understood"
        assert resources.spill_stores + resources.spill_loads == 0
        assert resources.advice == ()


@needs_nvrtc
def test_kernels_for_chunks_do_not_spill(tmp_path):
    """Those that take most registers: with the longest vectors, alone and in a cluster."""
    axis = Axis(64, 4159, 4096, 1, 1, True, "shift", 1 << 16, 40_000, 35_905)
    kernels = []
    for scale, cluster in ((1.0, 1), (-1.0, 6)):
        problem = long_windows(heads=8, kv_heads=2, axes=(axis,), scale=scale)
        (form,) = (form for form in forms_of(problem, H200) if form.cluster == cluster)
        kernels.append(launch.kernel(problem, form, FORWARD))
    for compiled in _jit.precompile(kernels, ["sm_90a"], tmp_path).values():
        assert compiled.resources.spill_stores + compiled.resources.spill_loads == 0
        assert compiled.resources.advice == ()


@needs_nvrtc
def test_the_kernel_of_all_gradients_does_not_spill_with_a_mask_and_a_negative_scale(tmp_path):
    """Which come with dilation and additional keys above; this kernel takes neither."""
    kernels = []
    for tokens, scale in (((4096,), -1.0), ((64, 64), 1.0), ((16, 16, 16), -1.0)):
        for dim in (64, 128):
            problem = long_windows(
                tokens, 8, operation="backward", dim=dim, scale=scale, has_key_mask=True
            )
            (form,) = forms_of(problem, H200, BACKWARD)
            kernels.append(launch.kernel(problem, form, BACKWARD))
    for compiled in _jit.precompile(kernels, ["sm_90a"], tmp_path).values():
        assert compiled.resources.spill_stores + compiled.resources.spill_loads == 0
        assert compiled.resources.advice == ()


@needs_nvrtc
def test_gradients_of_keys_that_multiply_ahead_do_not_spill(tmp_path):
    """Along two axes, for which all flags are set above, so that producers keep their registers."""
    problem = long_windows((64, 64), 32, operation="backward")
    (form,) = forms_of(problem, H200, DKV)
    kernel = launch.kernel(problem, form, DKV)
    assert "kAhead = true" in kernel.plan
    ((_, compiled),) = _jit.precompile([kernel], ["sm_90a"], tmp_path).items()
    assert compiled.resources.spill_stores + compiled.resources.spill_loads == 0
    assert compiled.resources.advice == ()


@pytest.mark.parametrize(
    ("problem", "memory", "expected"),
    [
        (long_windows(), 139 << 30, (BACKWARD,)),
        (long_windows((1 << 20,)), 139 << 30, (BACKWARD,)),
        (long_windows((1 << 20,)), 80 << 30, (DQ, DKV)),  # sums of 4 GiB
        (long_windows(), 0, (DQ, DKV)),
        (long_windows((16384,), 2048, dim=64), 139 << 30, (BACKWARD,)),
        (long_windows((16384,), 2048, dim=32), 139 << 30, (DQ, DKV)),
        (long_windows(dim=136), 139 << 30, (DQ, DKV)),
        (long_windows(additional=100), 139 << 30, (DQ, DKV)),
        (dilated(2), 139 << 30, (DQ, DKV)),
        (long_windows((256, 256), 80), 139 << 30, (BACKWARD,)),
        (long_windows((30, 48, 80), (18, 24, 24)), 139 << 30, (BACKWARD,)),
        (long_windows((16, 32, 48), (8, 9, 9)), 139 << 30, (DQ, DKV)),
    ],
)
def test_one_kernel_computes_all_gradients_where_its_sums_have_room(problem, memory, expected):
    problem = replace(problem, operation="backward")
    assert passes(problem, replace(H200, memory=memory)) == expected


@given(problem=supported(dims=ALL_DIMS), data=st.data())
def test_one_kernel_serves_all_windows_and_lengths(problem, data):
    other = data.draw(supported(dims=ALL_DIMS, ranks=(problem.rank,), cross=False))
    names = ("dtype", "head_dim", "value_dim", "scale", "additional", "has_key_mask")
    names += ("heads", "kv_heads")
    alike = replace(problem, batch=1, **{name: getattr(other, name) for name in names})
    if launch.is_dilated(alike) == launch.is_dilated(other):
        assert hopper.kernels(alike, H200) == hopper.kernels(replace(other, batch=1), H200)


@given(problem=supported(("forward", "backward"), ordinary=False), rng=generators())
def test_soaks_take_what_is_right_and_nothing_else(problem, rng):
    """Masked tokens are NaN, and the lse of a query that sees no key is -inf."""
    drawn = inputs(problem, rng)._replace(wants_lse=True)
    right = run_backend(cpu, problem, drawn)
    assert_agree(problem, drawn, right, right)
    for name, array in right.items():
        if not array.size:
            continue
        wrong = array.copy()
        wrong[tuple(rng.integers(array.shape))] = np.nan
        with pytest.raises(AssertionError):
            assert_agree(problem, drawn, right | {name: wrong}, right)


@pytest.mark.long
@pytest.mark.skipif("OLDER_NVRTC" not in os.environ, reason="OLDER_NVRTC names no other NVRTC")
def test_kernels_compile_with_the_nvrtc_of_pytorch():
    """Which is 13.0, where tests take the newest; `.ci/run` unpacks it."""
    script = Path(__file__).parent / "helpers" / "older_nvrtc.py"
    done = subprocess.run(
        [sys.executable, script, os.environ["OLDER_NVRTC"]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["13.0"], done.stdout
