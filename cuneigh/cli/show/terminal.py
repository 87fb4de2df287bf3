"""A scene in the terminal: a character for each token."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import numpy.typing as npt

from cuneigh.cli.show.scene import Scene

Picture = npt.NDArray[np.str_]

STYLES = {
    "@": "bold red",
    "#": "bold green",
    "+": "yellow",
    "o": "dim yellow",
    "-": "dim",
    "Q": "bold blue",
    "q": "blue",
    "·": "dim",
}
"""Of characters, where rich prints them."""


def draw(scene: Scene) -> None:
    """Print the queries and the keys; slices of a volume one under the other."""
    columns, lines = shutil.get_terminal_size((100, 40))
    region = scene.region((lines, lines, columns - 2)[-len(scene.axes) :])
    query = ", ".join(map(str, scene.query))
    count = int(np.prod([len(each) for each in scene.seen]))
    whole = all(part == slice(0, n) for part, n in zip(region, scene.tokens, strict=True))
    shown = (
        ""
        if whole
        else ", of which tokens "
        + " x ".join(f"{part.start} to {part.stop - 1}" for part in region)
    )
    print(f"query ({query}) of {' x '.join(map(str, scene.tokens))} tokens sees {count}{shown}")
    if scene.blocks is None:
        _print(scene, keys_of(scene), region, "@ the query, # a key that it sees")
        return
    blocks = scene.blocks
    print(f"{blocks.backend}: {blocks.text}")
    legend = "@ the query, Q queries of its part of the block, q others of the block"
    _print(scene, queries_of(scene), region, legend)
    legend = (
        "# seen, in a box that needs no mask; + seen, in a box with a mask; o loaded, masked; "
        "- loaded, passed over by this part"
    )
    _print(scene, keys_of(scene), region, legend)


def keys_of(scene: Scene) -> Picture:
    """The layout, with what becomes of every key."""
    picture = np.full(scene.tokens, "·")
    if scene.blocks is None:
        picture[scene.marks(scene.seen)] = "#"
        picture[scene.query] = "@"
        return picture
    seen = scene.marks(scene.seen)
    for box in scene.blocks.keys:
        inside = scene.marks(box.tokens)
        picture[inside] = "-" if box.status == "skipped" else "o"
        picture[inside & seen] = "#" if box.status == "full" else "+"
    return picture


def queries_of(scene: Scene) -> Picture:
    """The layout, with the block of the query."""
    picture = np.full(scene.tokens, "·")
    assert scene.blocks is not None, "asked for a plan"
    picture[scene.marks(scene.blocks.block)] = "q"
    picture[scene.marks(scene.blocks.part)] = "Q"
    picture[scene.query] = "@"
    return picture


def _print(scene: Scene, picture: Picture, region: tuple[slice, ...], legend: str) -> None:
    print(f"\n{legend}")
    part = picture[region]
    slices = part.reshape(-1, *((1, 1, *part.shape)[-2:]))
    for number, rows in enumerate(slices):
        if len(scene.axes) == 3:
            if (rows == "·").all():
                continue
            print(f"slice {region[0].start + number}")
        _print_lines(["".join(row) for row in rows])


def _print_lines(lines: list[str]) -> None:
    """In color where that can be."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.text import Text
        except ImportError:
            pass
        else:
            console = Console()
            for line in lines:
                console.print(Text.assemble(*((each, STYLES[each]) for each in line)))
            return
    encoding = sys.stdout.encoding or "ascii"
    plain = "·".encode(encoding, "ignore").decode(encoding) == "·"
    for line in lines:
        print(line if plain else line.replace("·", "."))
