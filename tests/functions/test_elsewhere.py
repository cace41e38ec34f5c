"""The functional API where there is no Flax: in an Equinox module, and in a training loop that is one `lax.scan`."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P

import jbn

MOMENTUM = 0.9


def batches(*shape):
    return np.random.default_rng(0).normal(1, 2, shape).astype(np.float32)


def test_equinox():
    """Parameters are arrays of the module, the running state is kept as Equinox keeps that of its own batch norm."""
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")

    class BatchNorm(eqx.Module):
        params: jbn.BNParams
        state: eqx.nn.StateIndex
        inference: bool  # eqx.nn.inference_mode sets it

        def __init__(self, features):
            self.params, state = jbn.bn_init(features)
            self.state, self.inference = eqx.nn.StateIndex(state), False

        def __call__(self, x, state):
            """x is a whole batch: `bn_train` needs no vmap and no axis name."""
            running = state.get(self.state)
            if self.inference:
                return jbn.bn_eval(self.params, running, x, activation="relu"), state
            y, running = jbn.bn_train(self.params, running, x, momentum=MOMENTUM, activation="relu")
            return y, state.set(self.state, running)

    class Model(eqx.Module):
        dense: eqx.nn.Linear
        norm: BatchNorm

        def __init__(self, key):
            self.dense, self.norm = eqx.nn.Linear(3, 4, key=key), BatchNorm(4)

        def __call__(self, x, state):
            return self.norm(jax.vmap(self.dense)(x), state)

    @eqx.filter_jit
    def step(model, state, x):
        def loss(model):
            y, new = model(x, state)
            return jnp.sum(y**2), (y, new)

        gradient, (y, state) = eqx.filter_grad(loss, has_aux=True)(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.01 * g, gradient)), state, y

    model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
    mean, var = np.zeros(4), np.ones(4)
    for x in batches(3, 8, 3):
        z = jax.vmap(model.dense)(x)
        want = oracle.bn_train(z, *model.norm.params, mean, var, momentum=MOMENTUM, activation="relu")
        before = model.norm.params.bias
        model, state, y = step(model, state, x)
        oracle.assert_close(y, want.y, n=8, factor=8)
        mean, var = want.mean, want.var
        assert np.any(model.norm.params.bias != before)
    oracle.assert_state(state.get(model.norm.state), want, n=8)

    z = jax.vmap(model.dense)(x)
    y, same = eqx.nn.inference_mode(model)(x, state)
    oracle.assert_close(y, oracle.bn_eval(z, *model.norm.params, mean, var, activation="relu"), factor=8)
    assert same is state


def test_scan_over_devices(devices):
    """Every step of training in one program: `lax.scan` inside `shard_map`, statistics of the whole batch by its axis.

    The parameters, replicated, and the running state are the carry.
    """
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=devices[:4])
    xs, targets = batches(5, 8, 3), batches(5, 8, 3)[::-1] * 0.5

    def train(axis_name):
        def step(carry, batch):
            params, state = carry
            x, target = batch

            def loss(params):
                y, new = jbn.bn_train(params, state, x, momentum=MOMENTUM, activation="silu", axis_name=axis_name)
                squares = jnp.mean((y - target) ** 2)
                return squares if axis_name is None else jax.lax.pmean(squares, axis_name), new

            (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), state), value

        return lambda xs, targets: jax.lax.scan(step, jbn.bn_init(3), (xs, targets))

    shards = P(None, "data")  # steps, examples
    spread = jax.shard_map(train("data"), mesh=mesh, in_specs=(shards, shards), out_specs=P())
    (params, state), losses = jax.jit(spread)(xs, targets)
    (one_params, one_state), one_losses = jax.jit(train(None))(xs, targets)
    for got, want in zip((*params, losses), (*one_params, one_losses), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]

    mean, var = np.zeros(3), np.ones(3)
    for x in xs.astype(np.float64):
        mean, var = (MOMENTUM * old + (1 - MOMENTUM) * new for old, new in ((mean, x.mean(0)), (var, x.var(0))))
    for found in (state, one_state):
        oracle.assert_state(found, oracle.Result(None, mean, var), n=8)
