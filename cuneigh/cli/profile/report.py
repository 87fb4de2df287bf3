"""What `profile` finds out, printed for people."""

from __future__ import annotations

from typing import Any

from cuneigh.cli.profile.document import KINDS
from cuneigh.cli.terminal import print_table


def print_heading(made: dict[str, Any]) -> None:
    """Where the figures come from."""
    about = {name: value for name, value in made.items() if isinstance(value, str)}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    ceilings = made["ceilings"]
    print(
        f"100 % are {ceilings['product_tflops']:.4g} TFLOP/s of a matrix product and "
        f"{ceilings['copy_gbps']:.4g} GB/s of a copy, measured just now"
    )


def print_case(entry: dict[str, Any], ceilings: dict[str, float]) -> None:
    """The table of one case: operations in GFLOP/s where the machine reaches less than one T."""
    unit, factor = ("TFLOP/s", 1.0) if ceilings["product_tflops"] >= 1 else ("GFLOP/s", 1e3)
    columns = ("", "ms", "quartiles", "x", unit, "", "GB/s", "", "peak MiB")
    _print_title(entry)
    for row in entry.get("tuned", ()):
        _print_tuned(row)
    for title, rows in _by_kind(entry):
        timed = sorted((row for row in rows if "ms" in row), key=_best)
        lines = [_line(row, _best(timed[0]), factor) for row in timed]
        print(f"\n{title}")
        print_table(columns, [*lines, *([text] for text in _remarks(rows))])


def _print_tuned(row: dict[str, Any]) -> None:
    """What tuning has found for one operation."""
    if row["backend"] == row["planner_backend"] and not row["plans"]:
        found = "the planner's own choice is the fastest"
    else:
        found = f"{row['gain']:.1%} faster than the planner's choice, and kept"
    times = f"{_digits(row['tuned_ms'])} ms, the planner's {_digits(row['planner_ms'])} ms"
    print(f"tuned {row['operation']}: {row['backend']}, {times}: {found} ({row['tried']} tried)")
    for text in [*row["plans"].values(), *(f"left out: {each}" for each in row["failed"])]:
        print(f"    {text}")


def print_calibration(made: dict[str, Any]) -> None:
    """What was fitted to a GPU."""
    print(
        f"{made['device']}: {made['measured']} calls measured in {made['seconds']:.0f} s; "
        "the rates are kept, and later calls are planned by them"
    )
    for text in made["failed"]:
        print(f"left out: {text}")
    print()
    rows = []
    for backend in made["backends"]:
        before, after = (f"{backend[f'error_{when}']:.1%}" for when in ("before", "after"))
        rows.append([backend["name"], str(backend["measured"]), before, after])
    print_table(("predictions err by", "calls", "before", "now"), rows)
    print()
    rows = []
    for backend in made["backends"]:
        for path, rate in backend["rates"].items():
            default, fitted = rate["default"], rate["fitted"]
            if rate["seen"]:
                share = f"{fitted / default:.2f}" if default else ""
                name = f"{backend['name']} {path}"
                rows.append([name, f"{default:.4g}", f"{fitted:.4g}", share])
    print_table(("rate", "H200", "here", "here / H200"), rows)
    print()
    for when, cost in (("before", made["choices"]["before"]), ("now", made["choices"]["after"])):
        print(
            f"{when} the choice for {cost['operations']} operations is {cost['mean']:.1%} slower "
            f"than the best measured, at worst {cost['worst']:.1%} ({cost['worst_call']})"
        )


def _by_kind(entry: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of each kind that there is, under its title."""
    of_kind = {
        title: [row for row in entry["rows"] if row["kind"] == kind]
        for kind, title in KINDS.items()
    }
    return [(title, rows) for title, rows in of_kind.items() if rows]


def _best(row: dict[str, Any]) -> float:
    ms: float = min(each for each in (row["ms"], row["graph_ms"]) if each is not None)
    return ms


def _line(row: dict[str, Any], fastest: float, factor: float) -> list[str]:
    """The cells of a row that has times."""
    peak = row["peak_bytes"]
    return [
        _name(row),
        _digits(_best(row)),
        f"{_digits(row['low'])} to {_digits(row['high'])}",
        f"{_best(row) / fastest:.2f}",
        _digits(factor * row["tflops"]),
        f"{row['tflops_share']:.0%}",
        _digits(row["gbps"]),
        f"{row['gbps_share']:.0%}",
        "" if peak is None else f"{peak / 2**20:.1f}",
    ]


def _name(row: dict[str, Any]) -> str:
    name: str = row["name"]
    return f"{name} (chosen)" if row.get("chosen") else name


def _remarks(rows: list[dict[str, Any]]) -> list[str]:
    """What is to be said of rows in words; what is the same for several is said once."""
    said: dict[str, list[str]] = {}
    for row in rows:
        texts = [f"{pass_}: {plan}" for pass_, plan in row.get("plans", {}).items()]
        texts += [row[key] for key in ("note", "reason") if key in row]
        texts += [f"ERROR: {row['error']}"] if "error" in row else []
        for text in texts:
            said.setdefault(text, []).append(row["name"])
    return [f"{', '.join(names)}: {text}" for text, names in said.items()]


def print_dry_run(made: dict[str, Any]) -> None:
    """What every backend would do."""
    print(f"on {made['device']}, nothing is run")
    for entry in made["cases"]:
        _print_title(entry)
        for title, rows in _by_kind(entry):
            lines = [
                [_name(row), f"{_digits(row['predicted_ms'])} ms"]
                for row in rows
                if "predicted_ms" in row
            ]
            print(f"\n{title}")
            print_table(("", "predicted"), [*lines, *([text] for text in _remarks(rows))])


def _print_title(entry: dict[str, Any]) -> None:
    name = f"{entry['name']}: " if entry["name"] else ""
    print(f"\n{name}{entry['problem']}")


def _digits(number: float) -> str:
    """Three significant digits or all before the point."""
    if number >= 100:
        return f"{number:.0f}"
    return f"{number:.2f}" if number >= 10 else f"{number:.3f}" if number >= 1 else f"{number:.4f}"
