"""The page that says what a window of w means: its rows of cuneigh are computed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuneigh
from cuneigh import windows
from cuneigh.windows import Meaning, Same

PAGE = Path(__file__).parents[1] / "docs" / "windows.md"
LENGTH, QUERY = 16, 8


def keys_of(query: int, same: Same, border: Any = "shift") -> list[int]:
    """The keys that a query sees here, found by one-hot values."""
    value = np.eye(LENGTH)[None, :, None]
    zeros = np.zeros((1, LENGTH, 1, 1))
    output = cuneigh.na1d(zeros, zeros, value, *same[:2], is_causal=same.is_causal, border=border)
    return np.flatnonzero(output[0, query, 0]).tolist()


def listed(text: str) -> list[int]:
    """The keys of an entry such as 5..11, or 8, or 14, 15, 0, in ascending order."""
    keys = []
    for part in text.split(", "):
        first, last = (part.split("..") * 2)[:2]
        keys += range(int(first), int(last) + 1)
    return sorted(keys)


@pytest.mark.parametrize("meaning", windows.TABLE, ids=lambda meaning: meaning.argument)
def test_what_is_said_to_be_the_same_is(meaning: Meaning) -> None:
    assert not meaning.here or any(meaning.same)
    for text, same in zip((meaning.three, meaning.four, meaning.causal), meaning.same, strict=True):
        if same is not None:
            assert keys_of(QUERY, same) == listed(text)
    four = meaning.same[1]
    if four is not None and re.fullmatch(r"\d+(\.\.\d+|(, \d+)+)?", meaning.first):
        border = "shift" if four.is_causal else meaning.border
        assert keys_of(0, four, border) == listed(meaning.first)


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == windows.markdown()


def test_help_shows_it() -> None:
    import pydoc

    text = pydoc.plain(pydoc.render_doc("cuneigh.windows"))
    assert "Keras 3.15.1" in text
    assert "Convert the number; never pass it through." in text
