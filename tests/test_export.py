"""jax.export for every platform from this host, its bytes, and the same values where they can run here."""

import jax
import numpy as np
import pytest
from cases import PROBLEMS, draw, evaluate, loss, train
from jax import export

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
    leaves, tree = jax.tree.flatten(args)  # plain arrays: a NamedTuple would have to be registered to serialise
    f = jax.jit(lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))
    exported = export.export(f, platforms=("cpu", "cuda", "tpu"))(*leaves)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    again = export.deserialize(exported.serialize())
    for got, want in zip(again.call(*leaves), f(*leaves), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "rocm"])
def test_lowers_for_one_platform_alone(platform):
    f, args = FUNCTIONS["gradient: plain"]
    assert export.export(jax.jit(f), platforms=(platform,))(*args).mlir_module()


def test_derivative_of_what_was_exported():
    """Serialised with its reverse-mode derivative."""
    case = PROBLEMS["plain"]
    arrays, state, _ = draw(case)
    f = jax.jit(lambda x: train(case)(arrays | {"x": x}, state)[0])
    again = export.deserialize(export.export(f)(arrays["x"]).serialize(vjp_order=1))
    got, want = (jax.grad(lambda x, g=g: (g(x) ** 3).sum())(arrays["x"]) for g in (again.call, f))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
