"""`python -m cuneigh profile`, end to end on the CPU, and what it measures and checks with."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuneigh._backends import BACKENDS, cpu
from cuneigh._measure import arrays, checks, ours, peers
from cuneigh._measure.cases import problem_of, read
from cuneigh._measure.clock import Times, _times
from cuneigh._measure.peers import flex, masks
from cuneigh._measure.peers.clock import TorchClock
from cuneigh._problem import Operands
from cuneigh._window import Axis
from cuneigh.cli import main, terminal

CASES = Path(__file__).parents[1] / "bench" / "cases.json"
SEVEN_FIVE = "-i 64 64 -n 8 -w 9 --dry-run --arch sm_75 --dtype bf16"
PROBLEM = "-i 8 9 -n 2 --heads-kv 1 -d 8 -w 3 5 -s 2 1 --dilation 1 1 -c 0 1 --budget 1"


def profiled(options: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the command prints for machines."""
    assert main(["profile", "--json", *options.split()]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_times_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one peer that runs, one that fails, and one that is not there."""

    def breaks(given: peers.Given) -> peers.Calls:
        raise ZeroDivisionError("no reason\nat all")

    def is_wrong(given: peers.Given) -> peers.Calls:
        return peers.Calls(lambda: 2 * given.value.expand_as(given.query), None)

    names = {"breaks": breaks, "is wrong": is_wrong}
    monkeypatch.setattr(peers, "PEERS", {"SDPA": peers.PEERS["SDPA"], **names})
    made = profiled(f"{PROBLEM} --dtype fp32 --backward --peers", capsys)
    assert {"cpu", "cuneigh", "commit", "date"} <= made.keys()
    assert min(made["ceilings"].values()) > 0
    (case,) = made["cases"]
    assert case["problem"].startswith("float32, 8x9 tokens, kernel_size 3x5, stride 2x1, causal")
    rows = {(row["name"], row["kind"]): row for row in case["rows"]}
    for kind in ("forward", "forward_backward"):
        row = rows["cpu", kind]
        assert row["chosen"]
        assert 0 < row["low"] <= row["ms"] <= row["high"]
        assert row["tflops"] > 0 < row["gbps"]
        assert 0 < row["tflops_share"] < 1
        assert row["peak_bytes"] > 4 * 8 * 9 * 16
        assert rows["SDPA", kind]["ms"] > 0, rows["SDPA", kind]
        assert rows["SDPA", kind]["note"] == "dense mask"
        assert rows["breaks", kind]["reason"] == "failed: ZeroDivisionError: no reason"
        assert "CUDA device" in rows["gemm", kind]["reason"]
    assert "WrongResultError: output at" in rows["is wrong", "forward"]["reason"]
    assert rows["is wrong", "forward_backward"]["reason"] == "has no backward here"


def test_a_peer_that_cuts_windows_is_compared_far_from_the_borders(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_cut(given: peers.Given) -> peers.Calls:
        """Ours, but for queries near the borders."""
        output = ours.forward(given.problem, Operands(given.query, given.key, given.value), None)
        output[:, :2] = output[:, -2:] = 7
        return peers.Calls(lambda: output, None, "windows are cut", inner=True)

    monkeypatch.setattr(peers, "PEERS", {"is cut": is_cut})
    pytest.importorskip("torch")
    for options, told in (("-i 40 -w 5", None), ("-i 8 -w 5", "all of its windows are cut")):
        (case,) = profiled(f"{options} --budget 1 --peers", capsys)["cases"]
        (row,) = (row for row in case["rows"] if row["name"] == "is cut")
        assert row["note"] == "windows are cut"
        assert ("ms" in row) == (told is None)
        assert told is None or told in row["reason"]


def test_what_takes_long_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0)
    assert main(["profile", *PROBLEM.split(), "--backward"]) == 0
    assert capsys.readouterr().err == "cpu: forward ..\ncpu: forward and backward ..\n"


@pytest.mark.gpu
def test_the_graph_of_a_peer_holds_its_call() -> None:
    torch = pytest.importorskip("torch")
    matrix = torch.ones(4096, 4096, device="cuda")
    times = TorchClock().measure(lambda: matrix @ matrix, budget_ms=20)
    assert times.graph_ms is not None
    assert 0.5 < times.graph_ms / times.ms < 1.5


def test_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *PROBLEM.split(), "--backprop"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "100 % are" in printed
    assert lines.count("forward") == lines.count("forward and backward") == 1
    rows = [line.split() for line in lines if line.startswith("cpu (chosen)")]
    assert len(rows) == 2
    assert all(float(row[2]) > 0 for row in rows)
    assert printed.count("hopper, fused, naive, gemm: needs arrays on a CUDA device") == 2


def test_a_wrong_result_has_no_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cpu.forward

    def wrong(problem: Any, operands: Any, output: Any, *others: Any) -> None:
        right(problem, operands, output, *others)
        output *= 1.25

    monkeypatch.setattr(cpu, "forward", wrong)
    assert main(["profile", *PROBLEM.split()]) == 1
    printed = capsys.readouterr().out
    assert "cpu: ERROR: its result is wrong: output at (0, 0, 0, " in printed
    assert "cpu (chosen)" not in printed


def test_a_dry_run_lists_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["seq4k-w65", "nat-stage3", "video-causal"]
    options = f"--cases {CASES} --case {' '.join(names)} --dry-run --arch sm_90 --backward"
    made = profiled(options, capsys)
    assert [case["name"] for case in made["cases"]] == names
    for case in made["cases"]:
        for kind in ("forward", "forward_backward"):
            rows = {row["name"]: row for row in case["rows"] if row["kind"] == kind}
            assert list(rows) == [backend.NAME for backend in BACKENDS]
            able = [row for row in rows.values() if "reason" not in row]
            assert all(row["predicted_ms"] > 0 for row in able)
            fastest = min(row["predicted_ms"] for row in able)
            (chosen,) = (row for row in able if row["chosen"])
            assert chosen["predicted_ms"] == fastest or kind == "forward_backward"
            assert "forward" in rows["fused"].get("plans", {"forward": ""})
    assert (
        main(
            [
                "profile",
                "-i",
                "64",
                "64",
                "-n",
                "8",
                "-w",
                "9",
                "--dry-run",
                "--arch",
                "sm_75",
                "--dtype",
                "bf16",
            ]
        )
        == 0
    )
    assert "fused: needs compute capability 8.0 for bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "either --input-size or --cases is needed"),
        ("-i 9 --cases {file}", "either --input-size or --cases is needed, and not both"),
        ("--cases {file} -w 3", "--window-size describes one problem, but --cases has its own"),
        ("--cases {file} --case nobody", "has no case 'nobody'"),
        ("--cases missing.json", "missing.json"),
        ("--cases {bad}", "case 'x' of {bad} has an unknown 'kernle'"),
        ("-i 9 --case a", "--case names problems of --cases, which is not given"),
        ("-i 9 --arch sm_90", "--arch is for --dry-run"),
        ("-i 9 --arch sm_1 --dry-run", "--arch sm_1 is not one of sm_75"),
        ("-i 9 --peers --dry-run", "--peers are timed, which --dry-run does not do"),
        ("-i 9 -w 10", "kernel_size=10 times dilation=1 on axis 0 is 10, which exceeds"),
        ("-i 9 9 -w 3 3 3", "kernel_size=(3, 3, 3) has 3 entries, but there are 2 token axes"),
        ("-i 9 -n 3 --heads-kv 2", "query has 3 heads, which is not a multiple of the 2 heads"),
        ("-i 9 -w 3 --backend gemm", "no backend can run this problem; gemm: needs arrays on"),
    ],
)
def test_bad_input_is_one_line(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('[{"name": "x", "tokens": [9], "heads": 1, "dim": 8, "kernel": 3, "kernle": 3}]')
    files = {"file": CASES, "bad": bad}
    assert main(["profile", *options.format(**files).split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("python -m cuneigh profile: ")
    assert message.format(**files) in error


def test_cases_may_have_everything(tmp_path: Path) -> None:
    file = tmp_path / "cases.json"
    entry = {
        "tokens": [6, 6],
        "heads": 4,
        "kv_heads": 2,
        "dim": 8,
        "value_dim": 4,
        "kernel": [3, 2],
    }
    more = {"dtype": "float64", "additional_keys": 2, "causal": [True, False], "batch": 3}
    file.write_text(json.dumps([{"name": "all", **entry, **more}, entry]))
    first, second = read(file, "float32")
    assert (first.name, second.name) == ("all", "1")
    problem = first.problem
    assert (problem.dtype, problem.additional, problem.batch) == ("float64", 2, 3)
    assert (problem.kv_heads, problem.value_dim) == (2, 4)
    assert second.problem.dtype == "float32"
    for text, message in (("{}", "does not hold a list"), ("[1", "is not JSON"), ("[{}]", "lacks")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(file, "float32")


# What it checks with


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_wrong_is_found(dtype: str) -> None:
    """Whatever is scaled, a key more or less: far beyond what rounding explains."""
    entry = {"tokens": [12, 11], "heads": 2, "dim": 8, "kernel": [5, 4], "dilation": [2, 1]}
    entry |= {"kv_heads": 1, "causal": [False, True], "additional_keys": 2, "batch": 2}
    problem = problem_of(entry, dtype)
    operands = arrays.operands_of(np, problem)
    grad_output = arrays.grad_output_of(np, problem)
    ours.check(problem, operands, grad_output, None)
    output, lse, gradients = ours.step(problem, operands, grad_output, None)
    found = Operands(*gradients)
    with pytest.raises(checks.WrongResultError, match="lse at"):
        checks.check_forward(problem, operands, output, lse + 1)
    fewer = problem_of(entry | {"kernel": [4, 4]}, dtype)
    with pytest.raises(checks.WrongResultError, match="output at"):
        checks.check_forward(fewer, operands, output)
    for name in ("query", "key", "value"):
        half = (getattr(found, name) * 0.5).astype(output.dtype)
        with pytest.raises(checks.WrongResultError, match=f"gradient of {name} at"):
            checks.check_gradients(
                problem, operands, grad_output, output, lse, found._replace(**{name: half})
            )
    nan = output.copy()
    nan[...] = np.nan
    with pytest.raises(checks.WrongResultError, match="errs nan"):
        checks.check_forward(problem, operands, nan)


def test_a_long_window_is_checked_as_strictly() -> None:
    """A mean of many keys is a small number, which an absolute bound would never miss."""
    problem = problem_of({"tokens": [3000], "heads": 1, "dim": 8, "kernel": 2001}, "bfloat16")
    operands = arrays.operands_of(np, problem)
    output = ours.forward(problem, operands, None)
    checks.check_forward(problem, operands, output)
    with pytest.raises(checks.WrongResultError):
        checks.check_forward(problem, operands, np.zeros_like(output))


def test_sums_of_many_terms_one_after_another_are_right() -> None:
    """As kernels may take them; a key that is missing is not."""
    rng = np.random.default_rng(0)
    for n in (100, 2047, 20_000):
        terms = rng.standard_normal((n, 64)) / n
        tolerance = checks.tolerance_of(
            problem_of({"tokens": [4], "heads": 1, "dim": 8, "kernel": 3}, "float32")
        )
        tolerance.require("sum", np.cumsum(terms, 0, dtype=np.float32)[-1], terms)
        with pytest.raises(checks.WrongResultError):
            tolerance.require("sum", np.cumsum(terms[1:], 0, dtype=np.float32)[-1], terms)


def test_gradients_that_cancel_are_right_within_what_they_are_made_of() -> None:
    """A query that sees one key has no gradient, but for sums that are taken in another order."""
    problem = problem_of(
        {"tokens": [40], "heads": 2, "dim": 16, "kernel": 9, "causal": [True]}, "bfloat16"
    )
    operands = arrays.operands_of(np, problem)
    grad_output = arrays.grad_output_of(np, problem)
    output, lse, gradients = ours.step(problem, operands, grad_output, None)
    found = Operands(*gradients)
    assert not found.query[:, 0].any()
    found.query[:, 0] = 1e-4
    checks.check_gradients(problem, operands, grad_output, output, lse, found)
    shifted = found._replace(query=np.roll(found.query, 1, axis=1))
    with pytest.raises(checks.WrongResultError, match="gradient of query at"):
        checks.check_gradients(problem, operands, grad_output, output, lse, shifted)


def test_numbers_are_normal_in_every_dtype() -> None:
    for dtype in checks.EPS:
        numbers = arrays.normal(np, (4, 500), dtype, 3)
        assert numbers.dtype.name == dtype
        assert abs(arrays.float64(numbers).std() - 1) < 0.1


def test_quartiles_are_those_of_the_faster_way() -> None:
    assert _times([4.0, 2.0, 3.0], None) == Times(3.0, None, 2.5, 3.5)
    assert _times([4.0, 2.0, 3.0], [1.0, 1.0, 2.0]).best == 1.0
    assert _times([1.0, 1.0, 1.0], [2.0, 3.0, 4.0])[2:] == (1.0, 1.0)


# The masks of peers


def test_masks_are_the_window_rules() -> None:
    torch = pytest.importorskip("torch")
    for length in range(1, 8):
        token = torch.arange(length)
        for d in range(1, length + 1):
            for k in range(1, length // d + 1):
                for s in range(1, k + 1):
                    for causal in (False, True):
                        axis = Axis(length, length, k, s, d, causal)
                        got = masks.sees(axis, token[:, None], token[None]).numpy()
                        expected = np.zeros((length, length), bool)
                        for x in range(length):
                            begin, end = axis.window(x // d, x % d)
                            expected[x, np.arange(begin, end) * d + x % d] = True
                        assert (got == expected).all(), axis
                        # Comparisons alone: nothing that is PyTorch's, which it may not compile
                        plain = masks.sees(axis, token.numpy()[:, None], token.numpy()[None])
                        assert (plain == expected).all(), axis


def test_tokens_go_into_tiles_and_back() -> None:
    torch = pytest.importorskip("torch")
    layout, tile = (16, 32, 4), (8, 4, 4)
    tensor = torch.arange(2 * 16 * 32 * 4 * 3 * 2).reshape(2, *layout, 3, 2)
    sorted_ = flex._sort(tensor, tile)[:, :, 0]
    assert (flex._unsort(sorted_, layout, tile) == tensor).all()
    places = masks.coordinates_in_tiles(torch.arange(16 * 32 * 4), layout, tile)
    assert (tensor[:, places[0], places[1], places[2]] == sorted_).all()
    assert masks.tile_of((48, 64)) == (8, 16)
    assert masks.tile_of((30, 48, 80)) == (2, 8, 8)
    assert masks.tile_of((56, 20)) is None


def test_peers_say_why_they_do_not_fit() -> None:
    pytest.importorskip("torch")
    given = {
        "2-D": peers.given_to(*_given({"tokens": [4, 4], "kernel": 3, "stride": 2})),
        "keys": peers.given_to(*_given({"tokens": [9], "kernel": 3, "additional_keys": 1})),
    }
    reasons = {}
    for problem, name in (("2-D", "FlashAttention-4, window_size"), ("keys", "SDPA")):
        with pytest.raises(peers.UnfitError) as error:
            peers.PEERS[name](given[problem])
        reasons[name] = str(error.value)
    assert reasons == {
        "FlashAttention-4, window_size": "window_size has one axis, not 2",
        "SDPA": "takes no additional keys",
    }


def test_another_library_in_nattens_name_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    given = peers.given_to(*_given({"tokens": [9], "kernel": 3}))
    fake = SimpleNamespace(__name__="natten", na1d=ours.forward)
    monkeypatch.setitem(sys.modules, "natten", fake)
    with pytest.raises(peers.UnfitError, match="is not NATTEN"):
        peers.PEERS["NATTEN"](given)


@dataclass(frozen=True)
class OnGpu(peers.Given):
    """On the CPU, but for what peers ask."""

    on_gpu = True


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    qv: Any = None,
    gather_kv_indices: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[Any, Any]:
    """What flash-attn-4 4.0.0b36 says that its function takes and computes."""
    import torch

    tokens = torch.arange(q.shape[1])
    left, right = (q.shape[1] if size is None else size for size in window_size)
    offset = tokens[None] - tokens[:, None]
    seen = (offset >= -left) & (offset <= (0 if causal else right))
    heads = (each.transpose(1, 2) for each in (q, k, v))
    options = {"attn_mask": seen, "scale": softmax_scale, "enable_gqa": True}
    output = torch.nn.functional.scaled_dot_product_attention(*heads, **options)
    return output.transpose(1, 2), None


@pytest.mark.parametrize("kernel", [5, 6, 40])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_window_of_flash_attention(
    kernel: int, causal: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    asked = set()

    def called(*arrays: Any, **options: Any) -> tuple[Any, Any]:
        asked.add(options["deterministic"])
        return flash_attn_func(*arrays, **options)

    module = SimpleNamespace(flash_attn_func=called)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=module))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    entry = {"tokens": [40], "heads": 4, "kv_heads": 2, "kernel": kernel, "causal": [causal]}
    problem, operands, grad_output = _given(entry)
    given = peers.given_to(problem, operands, grad_output)
    name = "FlashAttention-4, window_size" + ", deterministic" * deterministic
    calls = peers.PEERS[name](OnGpu(**vars(given)))
    assert calls.inner == (kernel < 40 and not causal)
    far = kernel if calls.inner else 0
    tokens = [(x,) for x in range(far, 40 - far)]
    checks.check_forward(problem, operands, calls.forward(), tokens=tokens)
    assert calls.step is not None
    output, gradients = calls.step()
    _, lse = ours.forward(problem, operands, None, return_lse=True)
    about = problem, operands, grad_output, output, lse, Operands(*gradients)
    checks.check_gradients(*about, tokens=[(x,) for x in range(2 * far, 40 - 2 * far)])
    assert asked == {deterministic}


def test_blocks_of_keys_are_tiles_of_flash_attention() -> None:
    pytest.importorskip("torch")
    found = {
        (capability, dim): flex.flash_blocks(
            (capability, 0), peers.given_to(*_given({"tokens": [9], "kernel": 3, "dim": dim}))
        )
        for capability, dim in [(9, 64), (9, 128), (9, 192), (9, 256), (10, 128)]
    }
    assert [*found.values()] == [(128, 128), (128, 128), (128, 96), (128, 64), (256, 128)]


def _given(entry: dict[str, Any]) -> tuple[Any, Any, Any]:
    problem = problem_of({"heads": 1, "dim": 4, **entry}, "float32")
    return problem, arrays.operands_of(np, problem), arrays.grad_output_of(np, problem)
