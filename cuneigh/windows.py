"""What a window of w means, library by library; `help` shows the page that is made of `TABLE`."""

from __future__ import annotations

from typing import NamedTuple


class Same(NamedTuple):
    """The arguments of `na1d` that give the same keys."""

    kernel_size: int
    stride: int = 1
    is_causal: bool = False


Three = tuple[Same | None, Same | None, Same | None]


class Meaning(NamedTuple):
    """What one library makes of the number w: keys of a row of 16, first to last."""

    argument: str
    """The library, its version and its argument."""
    three: str
    """Of query 8 for w = 3."""
    four: str
    """Of query 8 for w = 4."""
    first: str
    """Of query 0 for w = 4."""
    causal: str
    """Of query 8 in the causal form, for w = 4."""
    here: str
    """Which arguments say the same here."""
    same: Three
    """These arguments for w = 3, w = 4, and the causal form of w = 4; None where there are none."""
    border: str = "cut"
    """The `border` that does what is done at the ends of the row; "none" if there is none."""


def centered(three: int, four: int, causal: int | None = None) -> Three:
    """The arguments for these kernel sizes."""
    return Same(three), Same(four), None if causal is None else Same(causal, is_causal=True)


def always_causal(three: int, four: int) -> Three:
    """The same of a window that is always causal."""
    of_three, of_four = (Same(size, is_causal=True) for size in (three, four))
    return of_three, of_four, of_four


TABLE = (
    Meaning(
        "cuneigh, `kernel_size=w`", "7..9", "6..9", "0..3", "5..8",
        "", centered(3, 4, 4), border="shift",
    ),
    Meaning(
        "NATTEN 0.15 to 0.17 on a CPU, `kernel_size=w`", "7..9", "error: odd only",
        "w = 3: 0..2", "w = 3: 6..8 (0.17)", "kernel_size w", (Same(3), None, None), border="shift",
    ),
    Meaning(
        "NATTEN 0.14.6, `natten1dqkrpb`", "7..9", "6..9", "0..3", "none",
        "odd w: kernel_size w; even w: none, for its last queries miss the last key",
        centered(3, 4), border="shift",
    ),
    Meaning(
        "JAX 0.10.2, `local_window_size=w`", "5..11", "4..12", "0..4", "4..8",
        "kernel_size 2w + 1; causal: w + 1", centered(7, 9, 5),
    ),
    Meaning(
        "JAX `local_window_size=(w, w)`, causal `(w, 0)`; xformers 0.0.35 "
        "`LocalAttentionFromBottomRightMask`; FlashAttention-4 (4.0.0b36) `window_size`",
        "5..11", "4..12", "0..4", "4..8",
        "(l, r) with l = r or l = r + 1: kernel_size l + r + 1; r = 0: l + 1, causal",
        centered(7, 9, 5),
    ),
    Meaning(
        "xformers 0.0.35, `LowerTriangularFromBottomRightLocalAttentionMask(w)`",
        "6..8", "5..8", "0", "5..8", "kernel_size w, causal", always_causal(3, 4),
    ),
    Meaning(
        "Keras 3.15.1, `MultiHeadAttention(sliding_window=w)`", "6..10", "5..11", "0..3", "5..8",
        "kernel_size 2w - 1; causal: w", centered(5, 7, 4),
    ),
    Meaning(
        "KerasHub 0.32.0, Gemma and Mistral", "6..8", "5..8", "0", "5..8",
        "kernel_size w, causal", always_causal(3, 4),
    ),
    Meaning(
        "KerasHub 0.32.0, GPT-OSS and T5Gemma's decoder", "5..8", "4..8", "0", "4..8",
        "kernel_size w + 1, causal", always_causal(4, 5),
    ),
    Meaning(
        "KerasHub 0.32.0, Gemma3, bidirectional", "7..9", "7..10", "0..2", "none",
        "odd w: kernel_size w; even w: the same on arrays flipped along the axis",
        (Same(3), None, None),
    ),
    Meaning(
        "transformers 5.24.0, sliding window", "6..8", "5..8", "0", "5..8",
        "kernel_size w, causal", always_causal(3, 4),
    ),
    Meaning(
        "transformers 5.24.0, sliding window, bidirectional", "5..11", "4..12", "0..4", "none",
        "kernel_size 2w + 1", centered(7, 9),
    ),
    Meaning(
        "transformers 5.24.0, chunked", "6..8", "8", "0", "8",
        "kernel_size w, stride w, causal, where w divides the length",
        (None, Same(4, 4, True), Same(4, 4, True)),
    ),
    Meaning(
        "transformers 5.24.0, Longformer, `attention_window=w`", "error: even only", "6..10",
        "0..2", "none", "kernel_size w + 1", (None, Same(5), None),
    ),
    Meaning(
        "anemoi-models 0.19.0, `window_size=w`, SDPA", "5..11", "4..12", "0..4",
        "is_causal is ignored", "kernel_size 2w + 1", centered(7, 9),
    ),
    Meaning(
        "local-attention 1.11.2, `LocalAttention(w)`", "3..11", "4..15", "0..7", "4..8",
        "kernel_size 3w, stride w; causal: 2w, stride w; where w divides the length",
        (None, Same(12, 4), Same(8, 4, True)),
    ),
    Meaning(
        "local-attention 1.11.2, `exact_windowsize=True`", "5..11", "4..12", "0..4", "4..8",
        "kernel_size 2w + 1; causal: w + 1", centered(7, 9, 5),
    ),
    Meaning(
        "SciPy 1.17.1, `uniform_filter1d(w)`, mode wrap", "7..9", "6..9", "14, 15, 0, 1", "none",
        "kernel_size w", centered(3, 4), border="wrap",
    ),
    Meaning(
        "SciPy, mode constant", "7..9", "6..9", "0, 1", "none",
        "kernel_size w, but near the borders the sum is divided by w all the same", centered(3, 4),
    ),
    Meaning(
        "SciPy, mode reflect; dask-image 2026.5.0", "7..9", "6..9", "0 twice, 1 twice", "none",
        "kernel_size w far from the borders, where it counts keys twice", centered(3, 4),
        border="none",
    ),
    Meaning(
        "OpenCV 5.0.0, `fastNlMeansDenoising`, searchWindowSize w", "7..9", "6..10",
        "0, 1 twice, 2 twice", "none", "kernel_size 2 (w // 2) + 1 far from the borders",
        centered(3, 5), border="none",
    ),
)  # fmt: skip
"""As seen by running the libraries on CPUs with one-hot values, in November 2026."""

