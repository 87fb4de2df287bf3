"""Intrinsics of Numba's made of functions that build LLVM's code, and the loop that many have.

The keys that any query of a tile sees are a block of ``a x b x c`` keys, whose rows follow each
other along c: a *run*. Arrays are given by their addresses, integers, so that Numba compiles for
one kind of arguments only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.extending import intrinsic

from cuneigh._backends.cpu.compiled.vectors import INT64, Value, Vectors


@contextmanager
def each_key(
    v: Vectors, counts: Value, bounds: Value
) -> Iterator[tuple[Value, Value, Value, Value]]:
    """A loop over the keys of a block: the key, its run, its place there, and who sees it."""
    b = v.builder
    integers = b.inttoptr(bounds, v.integers.as_pointer())
    of_axes = [
        [b.load(b.gep(integers, [INT64(i)]), align=8) for i in (2 * axis, 2 * axis + 1)]
        for axis in range(3)
    ]
    count_a, count_b, count_c = (b.extract_value(counts, axis) for axis in range(3))

    def seen(axis: int, key: Value) -> Value:
        begin, length = of_axes[axis]
        at = v.splat(key if v.bits == 64 else b.trunc(key, v.integers.element))
        return b.icmp_unsigned("<", b.sub(at, begin), length)

    with v.steps(INT64(0), count_a, 1) as a, v.steps(INT64(0), count_b, 1) as row:
        run = b.add(b.mul(a, count_b), row)
        first, of_run = b.mul(run, count_c), b.and_(seen(0, a), seen(1, row))
        with v.steps(INT64(0), count_c, 1) as c:
            yield b.add(first, c), run, c, b.and_(of_run, seen(2, c))


def step(bits: int, lanes: int, returns: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that makes an intrinsic of a function that builds LLVM's code.

    The function takes `Vectors` and LLVM's value of every argument, and returns that of the result.
    """

    def decorate(build: Callable[..., Any]) -> Any:
        names = list(inspect.signature(build).parameters)[1:]

        def typed(*arguments: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                result = build(Vectors(builder, bits, lanes), *values)
                return context.get_dummy_value() if result is None else result

            return returns(*arguments), generate

        # Numba asks for as many parameters as the intrinsic has.
        source = f"lambda context, {', '.join(names)}: typed({', '.join(names)})"
        return intrinsic(eval(source, {"typed": typed}))

    return decorate
