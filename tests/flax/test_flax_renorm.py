"""The Flax modules' `renorm`: `bn_train` with what the module holds, under bounds of the call or of the layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import meaning
import numpy as np
import optax
import pytest
from flax import nnx
from layers import assert_equal, assert_same, bf16, inputs

import jbn
from jbn import linen as jl
from jbn import nnx as jx

BOUNDS = {"r_max": 1.5, "d_max": 0.4}
PARAMS = jbn.BNParams(jnp.array([0.5, 1.5, 2.0]), jnp.array([0.1, -0.2, 0.3]))
STATE = jbn.BNState(jnp.array([0.5, 1.0, -1.0]), jnp.array([0.6, 3.0, 1.2]))


def linen_step(options, x, dy, **call):
    """y, new state, and the gradients of Σ y·dy by scale, bias and x, of a linen layer."""
    layer = jl.BatchNorm(use_running_average=False, **options)

    def apply(params, x):
        variables = {"params": params._asdict(), "batch_stats": STATE._asdict()}
        y, new = layer.apply(variables, x, mutable=["batch_stats"], **call)
        return y, jbn.BNState(**new["batch_stats"])

    y, pullback, new = jax.vjp(apply, PARAMS, x, has_aux=True)
    return y, new, *pullback(dy.astype(y.dtype))


def nnx_step(options, x, dy, **call):
    def apply(params, x):
        layer = jx.BatchNorm(3, **options, rngs=nnx.Rngs(0))
        layer.scale[...], layer.bias[...] = params
        layer.mean[...], layer.var[...] = STATE
        y = layer(x, **call)
        return y, jbn.BNState(layer.mean[...], layer.var[...])

    y, pullback, new = jax.vjp(apply, PARAMS, x, has_aux=True)
    return y, new, *pullback(dy.astype(y.dtype))


def function_step(options, x, dy, **call):
    def apply(params, x):
        return jbn.bn_train(params, STATE, x, **options, **call)

    y, pullback, new = jax.vjp(apply, PARAMS, x, has_aux=True)
    return y, new, *pullback(dy.astype(y.dtype))


STEPS = pytest.mark.parametrize("step", [linen_step, nnx_step])
OPTIONS = {
    "plain": {},
    "all": dict(activation="silu", unbiased=True, momentum=0.7, epsilon=1e-2, virtual_batch_size=4, dtype=bf16),
}


@STEPS
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_bn_train(step, name):
    (x, dy), residual = inputs((8, 2, 3)), inputs((8, 2, 3), seed=3)[0]
    mask = np.random.default_rng(4).random((8, 2, 1)) < 0.8
    call = {} if name == "plain" else {"mask": jnp.asarray(mask), "residual": residual}
    run = lambda x, dy: step({"renorm": True, **BOUNDS, **OPTIONS[name]}, x, dy, **call)  # noqa: E731
    want = lambda x, dy: function_step({"renorm": jbn.Renorm(**BOUNDS), **OPTIONS[name]}, x, dy, **call)  # noqa: E731
    assert_same(meaning.run(run, x, dy), meaning.run(want, x, dy), n=16)


@STEPS
@pytest.mark.parametrize("name", OPTIONS)
def test_without_correction_it_is_the_plain_layer(step, name):
    """Bit for bit, under bounds of the layer and of the call."""
    x, dy = inputs((8, 2, 3))
    want = jax.jit(lambda x, dy: step(OPTIONS[name], x, dy))(x, dy)
    bounds = {"r_max": 1, "d_max": 0}
    assert_equal(jax.jit(lambda x, dy: step({"renorm": True, **bounds, **OPTIONS[name]}, x, dy))(x, dy), want)
    over = {"renorm": True, **BOUNDS, **OPTIONS[name]}
    assert_equal(jax.jit(lambda x, dy: step(over, x, dy, **bounds))(x, dy), want)


@STEPS
def test_traced_bounds_of_a_schedule(step):
    """One executable for all steps, under bounds given at the call."""
    x, dy = inputs((8, 3))
    schedule = optax.schedules.linear_schedule(1.0, 3.0, 4)
    traces = []

    @jax.jit
    def run(number, x, dy):
        traces.append(number)
        return step({"renorm": True}, x, dy, r_max=schedule(number), d_max=schedule(number) - 1)

    for number in range(3):
        bound = float(schedule(number))
        want = function_step({"renorm": jbn.Renorm(bound, bound - 1)}, x, dy)
        assert_same(run(jnp.int32(number), x, dy), want, n=8)
    assert len(traces) == 1


def test_a_traced_field_of_a_linen_model():
    """A model whose norm is an argument passes bounds on through it."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, r_max, d_max):
            norm = jl.BatchNorm(use_running_average=False, renorm=True, r_max=r_max, d_max=d_max)
            return nn.remat(nn.Dense)(2)(norm(x))

    x, _ = inputs((8, 3))
    variables = Net().init(jax.random.key(0), x, 1.0, 0.0)
    run = jax.jit(lambda r_max, d_max: Net().apply(variables, x, r_max, d_max, mutable=["batch_stats"])[0])
    assert_same(run(1.5, 0.4), run(jnp.float32(1.5), jnp.float32(0.4)))
    assert np.any(run(1.5, 0.4) != run(1.0, 0.0))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = jx.BatchNorm(3, renorm=True, rngs=rngs)
        self.plain = jx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.plain(self.first(x))


