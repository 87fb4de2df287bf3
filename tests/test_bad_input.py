"""Illegal input: the right exception, which names what is wrong, before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from helpers.illegal import Call, illegal_calls, legal_calls, placeholder
from hypothesis import given
from hypothesis import strategies as st

import cuneigh
from cuneigh import _call
from cuneigh._frameworks.numpy import NumPyAdapter
from cuneigh._problem import Spec


@contextmanager
def nothing_allocated() -> Iterator[None]:
    """Fails the test when a backend is asked for or an array is made."""
    with (
        mock.patch.object(_call, "choose", side_effect=AssertionError("chose a backend")),
        mock.patch.object(NumPyAdapter, "empty", side_effect=AssertionError("allocated")),
        mock.patch.object(NumPyAdapter, "full", side_effect=AssertionError("allocated")),
        mock.patch.object(NumPyAdapter, "cast", side_effect=AssertionError("allocated")),
    ):
        yield


def run(call: Call) -> Any:
    arguments = {
        name: placeholder(value) if isinstance(value, Spec) else value
        for name, value in call.arguments.items()
    }
    return getattr(cuneigh, call.function)(**arguments)


@given(illegal_calls())
def test_every_illegal_call_is_refused(illegal):
    with nothing_allocated(), pytest.raises(illegal.error) as caught:
        run(illegal.call)
    message = str(caught.value)
    assert message.startswith(f"{illegal.call.function}: ")
    for word in illegal.words:
        assert word in message, message


@given(legal_calls())
def test_the_calls_that_are_broken_were_legal(call):
    run(call)


# What is not an array, or not of a kind that can be used


class Measured(np.ndarray):
    """A NumPy array that means more than its elements, such as a quantity with a unit."""


class WithUnit:
    """What NumPy can make an array of, and no array itself."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.ones((1, 5, 1, 1))


def not_arrays() -> st.SearchStrategy[tuple[Any, str]]:
    """Something in place of an array, and how the error calls it."""
    return st.sampled_from(
        [
            ([[1.0]], "list"),
            ((1.0,), "tuple"),
            (1.0, "float"),
            (True, "bool"),
            ("query", "str"),
            (memoryview(b"1234"), "memoryview"),
            (np.float32(1), "numpy.float32"),
            (np.ma.ones((1, 5, 1, 1)), "numpy.ma.MaskedArray"),
            (np.ones((1, 5)).view(np.matrix), "numpy.matrix"),
            (np.random.default_rng(0), "numpy.random._generator.Generator"),
            (np.ones((1, 5, 1, 1)).view(Measured), "Measured"),
            (WithUnit(), "WithUnit"),
        ]
    )


def array_arguments(call: Call) -> list[str]:
    return sorted(name for name, value in call.arguments.items() if isinstance(value, Spec))


@given(legal_calls(), not_arrays(), st.data())
def test_only_arrays_are_arrays(call, odd, data):
    value, kind = odd
    name = data.draw(st.sampled_from(array_arguments(call)))
    words = f"{call.function}: {name} is of type .*{re.escape(kind)}; .*array is needed"
    with nothing_allocated(), pytest.raises(TypeError, match=words):
        run(call.but(**{name: value}))


@pytest.mark.parametrize(
    "odd",
    [[[1.0]], memoryview(b"12"), WithUnit(), np.ma.ones(3)],
    ids=lambda odd: type(odd).__name__,
)
def test_an_error_says_how_to_make_an_array_of_something(odd):
    with pytest.raises(TypeError, match=r"query is of type .*pass numpy\.asarray\(query\)"):
        cuneigh.na1d(odd, odd, odd, 3)


@given(legal_calls(), st.data())
def test_required_arrays_cannot_be_none(call, data):
    optional = {"additional_keys", "additional_values", "rpb", "grad_lse"}
    name = data.draw(st.sampled_from([*set(array_arguments(call)) - optional]))
    words = f"{call.function}: {name} is of type NoneType; .*array is needed"
    with nothing_allocated(), pytest.raises(TypeError, match=words):
        run(call.but(**{name: None}))


