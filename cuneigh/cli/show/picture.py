"""A scene as a picture of matplotlib; slices of a volume side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh.cli.show.scene import Scene, Tokens

MOST = (48, 160, 160)
"""Tokens along each axis up to which the whole layout is drawn."""
COLORS = {
    "token": "#f4f5f7",
    "seen": "#2f6fdb",
    "query": "#d62839",
    "full": "#a5dcb0",
    "partial": "#fbdf95",
    "skipped": "#d5d8de",
    "part": "#7b2cbf",
    "block": "#b79ad9",
    "box": "#9a8c5c",
}
PANELS = 6
"""Slices of a volume in a row."""


def write(scene: Scene, path: Path) -> None:
    """Draw the scene to a file; its suffix says what kind."""
    figure_of(scene).savefig(path, dpi=110)


def figure_of(scene: Scene) -> Any:
    """The scene as a figure."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    region = scene.region(MOST[-len(scene.axes) :])
    numbers = _slices(scene, region)
    rows = math.ceil(len(numbers) / PANELS)
    per_row = math.ceil(len(numbers) / rows)
    height, width = ((1, 1, *(part.stop - part.start for part in region)))[-2:]
    panel_width = min(max(3.4, 0.13 * width), 12.0) if len(numbers) == 1 else 2.4
    panel_height = min(max(panel_width * height / width, 0.3), 11.0)
    figure = Figure(
        figsize=(max(per_row * panel_width, 6.0), rows * (panel_height + 0.35) + 1.1),
        layout="constrained",
    )
    panels = figure.subplots(rows, per_row, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, number in zip(panels, numbers, strict=False):
        _panel(panel, scene, region, number)
    figure.suptitle(_title(scene), fontsize=9)
    names = {"query": "query", "seen": "key that it sees"}
    if scene.blocks is not None:
        names |= {
            "full": "box of keys, no mask",
            "partial": "box with a mask",
            "skipped": "passed over",
            "part": "queries of its part",
            "block": "of its block",
        }
    handles = [
        Patch(
            facecolor="none" if name in ("part", "block") else COLORS[name],
            edgecolor=COLORS[name] if name in ("part", "block") else "none",
            label=text,
        )
        for name, text in names.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _title(scene: Scene) -> str:
    axes = scene.axes

    def sizes(name: str) -> str:
        return "x".join(str(getattr(axis, name)) for axis in axes)

    words = [f"{sizes('length')} tokens, kernel_size {sizes('kernel_size')}"]
    words += [
        f"{name} {sizes(name)}"
        for name in ("stride", "dilation")
        if any(getattr(axis, name) > 1 for axis in axes)
    ]
    if any(axis.is_causal for axis in axes):
        words.append("causal " + "x".join(str(int(axis.is_causal)) for axis in axes))
    if any(axis.border != "shift" for axis in axes):
        words.append(f"border {sizes('border')}")
    title = ", ".join(words)
    return f"{title}\n{scene.blocks.backend}: {scene.blocks.text}" if scene.blocks else title


def _slices(scene: Scene, region: tuple[slice, ...]) -> list[int | None]:
    """The slices of a volume that hold something; a layout of fewer axes is one without number."""
    if len(scene.axes) < 3:
        return [None]
    used = {scene.query[0], *scene.seen[0].tolist()}
    if scene.blocks is not None:
        used |= {int(x) for box in scene.blocks.keys for x in box.tokens[0]}
        used |= set(scene.blocks.block[0].tolist())
    return sorted(x for x in used if region[0].start <= x < region[0].stop)


def _panel(panel: Any, scene: Scene, region: tuple[slice, ...], number: int | None) -> None:
    """One slice: tokens as cells, the keys that are seen as squares in them."""
    inner = region[-2:] if len(region) > 1 else (slice(0, 1), *region)
    top, left = (part.start for part in inner)
    shape = tuple(part.stop - part.start for part in inner)
    cells = np.empty((*shape, 3))
    cells[:] = _rgb(COLORS["token"])

    def plane(tokens: tuple[Tokens, ...]) -> npt.NDArray[np.bool_]:
        """Of a product of tokens, what lies in this slice."""
        marks = scene.marks(tokens)
        if number is not None:
            marks = marks[number]
        marks = marks.reshape((1, *marks.shape)[-2:])
        return marks[inner]

    if scene.blocks is not None:
        for box in scene.blocks.keys:
            cells[plane(box.tokens)] = _rgb(COLORS[box.status])
    extent = (left - 0.5, left + shape[1] - 0.5, top + shape[0] - 0.5, top - 0.5)
    panel.imshow(cells, extent=extent, interpolation="nearest", aspect="equal")
    for tokens, color, size in (
        (scene.seen, "seen", 0.62 if scene.blocks is None else 0.42),
        (tuple(np.array([x]) for x in scene.query), "query", 0.9),
    ):
        _squares(panel, plane(tokens), top, left, COLORS[color], size)
    if scene.blocks is not None:
        if all(axis.dilation == 1 for axis in scene.axes):
            for box in scene.blocks.keys:
                _outline(panel, plane(box.tokens), top, left, COLORS["box"], width=0.8)
        for tokens, color in ((scene.blocks.block, "block"), (scene.blocks.part, "part")):
            _outline(panel, plane(tokens), top, left, COLORS[color])
    _lines(panel, shape, top, left)
    if number is not None:
        panel.set_title(f"slice {number}", fontsize=8)


def _squares(
    panel: Any, marks: npt.NDArray[np.bool_], top: int, left: int, color: str, size: float
) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches = [
        Rectangle((left + x - size / 2, top + y - size / 2), size, size)
        for y, x in np.argwhere(marks)
    ]
    panel.add_collection(PatchCollection(patches, facecolor=color, edgecolor="none"))


def _outline(
    panel: Any,
    marks: npt.NDArray[np.bool_],
    top: int,
    left: int,
    color: str,
    width: float = 1.8,
) -> None:
    """A line around what is marked: between each marked cell and one that is not."""
    from matplotlib.collections import LineCollection

    padded = np.pad(marks, 1)
    segments = []
    for y, x in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        place = left + x - 0.5
        segments.append([(place, top + y - 1.5), (place, top + y - 0.5)])
    for y, x in np.argwhere(padded[1:] != padded[:-1]):
        place = top + y - 0.5
        segments.append([(left + x - 1.5, place), (left + x - 0.5, place)])
    panel.add_collection(LineCollection(segments, colors=color, linewidths=width))


def _lines(panel: Any, shape: tuple[int, ...], top: int, left: int) -> None:
    """White lines between tokens, as long as these are large enough to be seen."""
    if max(shape) > 80:
        return
    for x in range(shape[1] + 1):
        panel.axvline(left + x - 0.5, color="white", linewidth=0.6, zorder=1)
    for y in range(shape[0] + 1):
        panel.axhline(top + y - 0.5, color="white", linewidth=0.6, zorder=1)


def _rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
