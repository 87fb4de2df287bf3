"""JAX: what programs hand over besides arrays, maps over nothing, exports and explicit meshes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.calls import framework
from helpers.strategies import array

import cuneigh
from cuneigh._problem import Spec

jax = pytest.importorskip("jax")

SHAPE = (2, 9, 2, 4)
DEVICES = ["jax", pytest.param("jax-cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def own(request):
    return framework(request.param)


def numbers(*shape: int) -> np.ndarray:
    return array(Spec(shape, "float32"), np.random.default_rng(0))


def run(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints that sees two CPU devices and no other."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# What stands for an array


class Parameter:
    """What holds an array for JAX's functions, as ``flax.nnx.Param`` does."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __jax_array__(self) -> Any:
        return self.value


def test_constants_and_parameters_are_arrays(own):
    query, rpb = own.of(numbers(*SHAPE)), numbers(2, 5)
    wanted = cuneigh.na1d(query, query, query, 3, rpb=own.of(rpb))

    def call(query, rpb):
        return cuneigh.na1d(query, query, query, 3, rpb=rpb)

    for constant in (rpb, Parameter(own.of(rpb))):
        np.testing.assert_array_equal(call(query, constant), wanted)
        np.testing.assert_array_equal(jax.jit(lambda q: call(q, constant))(query), wanted)  # noqa: B023
    alone = call(Parameter(query), rpb)
    assert own.owns(alone)
    np.testing.assert_array_equal(alone, wanted)
    lse = query[..., 0]
    merged, _ = cuneigh.merge_attentions([query, numbers(*SHAPE)], [lse, np.asarray(lse)])
    np.testing.assert_allclose(merged, query, 1e-6)
    with pytest.raises(TypeError, match="query is of type str"):
        call(Parameter("query"), rpb)


def test_a_scale_is_learned(own):
    query = own.of(numbers(*SHAPE))

    def step(scale, query=query):
        return (cuneigh.na1d(query, query, query, 3, scale=scale) ** 2).sum()

    got = jax.jit(jax.grad(step))(jax.numpy.float32(0.3))
    nearby = (step(0.3 + 2**-7) - step(0.3 - 2**-7)) * 2**6
    np.testing.assert_allclose(got, nearby, 1e-3)
    np.testing.assert_allclose(step(Parameter(jax.numpy.float32(0.3))), step(0.3), 1e-6)
    many = jax.vmap(step)(jax.numpy.array([0.3, 0.5]))
    np.testing.assert_allclose(many, [step(0.3), step(0.5)], 1e-5)


# Maps over nothing


def test_a_map_over_nothing(own):
    nothing, rpb = own.of(np.zeros((0, *SHAPE), np.float32)), own.of(numbers(2, 5))

    def call(query, rpb):
        return cuneigh.na1d(query, query, query, 3, rpb=rpb, return_lse=True)

    def total(query, rpb):
        output, lse = jax.vmap(call, (0, None))(query, rpb)
        return output.sum() + lse.sum()

    output, lse = jax.vmap(call, (0, None))(nothing, rpb)
    assert (output.shape, lse.shape) == ((0, *SHAPE), (0, *SHAPE[:-1]))
    of_query, of_rpb = jax.jit(jax.grad(total, (0, 1)))(nothing, rpb)
    assert of_query.shape == nothing.shape
    assert of_rpb.shape == rpb.shape
    assert not of_rpb.any()


# Exported programs, devices and meshes


ELSEWHERE = """
import importlib.util
import sys
import cuneigh
assert importlib.util.find_spec("jax") and "jax" not in sys.modules
import jax
assert "cuneigh._frameworks.jax" in sys.modules
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_platforms", "cpu")
import numpy as np
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

if len(sys.argv) > 1:
    loaded = export.deserialize(open(sys.argv[1], "rb").read())
    given = np.load(sys.argv[2])
    for got, wanted in zip(loaded.call(*given["given"]), (given["output"], given["gradient"])):
        np.testing.assert_allclose(got, wanted, 1e-5, 1e-5)

# Two devices

query = np.random.default_rng(0).standard_normal((2, 9, 2, 4), dtype=np.float32)
there = jax.device_put(query, jax.devices()[1])
rpb = jax.numpy.zeros((2, 5))  # put nowhere in particular
assert cuneigh.na1d(there, there, there, 3, rpb=rpb).devices() == {jax.devices()[1]}
scaled = cuneigh.na1d(there, there, there, 3, scale=jax.numpy.float32(0.5))
assert scaled.devices() == there.devices()

here = jax.device_put(query, jax.devices()[0])
spread = jax.device_put(query, NamedSharding(Mesh(jax.devices(), "b"), P("b")))
try:
    cuneigh.na1d(here, here, there, 3)
except ValueError as error:
    assert "value is on device" in str(error), error
else:
    raise AssertionError("arrays on two devices")
whole = cuneigh.na1d(query, query, query, 3)
np.testing.assert_allclose(cuneigh.na1d(spread, spread, spread, 3), whole, 1e-5, 1e-6)
output, lse = cuneigh.merge_attentions([spread, spread], [spread[..., 0], spread[..., 0]])
assert output.shape == query.shape

# Explicit axes

def call(query):
    return cuneigh.na1d(query, query, query, 3)

wanted = call(query)
with jax.set_mesh(jax.make_mesh((2,), ("b",), axis_types=(AxisType.Explicit,))):
    assert jax.jit(jax.grad(lambda query: call(query).sum()))(query).shape == query.shape
    spread = jax.device_put(query, P("b"))
    mapped = jax.shard_map(call, in_specs=P("b"), out_specs=P("b"))
    left = jax.jit(lambda query: jax.sharding.auto_axes(call, out_sharding=P("b"))(query))
    for taken in (call, jax.jit(call), jax.jit(mapped), left):
        np.testing.assert_allclose(taken(spread), wanted, 1e-5, 1e-6)
    assert jax.jit(jax.grad(lambda query: mapped(query).sum()))(spread).shape == query.shape
"""


