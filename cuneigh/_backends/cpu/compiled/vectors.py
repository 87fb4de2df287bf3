"""Vector instructions, written in LLVM's language by the functions of `steps`.

Numba's own loops over a few dozen numbers are not made of vector instructions that keep sums in
registers, which is all that small windows are about. LLVM divides a vector that the processor
lacks into those that it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils

INT32, INT64 = ir.IntType(32), ir.IntType(64)
Value = Any
"""A value of LLVM's: an integer, a number, a vector or a pointer."""

LAST_POWER = {32: 7, 64: 13}
"""By the bits of a number, where the power series of 2**x may end, for x up to 1/2."""
LARGEST_POWER = {32: 126.0, 64: 1022.0}
"""Beyond this power of 2 exponentials count as infinite, and as 0 below its opposite."""
FRACTION = {32: 23, 64: 52}
"""Bits of the fraction of a number."""


class Vectors:
    """Vectors of `lanes` numbers of `bits` bits, in one function that LLVM is to compile."""

    def __init__(self, builder: Any, bits: int, lanes: int) -> None:
        self.builder, self.bits, self.lanes = builder, bits, lanes
        self.number = ir.FloatType() if bits == 32 else ir.DoubleType()
        self.type = ir.VectorType(self.number, lanes)
        self._integers = ir.VectorType(ir.IntType(bits), lanes)
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
        where = self._at(numbers, index)
        if count in (None, self.lanes):
            return self.builder.load(where, align=self.bits // 8)
        alignment, some = INT32(self.bits // 8), self._first(count)
        name = f"llvm.masked.load.{self._name}.p0"
        return self._call(name, self.type, where, alignment, some, self.constant(0.0))

    def store(self, vector: Value, numbers: Value, index: Value, count: int | None = None) -> None:
        """Store the vector at `index`; its first `count` numbers."""
        where = self._at(numbers, index)
        if count in (None, self.lanes):
            self.builder.store(vector, where, align=self.bits // 8)
            return
        alignment, some = INT32(self.bits // 8), self._first(count)
        name = f"llvm.masked.store.{self._name}.p0"
        self._call(name, ir.VoidType(), vector, where, alignment, some)

    def _at(self, numbers: Value, index: Value | int) -> Value:
        return self.builder.bitcast(self.element(numbers, index), self.type.as_pointer())

    def _first(self, count: int | None) -> Value:
        bit = ir.IntType(1)
        return ir.Constant(
            ir.VectorType(bit, self.lanes), [bit(i < (count or 0)) for i in range(self.lanes)]
        )

    # Arithmetic

    def splat(self, number: Value) -> Value:
        """A vector of one number."""
        vector = self.builder.insert_element(ir.Constant(self.type, ir.Undefined), number, INT32(0))
        return self._shuffled(vector, vector, [0] * self.lanes)

    def plus_product(self, total: Value | None, a: Value, b: Value) -> Value:
        """``total + a * b``, rounded once; the product alone for a total of None."""
        if total is None:
            return self.builder.fmul(a, b)
        return self._call(f"llvm.fma.{self._name}", self.type, a, b, total)

    def sums(self, vector: Callable[[int], Value]) -> Value:
        """The sums of ``vector(0)``, ``vector(1)``, .., as many as fill a vector."""
        return self._sums(range(self.lanes), vector)

    def _sums(self, which: Sequence[int], vector: Callable[[int], Value]) -> Value:
        if len(which) == 1:
            return vector(which[0])
        half = len(which) // 2
        return self._pair_sums(self._sums(which[:half], vector), self._sums(which[half:], vector))

    def _pair_sums(self, a: Value, b: Value) -> Value:
        """The sums of neighbors: those of `a`, then those of `b`."""
        even, odd = range(0, 2 * self.lanes, 2), range(1, 2 * self.lanes, 2)
        return self.builder.fadd(self._shuffled(a, b, even), self._shuffled(a, b, odd))

    def _shuffled(self, a: Value, b: Value, indices: Sequence[int]) -> Value:
        mask = ir.Constant(ir.VectorType(INT32, len(indices)), [INT32(i) for i in indices])
        return self.builder.shuffle_vector(a, b, mask)

    def sum(self, vector: Value) -> Value:
        name = f"llvm.vector.reduce.fadd.{self._name}"
        return self._call(name, self.number, self.number(0.0), vector, fastmath=("reassoc",))

    def maximum(self, vector: Value) -> Value:
        return self._call(f"llvm.vector.reduce.fmax.{self._name}", self.number, vector)

    def larger(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def exponential(self, vector: Value) -> Value:
        """exp of all numbers; NaN of NaN.

        It is 2**n * 2**r for the whole number n that is nearest to x / log(2), and the rest r.
        Adding a number that is so large that it has no fraction rounds to n, and leaves n in the
        lowest bits of the sum, whence it is moved to where numbers have their exponent.
        """
        b, fraction = self.builder, FRACTION[self.bits]
        power = b.fmul(vector, self.constant(1 / math.log(2)))
        no_fraction = self.constant(1.5 * 2.0**fraction)
        rounded = b.fadd(power, no_fraction)
        rest = b.fsub(power, b.fsub(rounded, no_fraction))
        *others, last = [math.log(2) ** n / math.factorial(n) for n in range(LAST_POWER[self.bits])]
        series = self.constant(last)
        for coefficient in reversed(others):
            series = self.plus_product(self.constant(coefficient), series, rest)
        bias = self._whole(2 ** (self.bits - 2 - fraction) - 1)
        exponent = b.add(b.bitcast(rounded, self._integers), bias)
        scale = b.bitcast(b.shl(exponent, self._whole(fraction)), self.type)
        least, most = (self.constant(sign * LARGEST_POWER[self.bits]) for sign in (-1.0, 1.0))
        result = b.select(
            b.fcmp_ordered("<", power, least), self.constant(0.0), b.fmul(series, scale)
        )
        return b.select(b.fcmp_ordered(">", power, most), self.constant(math.inf), result)

    def _whole(self, number: int) -> Value:
        return ir.Constant(self._integers, [ir.IntType(self.bits)(number)] * self.lanes)

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