def test_an_nnx_view_gives_the_bounds_of_a_step_to_every_layer():
    """Traced ones too; statistics move in the model itself, whose attributes and state stay as they were."""
    x, _ = inputs((8, 3))
    model = Net(nnx.Rngs(0))
    before = jax.tree.structure(nnx.state(model))

    @nnx.jit
    def run(model, r_max, d_max):
        return nnx.view(model, r_max=r_max, d_max=d_max)(x)

    for bounds in (BOUNDS, {name: jnp.float32(bound) for name, bound in BOUNDS.items()}):
        assert_same(nnx.view(nnx.clone(model), **bounds)(x), run(nnx.clone(model), **bounds), n=8)  # not traced, too
    y = run(model, jnp.float32(1.5), jnp.float32(0.4))
    want = Net(nnx.Rngs(0))
    first, state = jbn.bn_train(*jbn.bn_init(3), x, renorm=jbn.Renorm(**BOUNDS))
    assert_same(y, want.plain(first), n=8)
    assert_same(model.first.var[...], state.var, n=8)
    assert model.first.r_max is model.plain.r_max is None
    assert jax.tree.structure(nnx.state(model)) == before
    model.eval()
    assert model(x).shape == x.shape  # inference asks for no bounds
    with pytest.raises(ValueError, match="got r_max=2 with renorm=False: set renorm=True, or leave the bounds out"):
        model.plain(x, r_max=2)


def test_shared_over_an_axis():
    x, _ = inputs((2, 8, 3))
    layer = jl.BatchNorm(use_running_average=False, renorm=True, axis_name="d", **BOUNDS)
    variables = layer.init(jax.random.key(0), x[0])
    y, new = jax.vmap(lambda x: layer.apply(variables, x, mutable=["batch_stats"]), axis_name="d", out_axes=(0, None))(
        x
    )
    want, state = jbn.bn_train(*jbn.bn_init(3), x.reshape(16, 3), renorm=jbn.Renorm(**BOUNDS))
    assert_same(y.reshape(16, 3), want, n=16)
    assert_same(new["batch_stats"], state._asdict(), n=16)


def test_recalibration_and_checkpoints_know_no_difference():
    x, _ = inputs((8, 3))
    layer = jl.BatchNorm(renorm=True, **BOUNDS)
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    assert jax.tree.structure(variables) == jax.tree.structure(nn.BatchNorm(True).init(jax.random.key(0), x))
    got = jl.recalibrate(layer, variables, [x[:4], x[4:]], use_running_average=False, r_max=3.0, d_max=5.0)
    assert_same(got["batch_stats"]["var"], jnp.var(x, 0), n=8)
    model = jx.BatchNorm(3, renorm=True, rngs=nnx.Rngs(0))
    jx.recalibrate(model, [x[:4], x[4:]], r_max=jnp.float32(3), d_max=5.0)
    assert_same(model.var[...], jnp.var(x, 0), n=8)


@STEPS
@pytest.mark.parametrize(
    "options, call, error, message",
    [
        ({}, BOUNDS, ValueError, "got r_max=1.5 and d_max=0.4 with renorm=False: set renorm=True"),
        ({"d_max": 2.0}, {}, ValueError, "got d_max=2.0 with renorm=False"),
        ({"renorm": True}, {"d_max": 1}, TypeError, "r_max is None, expected a real number >= 1: give one"),
        ({"renorm": True, "r_max": 1}, {}, TypeError, "d_max is None, expected a real number >= 0: give one"),
        ({"renorm": True, "d_max": 1}, {"r_max": 0.5}, ValueError, "r_max is 0.5, expected a number >= 1"),
        ({"renorm": True}, {"r_max": np.ones(3), "d_max": 1}, ValueError, r"r_max has shape \(3,\), expected a scalar"),
    ],
)
def test_errors(step, options, call, error, message):
    with pytest.raises(error, match=message):
        step(options, *inputs((4, 3)), **call)
