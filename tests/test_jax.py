"""JAX's transformations: compiled, differentiated and batched calls against the oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers.accuracy import assert_close, expect
from helpers.calls import arguments_of, framework, results_of
from helpers.gpu_arrays import at_launch, located
from helpers.strategies import Inputs, array, generators, inputs, problems
from hypothesis import given, settings
from hypothesis import strategies as st

import cuneigh
from cuneigh import _backends
from cuneigh._gpu.program import cupy_stream
from cuneigh._problem import ARRAYS, Operands, Problem, Spec

jax = pytest.importorskip("jax")

from cuneigh._frameworks.jax.calls import CustomCall  # noqa: E402 - needs JAX

DEVICES = ["jax", pytest.param("jax-cuda", marks=pytest.mark.gpu)]
SHAPE = (2, 6, 7, 2, 4)
SMALL = {"budget": 3_000, "most_tokens": 60}


def given_to(own: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays among the arguments of a call, on the device, and the other arguments."""
    arrays = {n: own.of(a) for n, a in arguments.items() if isinstance(a, np.ndarray)}
    return arrays, {n: a for n, a in arguments.items() if n not in arrays}


def check(problem: Problem, asked: Inputs, own: Any, results: dict[str, Any]) -> None:
    """Raise unless `results` are as near to the oracle as `accuracy` asks."""
    expected, max_logit = expect(problem, asked)
    for name, result in results.items():
        assert own.owns(result)
        wanted = expected[name]
        assert_close(
            f"{own.name}: {name}",
            own.numpy(result),
            wanted.oracle,
            wanted.obvious,
            wanted.term_bound,
            wanted.dtype,
            max_logit,
            accumulator=problem.accumulator,
            context=problem,
        )


def normal(own: Any, *shapes: tuple[int, ...], dtype: str = "float32") -> list[Any]:
    """Arrays of these shapes with normally distributed numbers."""
    rng = np.random.default_rng(0)
    return [own.of(array(Spec(shape, dtype), rng)) for shape in shapes]