@pytest.mark.parametrize(
    "dtype",
    [
        *("bool", "int8", "int64", "uint16", "complex64", "object", "datetime64[s]", "S4"),
        *(ml_dtypes.float8_e4m3fn, ml_dtypes.int4, [("x", "f4")]),
        *(">f2", ">f4", ">f8"),
        pytest.param(
            "longdouble",
            marks=pytest.mark.skipif(np.longdouble(0).itemsize == 8, reason="is float64"),
        ),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(dtype):
    query = np.zeros((1, 9, 1, 4), dtype)
    words = f"query has dtype {re.escape(str(query.dtype))}, which is not one of float16, bfloat16"
    with nothing_allocated(), pytest.raises(TypeError, match=words):
        cuneigh.na1d(query, query, query, 3)


def test_a_saved_bfloat16_is_recognized(tmp_path):
    np.save(tmp_path / "query.npy", np.zeros((1, 9, 1, 4), ml_dtypes.bfloat16))
    query = np.load(tmp_path / "query.npy")
    words = r"na1d: query has dtype \|V2, .*pass query\.view\(ml_dtypes\.bfloat16\)"
    with pytest.raises(TypeError, match=words):
        cuneigh.na1d(query, query, query, 3)
    query = query.view(ml_dtypes.bfloat16)
    assert cuneigh.na1d(query, query, query, 3).dtype == ml_dtypes.bfloat16


def test_a_scale_beyond_the_precision_of_the_sums_is_refused():
    for scale in (1e39, -3.5e38):
        words = f"na1d: scale={re.escape(str(scale))} .*float32"
        with nothing_allocated(), pytest.raises(ValueError, match=words):
            cuneigh.na1d(QUERY, QUERY, QUERY, 3, scale=scale)
    wide = QUERY.astype("float64")
    assert not cuneigh.na1d(wide, wide, wide, 3, scale=1e39).any()
    assert not cuneigh.na1d(QUERY, QUERY, QUERY, 3, scale=3e38).any()


def test_sparse_matrices_are_refused():
    sparse = pytest.importorskip("scipy.sparse")
    query = np.zeros((1, 9, 1, 4), np.float32)
    matrix = sparse.csr_array(np.eye(3, dtype=np.float32))
    with pytest.raises(TypeError, match=r"key is of type scipy\.sparse.*csr_array; .*needed"):
        cuneigh.na1d(query, matrix, query, 3)


# The other arguments


QUERY = np.zeros((1, 9, 1, 4), np.float32)


@pytest.mark.parametrize("value", [1, 0, None, "yes", np.zeros(1, bool)], ids=repr)
def test_flags_must_be_bools(value):
    words = re.escape(f"={value!r} is {type(value).__name__}, not a bool")
    with nothing_allocated():
        with pytest.raises(TypeError, match=f"na1d: return_lse{words}"):
            cuneigh.na1d(QUERY, QUERY, QUERY, 3, return_lse=value)
        with pytest.raises(TypeError, match=f"attention: return_lse{words}"):
            cuneigh.attention(QUERY, QUERY, QUERY, return_lse=value)
        with pytest.raises(TypeError, match=f"attention: is_causal{words}"):
            cuneigh.attention(QUERY, QUERY, QUERY, is_causal=value)


def test_long_values_are_not_repeated_as_a_whole():
    array = np.zeros((1, 9, 1, 4))
    long = "x" * 10**6
    for arguments in (
        {"kernel_size": long},
        {"kernel_size": (3,) * 10**6},
        {"kernel_size": 10**5000},
        {"kernel_size": 3, "stride": -(10**5000)},
        {"kernel_size": 3, "stride": 10**5000},
        {"kernel_size": 3, "scale": 10**5000},
        {"kernel_size": 3, "scale": long},
        {"kernel_size": 3, "is_causal": long},
        {"kernel_size": 3, "backend": long},
        {"kernel_size": 3, "backend": [long]},
    ):
        name = list(arguments)[-1]
        with pytest.raises((TypeError, ValueError), match=f"na1d: {name}=") as error:
            cuneigh.na1d(array, array, array, **arguments)
        assert len(str(error.value)) < 1500


@pytest.mark.parametrize("name", ["kernel_size", "stride", "dilation", "is_causal"])
def test_an_array_in_place_of_a_tuple_is_refused(name):
    array = np.zeros((1, 9, 9, 1, 4))
    arguments = {"kernel_size": 3} | {name: np.ones(2, bool if name == "is_causal" else int)}
    with pytest.raises(TypeError, match=rf"na2d: {name}=array\(.* a tuple with an entry for each"):
        cuneigh.na2d(array, array, array, **arguments)


def test_what_no_backend_can_run_names_the_call():
    array = np.zeros((1, 9, 1, 4))
    for call in (cuneigh.na1d_qk, cuneigh.na1d_av):
        given = (array, array) if call is cuneigh.na1d_qk else (array[..., :3], array)
        with pytest.raises(RuntimeError, match=f"^{call.__name__}: no backend can run this"):
            call(*given, 3, backend="naive")


@pytest.mark.parametrize("value", [0, True, b"cpu", ["cpu"]], ids=repr)
def test_a_backend_is_named_by_a_string(value):
    words = re.escape(f"na1d: backend={value!r} is {type(value).__name__}, not a str")
    with nothing_allocated(), pytest.raises(TypeError, match=words):
        cuneigh.na1d(QUERY, QUERY, QUERY, 3, backend=value)


def test_an_array_with_heads_first_gets_a_hint():
    first = np.zeros((1, 4, 14, 16, 8))
    with pytest.raises(
        ValueError, match=r"axis 0 is 7, which exceeds .* 4 \(arrays are heads-last"
    ):
        cuneigh.na2d(first, first, first, 7)
    with pytest.raises(ValueError, match=r"is 15, which exceeds that axis's length 4$"):
        cuneigh.na2d(first, first, first, 15)


def test_a_call_without_a_window_names_the_function():
    with pytest.raises(TypeError, match=r"na1d\(\) missing .*'kernel_size'"):
        cuneigh.na1d(QUERY, QUERY, QUERY)


# An array for a scale


@pytest.mark.parametrize(
    ("scale", "error", "words"),
    [
        (np.ones(1), ValueError, r"scale has shape \(1,\); a number or a 0-d array is needed"),
        (np.array(True), TypeError, "scale has dtype bool, which is not one of float16"),
        (np.array(1j), TypeError, "scale has dtype complex128, which is not one of float16"),
        (np.array(np.nan), ValueError, "scale=nan is not finite"),
        (np.array(1e39), ValueError, r"scale=1e\+39 is not finite in float32"),
    ],
)
def test_what_is_no_scale(scale, error, words):
    with nothing_allocated(), pytest.raises(error, match=f"na1d: {words}"):
        cuneigh.na1d(QUERY, QUERY, QUERY, 3, scale=scale)


# Merging


OUTPUT, LSE = np.zeros((2, 5, 3), np.float32), np.zeros((2, 5), np.float32)


@pytest.mark.parametrize(
    ("outputs", "lses", "error", "words"),
    [
        (OUTPUT, [LSE], TypeError, "outputs is of type numpy.ndarray; a tuple or list of arrays"),
        ([OUTPUT], LSE, TypeError, "lses is of type numpy.ndarray; a tuple or list of arrays"),
        ([OUTPUT], iter([LSE]), TypeError, "lses is of type list_iterator; a tuple or list"),
        ([], [], ValueError, "0 outputs and 0 lses"),
        ([OUTPUT] * 2, [LSE], ValueError, "2 outputs and 1 lses"),
        ([OUTPUT, None], [LSE] * 2, TypeError, "outputs[1] is of type NoneType"),
        ([OUTPUT], [[LSE]], TypeError, "lses[0] is of type list"),
        ([OUTPUT.astype(int)], [LSE], TypeError, "outputs[0] has dtype int64"),
        (
            [OUTPUT] * 2,
            [LSE, LSE.astype("f2")],
            TypeError,
            "lses[1] has dtype float16",
        ),
        ([OUTPUT.astype("f8")], [LSE], TypeError, "lses[0] has dtype float32, but float64"),
        ([OUTPUT, OUTPUT.astype("f2")], [LSE] * 2, TypeError, "outputs[1] has dtype float16"),
        ([OUTPUT, OUTPUT[:1]], [LSE] * 2, ValueError, "outputs[1] has size 1 on axis 0, but 2"),
        ([OUTPUT, OUTPUT[0]], [LSE] * 2, ValueError, "outputs[1] has 2 axes, but 3 are needed"),
        ([OUTPUT], [LSE[:, :4]], ValueError, "lses[0] has size 4 on axis 1, but 5 is needed"),
        ([OUTPUT], [OUTPUT], ValueError, "lses[0] has 3 axes, but 2 are needed"),
        ([np.array(0.0)], [np.array(0.0)], ValueError, "outputs[0] has 0 axes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_merged(outputs, lses, error, words):
    words = "merge_attentions: .*" + re.escape(words)
    with nothing_allocated(), pytest.raises(error, match=words):
        cuneigh.merge_attentions(outputs, lses)
