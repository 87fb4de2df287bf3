"""A scene as one self-contained page, in which the query and the window are changed by hand."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from cuneigh.cli.show.scene import Scene

HERE = Path(__file__).parent

LEGEND = """
    <span class="key"><i style="background:#bfe3c6"></i>box of keys without a mask</span>
    <span class="key"><i style="background:#fbe3a6"></i>with a mask</span>
    <span class="key"><i style="background:#dcdee3"></i>passed over</span>
    <span class="key"><i class="line" style="border-color:#7b2cbf"></i>queries of its part</span>
    <span class="key"><i class="line" style="border-color:#b79ad9"></i>of its block</span>
    <br>{text}"""


def write(scene: Scene, path: Path) -> None:
    """Write the page to a file."""
    path.write_text(page_of(scene), encoding="utf-8")


def page_of(scene: Scene) -> str:
    """The page: `page.html` with the scripts and what it begins with put into it."""
    start: dict[str, Any] = {
        "axes": [
            {
                "length": axis.length,
                "kernel_size": axis.kernel_size,
                "stride": axis.stride,
                "dilation": axis.dilation,
                "is_causal": axis.is_causal,
                "border": axis.border,
            }
            for axis in scene.axes
        ],
        "query": list(scene.query),
        "longest": max(scene.tokens),
        "cut": scene.blocks and {k: list(v) for k, v in scene.blocks.cut._asdict().items()},
        "boxes": scene.blocks is not None,
    }
    legend = ""
    if scene.blocks is not None:
        text = f"Boxes as planned by {scene.blocks.backend}: {scene.blocks.text}"
        legend = LEGEND.format(text=html.escape(text))
    page = (HERE / "page.html").read_text(encoding="utf-8")
    for mark, text in (
        ("<!--LEGEND-->", legend),
        ("/*RULES*/", script("rules")),
        ("/*START*/", json.dumps(start)),
        ("/*PAGE*/", script("page")),
    ):
        page = page.replace(mark, text)
    return page


def script(name: str) -> str:
    """One of the scripts of the page."""
    return (HERE / f"{name}.js").read_text(encoding="utf-8")