def assert_near(got: Any, wanted: Any) -> None:
    """For two ways through the same calls, which may sum in different orders."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    bound = np.sqrt(np.finfo(got.dtype).eps) * max(1, np.abs(wanted).max(initial=0))
    np.testing.assert_allclose(got, wanted, 0, bound)


# Every operation


@pytest.mark.parametrize("name", DEVICES)
@given(problem=problems(**SMALL, cross=False), rng=generators())
def test_a_compiled_call_returns_what_an_eager_one_does(name, problem, rng):
    own = framework(name)
    function, arguments = arguments_of(problem, inputs(problem, rng))
    with own.scope(problem.dtype):
        arrays, others = given_to(own, arguments)

        def call(arrays):
            return results_of(problem, getattr(cuneigh, function)(**arrays, **others))

        eager, compiled = call(arrays), jax.jit(call)(arrays)
        assert eager.keys() == compiled.keys()
        for result in eager:
            np.testing.assert_array_equal(own.numpy(compiled[result]), own.numpy(eager[result]))


@pytest.mark.parametrize("name", DEVICES)
@given(
    problem=problems(operations=("backward", "qk_backward", "av_backward"), **SMALL),
    rng=generators(),
)
def test_gradients_agree_with_the_oracle(name, problem, rng):
    own, asked = framework(name), inputs(problem, rng)
    primal = replace(problem, operation=problem.operation.removesuffix("_backward"))
    if problem.operation == "backward":
        primal = replace(problem, operation="forward")
    given = Inputs(asked.operands, weights=asked.weights, wants_lse=asked.grad_lse is not None)
    function, arguments = arguments_of(primal, given)
    with own.scope(problem.dtype):
        arrays, others = given_to(own, arguments)

        def gradients(arrays, cotangents):
            _, pull = jax.vjp(lambda arrays: getattr(cuneigh, function)(**arrays, **others), arrays)
            return pull(cotangents)[0]

        cotangents = {
            "backward": (asked.grad_output, asked.grad_lse)
            if asked.grad_lse is not None
            else asked.grad_output,
            "qk_backward": asked.grad_logits,
            "av_backward": asked.grad_output,
        }[problem.operation]
        results = jax.jit(gradients)(arrays, jax.tree.map(own.of, cotangents))
        assert results.keys() == arrays.keys()
        check(problem, asked, own, {f"grad {n}": result for n, result in results.items()})


def entries(
    problem: Problem, count: int, shared: set[str], rng: np.random.Generator
) -> list[Inputs]:
    """Inputs for `count` calls, which have those called `shared` in common."""
    first, *others = (inputs(problem, rng) for _ in range(count))
    made = [first]
    for other in others:
        fields = {n: getattr(first, n) for n in shared if n in Inputs._fields}
        own = {n: getattr(first.operands, n) for n in shared if n in Operands._fields}
        # Whether there is a gradient of lse, and whether lse is wanted, is the same for all.
        if first.grad_lse is None:
            fields["grad_lse"] = None
        elif other.grad_lse is None:
            fields["grad_lse"] = first.grad_lse
        fields["wants_lse"] = first.wants_lse
        made.append(other._replace(operands=other.operands._replace(**own), **fields))
    return made


MAPPABLE = (*Operands._fields, "weights", "grad_output", "grad_logits")


@pytest.mark.parametrize("name", DEVICES)
@settings(max_examples=settings.default.max_examples // 2)  # each is traced
@given(
    problem=problems(**SMALL, cross=False),
    rng=generators(),
    shared=st.sets(st.sampled_from(MAPPABLE)),
    count=st.integers(1, 3),
)
def test_mapped_calls_agree_with_the_oracle(name, problem, rng, shared, count):
    own, asked = framework(name), entries(problem, count, shared, rng)
    calls = [arguments_of(problem, one) for one in asked]
    function, first = calls[0]
    with own.scope(problem.dtype):
        arrays, axes = {}, {}
        for argument, one in first.items():
            if isinstance(one, np.ndarray):
                axes[argument] = None if argument in shared else rng.integers(one.ndim + 1).item()
                every = [arguments[argument] for _, arguments in calls]
                arrays[argument] = own.of(
                    one if argument in shared else np.stack(every, axes[argument])
                )
        others = {n: value for n, value in first.items() if n not in arrays}
        if all(axis is None for axis in axes.values()):
            return

        def call(arrays):
            return results_of(problem, getattr(cuneigh, function)(**arrays, **others))

        results = jax.jit(jax.vmap(call, (axes,)))(arrays)
        for i, one in enumerate(asked):
            check(problem, one, own, {n: result[i] for n, result in results.items()})


@given(problem=problems(), data=st.data())
def test_the_attribute_of_a_call_says_everything(problem, data):
    names = ARRAYS[problem.operation].results
    wanted = tuple(data.draw(st.lists(st.sampled_from(names), unique=True)))
    backend = data.draw(st.sampled_from([None, "cpu", "naive"]))
    call = CustomCall(problem, backend, ("query", "rpb"), wanted)
    assert CustomCall.decoded(call.encoded().encode()) == call
    assert all(isinstance(key, str) for key in json.loads(call.encoded()))


# Compositions


@pytest.fixture(params=DEVICES)
def own(request):
    return framework(request.param)


def everything(query, key, value, extra_keys, extra_values, rpb):
    """A sum in which each result of a call with every argument has a weight of its own."""
    output, lse = cuneigh.na2d(
        query,
        key,
        value,
        3,
        dilation=(1, 2),
        additional_keys=extra_keys,
        additional_values=extra_values,
        rpb=rpb,
        return_lse=True,
    )
    return jax.numpy.sin(output).sum() + (lse * lse).sum()


SHAPES = [SHAPE, SHAPE, SHAPE, (2, 3, 2, 4), (2, 3, 2, 4), (2, 5, 5)]


def test_gradients_are_those_of_finite_differences(own):
    from jax.test_util import check_grads

    with own.scope("float64"):
        arrays = normal(own, *SHAPES, dtype="float64")
        check_grads(jax.jit(everything), arrays, order=1, modes=["rev"])

        def unfused(query, key, value, extra_keys, extra_values, rpb):
            logits = cuneigh.na2d_qk(query, key, 3, additional_keys=extra_keys, rpb=rpb)
            weights = jax.nn.softmax(logits)
            return cuneigh.na2d_av(weights, value, 3, additional_values=extra_values)

        check_grads(jax.jit(unfused), arrays, order=1, modes=["rev"])
        sequence = [a.reshape(2, -1, 2, 4) for a in arrays[:3]]
        check_grads(
            jax.jit(lambda *a: cuneigh.attention(*a, is_causal=True, return_lse=True)),
            sequence,
            order=1,
            modes=["rev"],
        )


def test_transformations_compose(own):
    arrays = normal(own, *((3, *shape) for shape in SHAPES))
    of_one = jax.grad(everything, argnums=range(6))
    wanted = [of_one(*(a[i] for a in arrays)) for i in range(3)]
    wanted = [np.stack([own.numpy(w[i]) for w in wanted]) for i in range(6)]

    def total(*arrays):
        return jax.vmap(everything)(*arrays).sum()

    def looped(*arrays):
        def body(carry, arrays):
            return carry + jax.checkpoint(everything)(*arrays), None

        return jax.lax.scan(body, 0.0, arrays)[0]

    for way in (
        jax.vmap(of_one),
        jax.jit(jax.vmap(jax.jit(of_one))),
        jax.grad(total, argnums=range(6)),
        jax.jit(jax.grad(looped, argnums=range(6))),
    ):
        for got, of_name in zip(way(*arrays), wanted, strict=True):
            assert own.owns(got)
            assert_near(got, of_name)


def test_a_bias_that_is_shared_has_one_gradient(own):
    arrays = normal(own, *((3, *shape) for shape in SHAPES[:5]), SHAPES[5])
    axes = (0, 0, 0, 0, 0, None)
    each = jax.vmap(jax.grad(everything, argnums=5), axes)(*arrays)
    together = jax.grad(lambda *a: jax.vmap(everything, axes)(*a).sum(), argnums=5)(*arrays)
    assert each.shape == (3, *SHAPES[5])
    assert_near(together, each.sum(0))


def test_maps_nest(own):
    query, key, value = normal(own, (2, 3, *SHAPE), (3, *SHAPE), (2, *SHAPE))

    def call(query, key, value):
        return cuneigh.na2d(query, key, value, (3, 5), return_lse=True)

    inner = jax.vmap(call, (0, 0, None))
    for got, rows in zip(
        jax.vmap(inner, (0, None, 0), 1)(query, key, value),
        zip(
            *(call(query[i, j], key[j], value[i]) for j in range(3) for i in range(2)), strict=True
        ),
        strict=True,
    ):
        assert_near(got, np.stack(rows).reshape(3, 2, *rows[0].shape))


def test_a_jacobian(own):
    (query,) = normal(own, (1, 5, 1, 2))

    def call(query):
        return cuneigh.na1d(query, query, query, 3)

    rows = jax.jacrev(call)(query)
    (one,) = jax.vjp(call, query)[1](jax.numpy.zeros_like(query).at[0, 2, 0, 1].set(1.0))
    assert_near(rows[0, 2, 0, 1], one)


def test_an_empty_call_has_gradients(own):
    (query,) = normal(own, (0, 5, 2, 4))
    keys, rpb = normal(own, (0, 3, 2, 4), (2, 5))

    def call(query, keys, rpb):
        given = {"additional_keys": keys, "additional_values": keys}
        output, lse = cuneigh.na1d(query, query, query, 3, **given, rpb=rpb, return_lse=True)
        return output.sum() + lse.sum()

    gradients = jax.jit(jax.grad(call, (0, 1, 2)))(query, keys, rpb)
    assert [gradient.shape for gradient in gradients] == [query.shape, keys.shape, rpb.shape]
    assert not gradients[2].any()


def test_an_unused_lse_changes_nothing(own):
    arrays = normal(own, SHAPE, SHAPE, SHAPE)
    plain = jax.grad(lambda *a: cuneigh.na2d(*a, 3).sum(), (0, 1, 2))(*arrays)
    unused = jax.grad(lambda *a: cuneigh.na2d(*a, 3, return_lse=True)[0].sum(), (0, 1, 2))(*arrays)
    for got, wanted in zip(unused, plain, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_arrays_in_64_bits_are_never_truncated(own):
    with own.scope("float64"):
        wide = normal(own, SHAPE, SHAPE, SHAPE, dtype="float64")
        wanted = own.numpy(cuneigh.na2d(*wide, 3))
    with own.scope("float32"):
        try:
            got = cuneigh.na2d(*wide, 3)
        except TypeError as error:
            assert "jax_enable_x64" in str(error)  # noqa: PT017 - either is right
        else:
            np.testing.assert_array_equal(own.numpy(got), wanted)


def test_two_threads_at_once(own):
    arrays = normal(own, SHAPE, SHAPE, SHAPE)
    call = jax.jit(jax.grad(lambda *a: (cuneigh.na2d(*a, 3) ** 2).sum()))
    wanted = own.numpy(call(*arrays))
    with ThreadPoolExecutor(2) as threads:
        for got in threads.map(lambda _: own.numpy(call(*arrays)), range(20)):
            np.testing.assert_array_equal(got, wanted)


# Errors


@contextmanager
def backend_that(forward: Callable[..., None]) -> Iterator[None]:
    backend = mock.Mock(NAME="mock", SETTINGS=(), forward=forward, unsupported=lambda *given: None)
    with mock.patch.object(_backends, "BACKENDS", (backend,)):
        yield


def test_an_error_of_a_backend_reaches_the_caller(own):
    (query,) = normal(own, SHAPE)

    def forward(*given):
        raise MemoryError("there is no more of it")

    call = jax.jit(lambda query: cuneigh.na2d(query, query, query, 3))
    with (
        backend_that(forward),
        pytest.raises(jax.errors.JaxRuntimeError, match="MemoryError: there is no more of it"),
    ):
        call(query).block_until_ready()
    assert_near(call(query), cuneigh.na2d(query, query, query, 3))


def test_illegal_arguments_are_errors_while_tracing(own):
    (query,) = normal(own, SHAPE)

    def traced(**arguments):
        jax.eval_shape(lambda query: cuneigh.na2d(query, query, query, **arguments), query)

    traced(kernel_size=3)
    with pytest.raises(ValueError, match="na2d: kernel_size=7 times dilation=1 on axis 0 is 7"):
        traced(kernel_size=7)
    with pytest.raises(ValueError, match="backend='none' is not one of"):
        traced(kernel_size=3, backend="none")
    with pytest.raises(ValueError, match=r"scale has shape \(2,\); a number or a 0-d array"):
        jax.jit(lambda query, scale: cuneigh.na2d(query, query, query, 3, scale=scale))(
            query, jax.numpy.ones(2)
        )
    integers = query.astype("int32")
    with pytest.raises(TypeError, match="query has dtype int32, which is not one of float16"):
        jax.jit(lambda query: cuneigh.na2d(query, query, query, 3))(integers)


def test_a_backend_that_cannot_run_says_so(own):
    (query,) = normal(own, SHAPE)
    backend = "cpu" if "cuda" in own.name else "naive"

    def call(query):
        return cuneigh.na2d(query, query, query, 3, backend=backend)

    with pytest.raises(RuntimeError, match=f"no backend can run this problem; {backend}: "):
        call(query)
    with pytest.raises(RuntimeError, match=f"no backend can run this problem; {backend}: "):
        jax.jit(call)(query).block_until_ready()


# Processes, threads and devices


def test_subnormal_numbers_are_not_taken_for_zero():
    own, products = framework("jax"), []
    (query,) = normal(own, SHAPE)

    @at_launch
    def forward(problem, operands, output, lse, workspace):
        products.append(np.float32(1e-30) * np.float32(1e-10))
        output[...] = 0

    with backend_that(forward):
        cuneigh.na2d(query, query, query, 3).block_until_ready()
    assert products == [np.float32(1e-40)]


def run(code: str) -> str:
    """What a fresh interpreter prints that sees two CPU devices and no other."""
    settings = "import jax; jax.config.update('jax_num_cpu_devices', 2)"
    settings += "; jax.config.update('jax_platforms', 'cpu')\n"
    done = subprocess.run(
        [sys.executable, "-c", settings + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_may_end_during_a_call():
    code = """
