"""Vector instructions, written in LLVM's language by the functions of `steps`.

Numba's own loops over a few dozen numbers are not made of vector instructions that keep sums in
registers, which is what products of small matrices are about. LLVM divides a vector that the
processor lacks into those that it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils

INT16, INT32, INT64 = (ir.IntType(bits) for bits in (16, 32, 64))
Value = Any
"""A value of LLVM's: an integer, a number, a vector or a pointer."""

LAST_POWER = {32: 7, 64: 13}
"""By the bits of a number, where the power series of 2**x may end, for x up to 1/2."""
LARGEST_POWER = {32: 126.0, 64: 1022.0}
"""Exponentials are no larger than this power of 2, and 0 below its opposite."""
FRACTION = {32: 23, 64: 52}
"""Bits of the fraction of a number."""


class Vectors:
    """Vectors of `lanes` numbers of `bits` bits, in one function that LLVM is to compile."""

    def __init__(self, builder: Any, bits: int, lanes: int) -> None:
        self.builder, self.bits, self.lanes = builder, bits, lanes
        self.number = ir.FloatType() if bits == 32 else ir.DoubleType()
        self.type = ir.VectorType(self.number, lanes)
        self.integers = ir.VectorType(ir.IntType(bits), lanes)
        self._name = f"v{lanes}f{bits}"

    # Constants and memory

    def constant(self, number: float) -> Value:
        return ir.Constant(self.type, [self.number(number)] * self.lanes)

    def pointer(self, address: Value) -> Value:
        """The numbers at an address."""
        return self.builder.inttoptr(address, self.number.as_pointer())

    def element(self, numbers: Value, index: Value | int) -> Value:
        """A pointer to the number at `index`, from a pointer to the first one."""
        return self.builder.gep(numbers, [INT64(index) if isinstance(index, int) else index])

    def parts(self, dim: int) -> list[tuple[int, int]]:
        """The vectors of a row of `dim` numbers: where each begins, and its numbers."""
        return [(i, min(self.lanes, dim - i)) for i in range(0, dim, self.lanes)]

    def load(self, numbers: Value, index: Value | int, count: int | None = None) -> Value:
        """The vector at `index`; of the first `count` numbers, and zeros."""
        kind = numbers.type.pointee
        where, vector = self._at(numbers, index)
        if count in (None, self.lanes):
            return self.builder.load(where, align=_bytes(kind))
        zeros = ir.Constant(vector, [kind(0)] * self.lanes)
        name = f"llvm.masked.load.{self._name_of(kind)}.p0"
        return self._call(name, vector, where, INT32(_bytes(kind)), self._first(count), zeros)

    def store(
        self, vector: Value, numbers: Value, index: Value | int, count: int | None = None
    ) -> None:
        """Store the vector at `index`; its first `count` numbers."""
        kind = numbers.type.pointee
        where, _ = self._at(numbers, index)
        if count in (None, self.lanes):
            self.builder.store(vector, where, align=_bytes(kind))
            return
        name = f"llvm.masked.store.{self._name_of(kind)}.p0"
        arguments = vector, where, INT32(_bytes(kind)), self._first(count)
        self._call(name, ir.VoidType(), *arguments)

    def prefetch(self, address: Value) -> None:
        """Have the cache line at an address in the first-level cache."""
        where = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        read, close, data = INT32(0), INT32(3), INT32(1)
        self._call("llvm.prefetch.p0", ir.VoidType(), where, read, close, data)

    def _at(self, numbers: Value, index: Value | int) -> tuple[Value, Any]:
        vector = ir.VectorType(numbers.type.pointee, self.lanes)
        return self.builder.bitcast(self.element(numbers, index), vector.as_pointer()), vector

    def _name_of(self, kind: Any) -> str:
        return self._name if kind == self.number else f"v{self.lanes}{kind}"

    def _first(self, count: int | None) -> Value:
        bit = ir.IntType(1)
        return ir.Constant(
            ir.VectorType(bit, self.lanes), [bit(i < (count or 0)) for i in range(self.lanes)]
        )

    # Arithmetic

    def splat(self, number: Value) -> Value:
        """A vector of one number, or integer."""
        undefined = ir.Constant(ir.VectorType(number.type, self.lanes), ir.Undefined)
        vector = self.builder.insert_element(undefined, number, INT32(0))
        return self._shuffled(vector, vector, [0] * self.lanes)

    def plus_product(self, total: Value | None, a: Value, b: Value) -> Value:
        """``total + a * b``, rounded once; the product alone for a total of None."""
        if total is None:
            return self.builder.fmul(a, b)
        return self._call(f"llvm.fma.{self._name}", self.type, a, b, total)

    def _shuffled(self, a: Value, b: Value, indices: Sequence[int]) -> Value:
        mask = ir.Constant(ir.VectorType(INT32, len(indices)), [INT32(i) for i in indices])
        return self.builder.shuffle_vector(a, b, mask)

    def sum(self, vector: Value) -> Value:
        name = f"llvm.vector.reduce.fadd.{self._name}"
        return self._call(name, self.number, self.number(0.0), vector, fastmath=("reassoc",))

    def larger(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def transposed(self, rows: list[Value]) -> list[Value]:
        """The columns of as many vectors as a vector has numbers."""
        rows, lanes = list(rows), range(self.lanes)
        step = 1
        while step < self.lanes:
            for i in (i for i in lanes if not i & step):
                a, b = rows[i], rows[i + step]
                upper = [j + self.lanes - step if j & step else j for j in lanes]
                lower = [j + self.lanes if j & step else j + step for j in lanes]
                rows[i], rows[i + step] = (self._shuffled(a, b, each) for each in (upper, lower))
            step *= 2
        return rows

    def is_true(self, mask: Value) -> Value:
        """Whether all of a vector of bits are set."""
        whole = ir.IntType(self.lanes)
        return self.builder.icmp_unsigned("==", self.builder.bitcast(mask, whole), whole(-1))

    def exponential(self, vector: Value, mask: Value) -> Value:
        """exp of the numbers in `mask`, 0 of the others; NaN of NaN, and what is too large is huge.

        It is 2**n * 2**r for the whole number n that is nearest to x / log(2), and the rest r.
        Adding a number that is so large that it has no fraction rounds to n, and leaves n in the
        lowest bits of the sum, whence it is moved to where numbers have their exponent.
        """
        b, fraction = self.builder, FRACTION[self.bits]
        least, most = (self.constant(sign * LARGEST_POWER[self.bits]) for sign in (-1.0, 1.0))
        power = b.fmul(vector, self.constant(1 / math.log(2)))
        power = b.select(b.fcmp_ordered(">", power, most), most, power)
        no_fraction = self.constant(1.5 * 2.0**fraction)
        rounded = b.fadd(power, no_fraction)
        rest = b.fsub(power, b.fsub(rounded, no_fraction))
        *others, last = [math.log(2) ** n / math.factorial(n) for n in range(LAST_POWER[self.bits])]
        series = self.constant(last)
        for coefficient in reversed(others):
            series = self.plus_product(self.constant(coefficient), series, rest)
        bias = self._whole(2 ** (self.bits - 2 - fraction) - 1)
        exponent = b.add(b.bitcast(rounded, self.integers), bias)
        scale = b.bitcast(b.shl(exponent, self._whole(fraction)), self.type)
        is_normal = b.and_(mask, b.fcmp_unordered(">=", power, least))
        return b.select(is_normal, b.fmul(series, scale), self.constant(0.0))

    def _whole(self, number: int) -> Value:
        return ir.Constant(self.integers, [ir.IntType(self.bits)(number)] * self.lanes)

    def _call(self, name: str, result: Any, *arguments: Value, fastmath: Any = ()) -> Value:
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, arguments, fastmath=fastmath)

    # Loops

    @contextmanager
    def steps(self, begin: Value, end: Value, step: int) -> Iterator[Value]:
        """A loop over ``range(begin, end, step)``."""
        with cgutils.for_range_slice(self.builder, begin, end, INT64(step)) as (index, _):
            yield index

    def variable(self, value: float) -> Value:
        """A vector that changes in a loop, where it is loaded and stored."""
        where = cgutils.alloca_once(self.builder, self.type)
        self.builder.store(self.constant(value), where)
        return where


def _bytes(kind: Any) -> int:
    """Those of a number of an LLVM type."""
    return {"half": 2, "i16": 2, "i32": 4, "i64": 8, "float": 4, "double": 8}[str(kind)]
