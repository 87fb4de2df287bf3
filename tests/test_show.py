"""`python -m cuneigh show`: what it draws is what queries see and what the planner counts."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuneigh._backends import BACKENDS
from cuneigh._gpu.announce import Planned
from cuneigh._gpu.boxes import count_walk
from cuneigh._measure.cases import problem_of
from cuneigh._programs import rehearse
from cuneigh._window import Axis
from cuneigh.cli import main
from cuneigh.cli.devices import device_of
from cuneigh.cli.show import page, scene

H100 = device_of("sm_90")


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    length = draw(st.integers(1, 14))
    dilation = draw(st.integers(1, length))
    kernel_size = draw(st.integers(1, length // dilation))
    stride = draw(st.integers(1, kernel_size))
    return Axis(length, length, kernel_size, stride, dilation, draw(st.booleans()))


@given(axis=axes(), sizes=st.tuples(*[st.integers(1, 4)] * 3))
def test_boxes_are_those_that_the_planner_counts(axis: Axis, sizes: tuple[int, int, int]) -> None:
    """Along an axis: loads of blocks, and the visits and full visits of their parts."""
    part, parts, columns = sizes
    counts = count_walk(axis, part, parts, columns)
    blocks: dict[int, Any] = {}
    of_parts: dict[int, Any] = {}
    for x in range(axis.length):
        along = scene._along(axis, x, *sizes)
        assert x in along.part
        blocks[int(along.block[0])] = along
        of_parts[int(along.part[0])] = along
        loaded = np.concatenate([tokens for tokens, _, _ in along.keys])
        assert set(scene._seen(axis, x)) <= set(loaded.tolist())
    assert len(blocks) == counts.blocks
    assert sum(len(along.keys) for along in blocks.values()) == counts.loads
    visits = [box for along in of_parts.values() for box in along.keys if box[1]]
    assert len(visits) == counts.visits
    assert sum(whole for _, _, whole in visits) == counts.full


@pytest.mark.parametrize("window", [3, 16])
def test_the_plans_of_every_backend_are_understood(window: int) -> None:
    entry = {"tokens": [32, 32], "heads": 8, "dim": 64, "kernel": window, "batch": 8}
    problem = problem_of(entry, "float16")
    drawn = set()
    for backend in BACKENDS:
        if backend.unsupported(problem, H100) is None:
            for planned in rehearse(problem, H100, backend.NAME)[1]:
                made = scene.scene_of(problem.axes, None, planned)
                assert made.blocks is not None
                assert np.prod(made.blocks.cut.part) > 1
                drawn.add(backend.NAME)
    assert len(drawn) == 3


def test_the_terminal_shows_a_window(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "show",
                "-i",
                "5",
                "9",
                "-w",
                "3",
                "5",
                "--dilation",
                "1",
                "1",
                "-s",
                "1",
                "2",
                "-q",
                "0",
                "8",
            ]
        )
        == 0
    )
    first, _, _, *lines = capsys.readouterr().out.splitlines()
    assert first == "query (0, 8) of 5 x 9 tokens sees 15"
    assert lines == ["····####@"] + ["····#####"] * 2 + ["·········"] * 2


def test_the_terminal_shows_slices_and_parts_of_long_layouts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["show", "-i", "4", "6", "6", "-w", "2", "3", "3", "-c", "1", "0", "0"]) == 0
    assert re.findall(r"slice \d", capsys.readouterr().out) == ["slice 1", "slice 2"]
    assert main(["show", "-i", "40000", "-w", "5"]) == 0
    printed = capsys.readouterr().out
    assert "of which tokens 19996 to 20004" in printed
    assert printed.splitlines()[-1] == "··##@##··"


def test_the_terminal_shows_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    options = "show -i 20 32 -w 7 9 -q 3 20 -n 4 --dtype fp16 --arch sm_80 --plan --backend fused"
    assert main(options.split()) == 0
    printed = capsys.readouterr().out
    assert "fused: " in printed
    queries, keys = printed.split("\n\n")[1:]
    assert queries[1:].count("Q") >= 15
    assert sum(map(keys.count, "#+")) == 63 + 2, "the legend has one of each"


def test_pictures_can_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, svg = tmp_path / "a.png", tmp_path / "b.svg"
    assert main(f"show -i 16 24 -w 5 7 --plan --output {png}".split()) == 0
    assert main(f"show -i 3 8 8 -w 2 3 3 --output {svg}".split()) == 0
    picture = np.asarray(PIL.Image.open(png).convert("RGB")).reshape(-1, 3)
    for color in ("query", "seen", "partial"):
        rgb = [int(scene_color(color)[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(picture.astype(int) - rgb).max(1) < 3).any(), color
    assert svg.read_text().count("slice") >= 2
    assert capsys.readouterr().out == f"wrote {png}\nwrote {svg}\n"


def scene_color(name: str) -> str:
    from cuneigh.cli.show.picture import COLORS

    return COLORS[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--input-size is needed"),
        ("-i 9 9 -w 10", "kernel_size=10 times dilation=1 on axis 0 is 10, which exceeds"),
        ("-i 9 9 -w 3 -q 9 0", "query=9 on axis 0 is not a token of 9"),
        ("-i 9 9 -w 3 -q 1", "query=(1,) has 1 numbers, but the layout has 2"),
        ("-i 9 -w 3 --backend gemm", "--backend matters with --plan alone"),
        ("-i 9 -w 3 --plan --backend naive", "--backend naive has no plan"),
        ("-i 9 -w 3 --plan --arch sm_10", "--arch sm_10 is not one of sm_75"),
        ("-i 2 2 2 2", "there are 4 token axes, but 1 to 3 are possible"),
        ("-i 9 -w 3 --output nowhere/picture.png", "nowhere/picture.png"),
        ("-i 9 -w 3 --output picture.xyz", "xyz"),
    ],
)
def test_bad_input_is_one_line(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


# The page

SMALL = [
    Axis(length, length, k, s, d, causal)
    for length in range(1, 8)
    for d in range(1, length + 1)
    for k in range(1, length // d + 1)
    for s in range(1, k + 1)
    for causal in (False, True)
]
SMALL += [
    Axis(length, length, k, s, d, False, border)
    for border in ("cut", "wrap")
    for length, k, s, d in ((6, 3, 1, 1), (8, 4, 3, 2), (5, 5, 2, 1), (9, 3, 2, 3))
]
WINDOW = ("kernel_size", "stride", "dilation", "is_causal")
SIZES = [(1, 2, 2), (2, 2, 3), (3, 1, 4)]

EVERYTHING = """
const answers = AXES.map((axis) => [...Array(axis.length).keys()].map((x) => [
  seenBy(axis, x), ...(axis.border === "wrap" ? [] : SIZES).map((s) => blockOf(axis, x, ...s))]));