import jax.numpy as jnp, cuneigh
query = jnp.ones((1, 64, 64, 4, 32))
print(cuneigh.na2d(query, query, query, 13).shape)
"""
    assert run(code) == "(1, 64, 64, 4, 32)\n"


def test_what_is_local_to_a_thread_survives_a_call():
    code = """
import threading
import jax.numpy as jnp, cuneigh
from jax.sharding import Mesh, PartitionSpec as P
from cuneigh import _backends

local, calls = threading.local(), []

class Backend:
    NAME, SETTINGS = "counting", ()
    unsupported = staticmethod(lambda *given: None)
    @staticmethod
    def forward(problem, operands, output, lse, space):
        local.calls = getattr(local, "calls", 0) + 1
        calls.append((threading.get_ident(), local.calls))

_backends.BACKENDS = (Backend,)
query, mesh = jnp.ones((2, 9, 1, 4)), Mesh(jax.devices(), ("b",))
call = jax.shard_map(
    lambda query: cuneigh.na1d(query, query, query, 3),
    mesh=mesh, in_specs=P("b"), out_specs=P("b"),
)
for _ in range(8):
    jax.jit(call)(query).block_until_ready()
assert len(calls) == 16
for thread in {thread for thread, _ in calls}:
    counts = [count for own, count in calls if own == thread]
    assert counts == list(range(1, len(counts) + 1)), calls
