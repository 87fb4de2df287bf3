"""Figures of the committed results: ``python bench/figures.py`` draws all anew into docs/figures.

Each says in its metadata of which files it was drawn, by a digest of what they hold, so that a test
can tell a figure that is older than its result.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FIGURES = ROOT / "docs" / "figures"
PEERS = ROOT / "bench" / "peers-h200.json"
BLUE, LIGHT, RED = "#2f6fdb", "#9dbdf0", "#d62839"
KINDS = {"forward": "forward", "forward_backward": "forward and backward"}


class Figure(NamedTuple):
    """What is drawn of which files."""

    sources: tuple[Path, ...]
    draw: Callable[[Any, Any], None]
    """Draws the documents of the sources into a figure of matplotlib."""

    def digest(self) -> str:
        """Of all that the sources hold."""
        texts = b"".join(source.read_bytes() for source in self.sources)
        return hashlib.sha256(texts).hexdigest()

    @property
    def can_be_drawn(self) -> bool:
        return all(source.exists() for source in self.sources)


def main() -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES_BY_NAME.items():
        if figure.can_be_drawn:
            write(name, figure)
            print(f"wrote {(FIGURES / name).relative_to(ROOT)}")
        else:
            missing = next(source for source in figure.sources if not source.exists())
            print(f"{name} waits for {missing.relative_to(ROOT)}")


def update(output: Path) -> None:
    """Draw the figures of a result that has just been written to `bench/results`."""
    for name, figure in FIGURES_BY_NAME.items():
        if output.resolve() in figure.sources and figure.can_be_drawn:
            try:
                write(name, figure)
            except ImportError as error:
                print(f"{name} is not drawn: {error.name} is missing")


def write(name: str, figure: Figure) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8.2, 4.6), layout="constrained")
    figure.draw(canvas, [json.loads(source.read_text()) for source in figure.sources])
    metadata = {"Source": figure.digest(), "Software": None}
    canvas.savefig(FIGURES / name, dpi=100, metadata=metadata)


# The case set beside peers


class Comparison(NamedTuple):
    """One case and kind beside the fastest of its peers."""

    case: str
    kind: str
    ms: float
    backend: str
    peer_ms: float | None
    peer: str

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the best peer."""
        return None if self.peer_ms is None else self.peer_ms / self.ms


PEER_NAMES = {
    "fa4": "FlashAttention-4",
    "flex-flash": "FlashAttention-4",
    "flex": "FlexAttention",
    "natten-cutlass": "NATTEN, CUTLASS",
    "natten-hopper": "NATTEN, Hopper",
    "cudnn": "cuDNN",
}
"""Of the peers of `peers-h200.json`, by what their names begin with."""


def comparisons(results: Any, peers: Any) -> list[Comparison]:
    """Every case and kind of the chosen backend, beside `peers` and cuDNN of the same run."""
    found = []
    for case, by_backend in results["cases"].items():
        for kind in KINDS:
            backend = by_backend["chosen"][kind]
            if kind not in by_backend.get(backend, {}):
                continue
            figure = by_backend[backend][kind]
            ms = min(figure["ms"], figure["graph_ms"])
            measured = dict(peers["cases"].get(case, {}).get(kind, {}).get("peers", {}))
            if kind in by_backend.get("cudnn", {}):
                measured["cudnn in this run"] = by_backend["cudnn"][kind]
            times = {
                peer: min(entry["ms"], entry.get("graph_ms", math.inf))
                for peer, entry in measured.items()
            }
            best = min(times, key=lambda peer: times[peer], default=None)
            peer_ms, name = (None, "") if best is None else (times[best], _peer_name(best))
            found.append(Comparison(case, kind, ms, backend, peer_ms, name))
    return found


def _peer_name(name: str) -> str:
    return next(text for prefix, text in PEER_NAMES.items() if name.startswith(prefix))