INTRODUCTION = """\
What a window of w means, library by library: the keys that query 8 of a row of 16 sees for w = 3
and for w = 4, what query 0 sees for w = 4, and query 8 in the causal form. "5..11" is 5 to 11, both
included. "In cuneigh" are the arguments of `cuneigh.na1d` that give the same keys, near the ends
with `border` as in the last column."""

RULES = """\
- There are four meanings of one number: w keys (causal in transformers, xformers, Gemma, Mistral),
  w + 1 (causal in JAX, exact local-attention, GPT-OSS), 2w - 1 (Keras) and 2w + 1 (JAX,
  anemoi-models, `(w, w)`). Convert the number; never pass it through.
- An even window of cuneigh has one key more before the query than after it, as in SciPy and NATTEN.
  KerasHub's Gemma3 has one more after it, OpenCV rounds up, and Longformer wants even numbers and
  sees one key more.
- At the borders cuneigh's windows are shifted inwards, as NATTEN's are, so that every query sees as
  many keys, unless `border` is given. All other attention libraries here cut them: there the first
  and last queries see fewer keys, as here with `border="cut"`. Causal windows are cut in all of
  them, here too, whatever the border.
- `(l, r)` with other l and r than in the table has no counterpart: its window is not centered.
- Where lengths of queries and keys differ, xformers and FlashAttention align the ends.
- -1 stands for unlimited in anemoi-models, and (-1, -1) for no window in FlashAttention-4, which
  takes any other negative number as it stands; xformers and Keras refuse negative numbers."""

COLUMNS = ("", "w = 3", "w = 4", "query 0, w = 4", "causal, w = 4", "in cuneigh", "border")


def markdown() -> str:
    """The page, with the table in Markdown."""
    rows = [
        COLUMNS,
        ("---",) * len(COLUMNS),
        *((*meaning[:6], meaning.border) for meaning in TABLE),
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"# What a window of w means\n\n{INTRODUCTION}\n\n{table}\n\n{RULES}\n"


def page() -> str:
    """The page for ``help("cuneigh.windows")``, without a table wider than a terminal."""
    entries = [
        f"{meaning.argument}\n    w = 3: {meaning.three}; w = 4: {meaning.four}; query 0: "
        f"{meaning.first}; causal: {meaning.causal}; border: {meaning.border}"
        + (f"\n    in cuneigh: {meaning.here}" if meaning.here else "")
        for meaning in TABLE
    ]
    return "\n\n".join((INTRODUCTION, *entries, RULES))


__doc__ = page()