"""
    run(code)


SHARDED = """
import jax.numpy as jnp, numpy as np, cuneigh
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(jax.devices(), ("b",))
rng = np.random.default_rng(0)
query = jnp.asarray(rng.standard_normal((2, 9, 1, 4)), "float32")
rpb = jnp.asarray(rng.standard_normal((1, 5)), "float32")
parted = jax.device_put(query, NamedSharding(mesh, P("b")))

def call(query, rpb):
    return cuneigh.na1d(query, query, query, 3, rpb=rpb)

def gradients(call):
    return jax.jit(jax.grad(lambda *arrays: (call(*arrays) ** 2).sum(), (0, 1)))

mapped = jax.shard_map(call, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"))
wanted = call(query, rpb)
np.testing.assert_allclose(jax.jit(call)(parted, rpb), wanted, 1e-5, 1e-6)
output = jax.jit(mapped)(parted, rpb)
assert output.sharding.spec == P("b")
np.testing.assert_allclose(output, wanted, 1e-5, 1e-6)
for got, of_name in zip(gradients(mapped)(parted, rpb), gradients(call)(query, rpb)):
    np.testing.assert_allclose(got, of_name, 1e-5, 1e-6)
"""


def test_arrays_that_are_spread_over_devices():
    run(SHARDED)


# On a GPU


@pytest.mark.gpu
def test_a_call_waits_for_nothing():
    own = framework("jax-cuda")
    (query, matrix) = normal(own, SHAPE, (4096, 4096))

    @jax.jit
    def late(query, matrix):
        """`query`, after some ten milliseconds."""
        for _ in range(64):
            matrix = jax.numpy.sin(matrix @ matrix)
        return query + 0 * matrix[0, 0]

    def call(query):
        return cuneigh.na2d(query, query, query, 3)

    wanted = own.numpy(call(query))
    compiled = jax.jit(jax.grad(lambda query: call(query).sum()))
    wanted_gradient = own.numpy(compiled(query))
    late(query, matrix).block_until_ready()
    argument = late(query, matrix)
    output, gradient = call(argument), compiled(argument)
    assert not argument.is_ready(), "the call waited for its argument"
    np.testing.assert_array_equal(own.numpy(output), wanted)
    np.testing.assert_array_equal(own.numpy(gradient), wanted_gradient)


@pytest.mark.gpu
def test_workspace_comes_from_xla():
    own = framework("jax-cuda")
    (query,) = normal(own, SHAPE)
    addresses = []

    def forward(problem, operands, output, lse, program):
        arrays = [program.allocate((1 << 20,), "float32") for _ in range(3)]

        def launch(given, stream):
            addresses.extend(located(array, given).data.ptr for array in arrays)
            with cupy_stream(stream):
                located(output, given)[...] = 1

        program.add(launch)

    device = query.device
    before = device.memory_stats()["num_allocs"], device.memory_stats()["bytes_in_use"]
    with backend_that(forward):
        output = cuneigh.na2d(query, query, query, 3).block_until_ready()
    after = device.memory_stats()["num_allocs"], device.memory_stats()["bytes_in_use"]
    assert len(set(addresses)) == 3
    assert after[0] - before[0] >= 4
    assert after[1] - before[1] < 1 << 20
    assert (output == 1).all()
