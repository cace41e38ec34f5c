"""jax.export for every platform from this host, its bytes, and the same values where they can run here."""

import re
from functools import partial

import jax
import numpy as np
import pytest
from cases import PROBLEMS, draw, evaluate, loss, train
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn import scaling

pytestmark = pytest.mark.usefixtures("strict")


def exported_functions():
    for name in ("plain", "mask, dead channel, residual, silu", "mask, virtual batches, hard_swish"):
        inputs = draw(PROBLEMS[name])
        f = train(PROBLEMS[name])
        yield f"train: {name}", f, tuple(inputs)
        yield f"gradient: {name}", jax.grad(loss(f)), tuple(inputs)
    inputs = draw(PROBLEMS["eval"])
    yield "eval", evaluate(PROBLEMS["eval"]), tuple(inputs[:2])


FUNCTIONS = {name: (f, args) for name, f, args in exported_functions()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_round_trip(name):
    function, args = FUNCTIONS[name]
    f = jax.jit(function)
    exported = export.export(f, platforms=("cpu", "cuda", "tpu"))(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    again = export.deserialize(exported.serialize())
    got, want = again.call(*args), f(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


def test_every_tuple_of_ours_goes_along():
    def f(renorm, x):
        params, state = jbn.bn_init(3)
        y, new = jbn.bn_train(params, state, x, renorm=renorm)
        return params, new, jbn.moments(y), scaling.fit("min_max", y), renorm

    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    args = jbn.Renorm(np.float32(2), np.float32(1)), x
    again = export.deserialize(export.export(jax.jit(f))(*args).serialize())
    assert [type(value) for value in again.call(*args)] == [
        jbn.BNParams, jbn.BNState, jbn.Moments, scaling.Affine, jbn.Renorm,
    ]  # fmt: skip


@pytest.mark.parametrize("platform", ["cuda", "tpu", "rocm"])
def test_lowers_for_one_platform_alone(platform):
    f, args = FUNCTIONS["gradient: plain"]
    assert export.export(jax.jit(f), platforms=(platform,))(*args).mlir_module()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_over_devices(kind, devices):
    """Statistics stay those of the whole batch, and what is gathered stays small."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,), devices=devices)
    case = PROBLEMS["plain"]._replace(shape=(64, 4, 2), mask=(0, 1))
    function, (arrays, state, mask) = train(case), draw(case)
    with jax.set_mesh(mesh):
        x, mask = (jax.device_put(v, NamedSharding(mesh, P("data"))) for v in (arrays["x"], mask))
        total = lambda x, mask: (function(arrays | {"x": x}, state, mask)[0] ** 3).sum()  # noqa: E731
        f = jax.jit(jax.value_and_grad(total))
        assert export.export(f, platforms=("cuda", "tpu"))(x, mask).serialize()
        exported = export.export(f, platforms=("cpu",))(x, mask)
        assert exported.nr_devices == 8
        call = jax.jit(export.deserialize(exported.serialize()).call)
        compiled = call.lower(x, mask).compile()
        for got, want in zip(compiled(x, mask), f(x, mask), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", compiled.as_text())
    assert all(np.prod([int(n) for n in shape.split(",")]) < x.size / 8 for shape in gathered)


def test_derivative_of_what_was_exported():
    """Serialised with its reverse-mode derivative."""
    case = PROBLEMS["plain"]
    arrays, state, _ = draw(case)
    f = jax.jit(lambda x: train(case)(arrays | {"x": x}, state)[0])
    again = export.deserialize(export.export(f)(arrays["x"]).serialize(vjp_order=1))
    got, want = (jax.grad(lambda x, g=g: (g(x) ** 3).sum())(arrays["x"]) for g in (again.call, f))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
