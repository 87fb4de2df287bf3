"""How the numbers of arrays are stored, which loops widen as they read them and narrow again."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cuneigh._backends.cpu.compiled.vectors import INT16, INT32, Value, Vectors
from cuneigh._problem import DTYPES


def itemsize(dtype: str) -> int:
    return DTYPES[dtype]


def pointer(v: Vectors, address: Value, dtype: str) -> Value:
    """What is stored at an address."""
    kind = INT16 if DTYPES[dtype] == 2 else v.number
    return v.builder.inttoptr(address, kind.as_pointer())


def load(v: Vectors, stored: Value, index: Value | int, count: int, dtype: str) -> Value:
    """The vector of the `count` numbers from `index` on, and zeros."""
    vector, b = v.load(stored, index, count), v.builder
    if dtype == "float16":
        return b.fpext(b.bitcast(vector, ir.VectorType(ir.HalfType(), v.lanes)), v.type)
    if dtype == "bfloat16":  # the upper half of a float32
        return b.bitcast(b.shl(b.zext(vector, v.integers), v.splat(INT32(16))), v.type)
    return vector


def store(
    v: Vectors, vector: Value, stored: Value, index: Value | int, count: int, dtype: str
) -> None:
    """Store the first `count` numbers of `vector`, rounded to the nearest, from `index` on."""
    b = v.builder
    if dtype == "float16":
        halves = b.fptrunc(vector, ir.VectorType(ir.HalfType(), v.lanes))
        vector = b.bitcast(halves, ir.VectorType(INT16, v.lanes))
    elif dtype == "bfloat16":
        vector = _rounded(v, vector)
    v.store(vector, stored, index, count)


def _rounded(v: Vectors, vector: Value) -> Value:
    """The upper halves of float32 numbers, to the nearest, to the even one of two; NaN of NaN."""
    b = v.builder
    sixteen, one, below_half, quiet = (v.splat(INT32(i)) for i in (16, 1, 0x7FFF, 0x7FC0))
    bits: Any = b.bitcast(vector, v.integers)
    is_odd = b.and_(b.lshr(bits, sixteen), one)
    upper = b.lshr(b.add(bits, b.add(below_half, is_odd)), sixteen)
    upper = b.select(b.fcmp_unordered("uno", vector, vector), quiet, upper)
    return b.trunc(upper, ir.VectorType(INT16, v.lanes))