def test_programs_and_arrays_elsewhere(tmp_path: Path):
    """An exported program with symbolic sizes, devices and meshes, all in one other process."""
    pytest.importorskip("flatbuffers")
    batch, width = jax.export.symbolic_shape("b, w", constraints=["w >= 7"])

    def call(query, key, value):
        output, lse = cuneigh.na2d(query, key, value, (3, 7), return_lse=True)
        flat = [each.reshape(each.shape[0], -1, 2, 4) for each in (query, key, value)]
        return output * lse[..., None] + cuneigh.attention(*flat).reshape(output.shape)

    def program(query, key, value):
        return call(query, key, value), jax.grad(lambda q: call(q, key, value).sum())(query)

    spec = jax.ShapeDtypeStruct((batch, 3, width, 2, 4), "float32")
    exported = jax.export.export(jax.jit(program), platforms=["cpu", "cuda"])(*[spec] * 3)
    (tmp_path / "program").write_bytes(exported.serialize())
    given = numbers(3, 2, 3, 8, 2, 4)
    output, gradient = program(*map(jax.numpy.asarray, given))
    np.savez(tmp_path / "given.npz", given=given, output=output, gradient=gradient)
    run(ELSEWHERE, str(tmp_path / "program"), str(tmp_path / "given.npz"))


def test_symbols_that_decide_are_refused():
    (size,) = jax.export.symbolic_shape("n")

    def export(*shape):
        function = jax.jit(lambda query: cuneigh.na1d(query, query, query, 3))
        jax.export.export(function)(jax.ShapeDtypeStruct(shape, "float32"))

    export(size, 9, 2, 4)
    export(2, 9, size, 4)
    with pytest.raises(ValueError, match="na1d: scale must be given, for the head_dim n from"):
        export(2, 9, 2, size)
    with pytest.raises(Exception, match="inconclusive"):
        export(2, size, 2, 4)


SECOND_OF_TWO = """
import jax
jax.config.update("jax_cuda_visible_devices", "1")
import numpy as np
there = jax.device_put(np.zeros(3))
assert there.device.platform == "gpu" and len(jax.devices()) == 1
"""
PLAIN = SECOND_OF_TWO + "jax.jit(lambda x: x + 1)(there).block_until_ready()"
"""What JAX must be able to do there for any call of ours to work."""

CALLS = """
import cuneigh, jax
query = np.random.default_rng(0).standard_normal((2, 9, 2, 4), dtype=np.float32)
wanted = cuneigh.na1d(query, query, query, 3)
for device in jax.devices():
    there = jax.device_put(query, device)
    for backend in (None, "naive", "gemm"):
        def call(query):
            return cuneigh.na1d(query, query, query, 3, backend=backend)

        for got in (call(there), jax.jit(call)(there)):
            assert got.device == device
            np.testing.assert_allclose(got, wanted, 1e-3, 1e-3)
"""


@pytest.fixture(params=[None, "1,0"])
def two_gpus(request, monkeypatch):
    """Two GPUs, in each order that CUDA may be told."""
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is only one GPU")
    if request.param:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", request.param)


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.usefixtures("two_gpus")
def test_every_device_of_jax_is_found():
    run("import numpy as np" + CALLS)


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.usefixtures("two_gpus")
def test_jax_may_see_the_second_device_alone():
    try:
        run(PLAIN)
    except AssertionError as error:
        # XLA since 0.11.1, when it looks up the device's number in a topology of one device
        if "Device id 1 is out of range [0, 1)" not in str(error):
            raise
        pytest.skip("JAX itself cannot run a program on the second device alone")
    run(SECOND_OF_TWO + CALLS)