def geomean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def draw_speedup(figure: Any, documents: Any) -> None:
    results, peers = documents
    found = [each for each in comparisons(results, peers) if each.ratio is not None]
    cases = list(dict.fromkeys(each.case for each in found))
    cases.sort(key=lambda case: -geomean([e.ratio for e in found if e.case == case]))
    figure.set_size_inches(8.2, 5.0)
    axes = figure.subplots()
    for shift, kind in ((-0.2, "forward"), (0.2, "forward_backward")):
        for each in (each for each in found if each.kind == kind):
            color = RED if each.ratio < 1 else (BLUE if kind == "forward" else LIGHT)
            place = cases.index(each.case) + shift
            axes.barh(place, each.ratio - 1, 0.38, left=1, color=color)
            text, side = f"{each.ratio:.2f}", "left" if each.ratio >= 1 else "right"
            axes.text(each.ratio, place, f" {text} ", va="center", ha=side, fontsize=7)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.set_xlim(0.5, 16)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"times as fast as the best peer, {results['gpu']}, bfloat16")
    handles = [("forward", BLUE), ("forward and backward", LIGHT), ("slower", RED)]
    _legend(axes, handles)
    _bare(axes)


# Others


def draw_memory(figure: Any, documents: Any) -> None:
    (results,) = documents
    panels = figure.subplots(1, 2, sharey=True)
    for panel, kind in zip(panels, ("forward", "backward"), strict=True):
        cases = dict.fromkeys(each["case"] for each in results["cases"])
        for i, case in enumerate(case for case in cases if "rpb" not in case):
            points = [each for each in results["cases"] if each["case"] == case]
            panel.plot(
                [math.prod(each["tokens"]) for each in points],
                [each[kind] / 2**20 for each in points],
                marker="o",
                markersize=12 - 4 * i,
                label=case,
            )
        panel.set(xscale="log", yscale="log", xlabel="tokens", title=kind)
        _bare(panel)
    panels[0].set_ylabel(f"MiB, results included, {results['heads']} heads of {results['dim']}")
    panels[0].legend(frameon=False)


def draw_scaling(figure: Any, documents: Any) -> None:
    (results,) = documents
    panels = figure.subplots(2, 2).ravel()
    figure.set_size_inches(8.2, 6.4)
    for panel, (name, points) in zip(panels, results["series"].items(), strict=True):
        by_tokens = name.startswith("tokens")
        x = [math.prod(p["tokens"]) if by_tokens else p["kernel"] for p in points]
        for kind in points[0]["ms"]:
            panel.plot(x, [p["ms"][kind] for p in points], marker="o", label=kind)
        panel.set(xscale="log", yscale="log", title=name, ylabel="ms")
        panel.set_xlabel("tokens" if by_tokens else "kernel_size of an axis")
        _bare(panel)
    panels[0].legend(frameon=False)


def draw_host(figure: Any, documents: Any) -> None:
    (results,) = documents
    _bars(figure, results["microseconds"], "us from the call to its return")


def draw_loads(figure: Any, documents: Any) -> None:
    (results,) = documents
    bars = {
        f"{name}, {when}": times[when]
        for name, times in results["seconds"].items()
        for when in ("cold", "warm")
        if when in times
    }
    if bars:
        _bars(figure, bars, "seconds from the first call of a process to its result")
    else:
        _bars(figure, {f"{n} ({i})": f + m for i, (n, f, m) in enumerate(results["kernels_ms"])},
              "ms until a kernel on disk is loaded")  # fmt: skip


def _bars(figure: Any, values: dict[str, float], label: str) -> None:
    axes = figure.subplots()
    axes.barh(list(values), list(values.values()), color=BLUE)
    for place, value in enumerate(values.values()):
        axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    _bare(axes)


def draw_paper_grid(figure: Any, documents: Any) -> None:
    from paper_grid import draw

    (results,) = documents
    figure.set_size_inches(13, 4)
    draw(figure, results["problems"])


def _legend(axes: Any, handles: list[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=color, label=text) for text, color in handles]
    axes.legend(handles=patches, loc="lower right", frameon=False)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


FIGURES_BY_NAME = {
    "speedup.png": Figure((RESULTS / "h200.json", PEERS), draw_speedup),
    "memory.png": Figure((RESULTS / "memory.json",), draw_memory),
    "paper-grid.png": Figure((RESULTS / "paper-grid.json",), draw_paper_grid),
    "scaling.png": Figure((RESULTS / "scaling.json",), draw_scaling),
    "host.png": Figure((RESULTS / "host.json",), draw_host),
    "loads.png": Figure((RESULTS / "loads.json",), draw_loads),
}


if __name__ == "__main__":
    main()