"""


def everything() -> str:
    """A script that asks the page's rules about all small axes, into `answers`."""
    given = [
        {name: getattr(axis, name) for name in ("length", *WINDOW, "border")} for axis in SMALL
    ]
    return f"const AXES = {json.dumps(given)}, SIZES = {json.dumps(SIZES)};{EVERYTHING}"


def expected() -> list[Any]:
    """The same of `_window` and of the scene."""

    def block(axis: Axis, x: int, sizes: tuple[int, int, int]) -> dict[str, Any]:
        along = scene._along(axis, x, *sizes)
        keys = [
            {"tokens": tokens.tolist(), "some": some, "all": whole}
            for tokens, some, whole in along.keys
        ]
        return {"part": along.part.tolist(), "block": along.block.tolist(), "keys": keys}

    return [
        [
            [
                scene._seen(axis, x).tolist(),
                *(block(axis, x, sizes) for sizes in SIZES if axis.border != "wrap"),
            ]
            for x in range(axis.length)
        ]
        for axis in SMALL
    ]


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
def test_the_rules_of_the_page_are_those_of_python() -> None:
    script = page.script("rules") + everything() + "console.log(JSON.stringify(answers))"
    done = subprocess.run(["node"], input=script, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected()


DRIVE = """
<script>
const set = (label, value) => {
  const input = document.querySelector(`[aria-label="${label}"]`);
  input.value = value;
  input.dispatchEvent(new Event("input"));
};
const words = () => document.querySelector("#words").textContent;
const told = [words()];
set("dilation of axis 0", 2);
set("kernel_size of axis 1", 9);
const place = canvas.getBoundingClientRect();
canvas.dispatchEvent(
  new PointerEvent("pointermove", { clientX: place.left + 2, clientY: place.top + 2 }));
told.push(words(), document.querySelector("#call").textContent);
canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
told.push(words());
document.body.innerHTML = "<pre></pre>";
"""


def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    """One start of it: the page is played with, and its rules are asked about everything."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("chromium is not installed")
    planned = Planned("toy", "forward", Boxes())
    axes = (Axis(12, 12, 4, 2, 1, False), Axis(20, 20, 6, 1, 1, False))
    made = page.page_of(scene.scene_of(axes, (5, 9), planned))
    assert not re.search(r"(src|href)\s*=|https?://|@import|fetch\(", made), "needs no network"
    finish = "document.querySelector('pre').textContent = JSON.stringify([told, answers]);</script>"
    file = tmp_path / "page.html"
    file.write_text(made.replace("</html>", DRIVE + everything() + finish), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [browser, *options, "--dump-dom", file.as_uri()], capture_output=True, text=True
    )
    found = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr
    told, answers = json.loads(found[1])
    changed = (replace(axes[0], dilation=2), replace(axes[1], kernel_size=9))
    assert told == [
        sentence(axes, (5, 9)),
        sentence(changed, (0, 0)),
        "cuneigh.na2d(query, key, value, kernel_size=(4, 9), stride=(2, 1), dilation=(2, 1))",
        sentence(changed, (0, 1)),
    ]
    assert answers == expected()


def sentence(axes: tuple[Axis, ...], query: tuple[int, ...]) -> str:
    """What the page says below the layout."""
    made = scene.scene_of(axes, query, Planned("toy", "forward", Boxes()))
    assert made.blocks is not None
    counts = Counter(box.status for box in made.blocks.keys)
    ranges = ", ".join(f"{along[0]} to {along[-1]}" for along in made.seen)
    return (
        f"Query ({query[0]}, {query[1]}) sees {len(made.seen[0]) * len(made.seen[1])} keys: "
        f"{ranges}. Its part of the block multiplies {counts['full']} boxes of keys without a "
        f"mask and {counts['partial']} with one, and passes over {counts['skipped']}."
    )


class Boxes:
    """A plan of small boxes."""

    warp_box, warps, column_box = (2, 4), (2, 1), (2, 4)

    def __str__(self) -> str:
        return "2x4 queries"


def test_every_combination_of_statuses_is_a_product_of_the_axes() -> None:
    """A box that one axis passes over is passed over, whatever the other says."""
    axes = (Axis(12, 12, 4, 2, 1, False), Axis(20, 20, 6, 1, 1, False))
    blocks = scene.scene_of(axes, (5, 9), Planned("toy", "forward", Boxes())).blocks
    assert blocks is not None
    seen: dict[Any, list[tuple[bool, bool]]] = {}
    for token in itertools.product(*blocks.part):
        for box in blocks.keys:
            windows = [set(scene._seen(axis, int(x))) for axis, x in zip(axes, token, strict=True)]
            inside = [
                len(window & set(tokens.tolist())) == size
                for window, tokens, size in zip(windows, box.tokens, (2, 4), strict=True)
            ]
            some = all(
                window & set(tokens.tolist())
                for window, tokens in zip(windows, box.tokens, strict=True)
            )
            key = tuple(tuple(tokens.tolist()) for tokens in box.tokens)
            seen.setdefault((key, box.status), []).append((bool(some), all(inside)))
    for (_, status), found in seen.items():
        if status == "skipped":
            assert not any(some for some, _ in found)
        elif status == "full":
            assert all(whole for _, whole in found)
        else:
            assert any(some for some, _ in found)
            assert not all(whole for _, whole in found)
