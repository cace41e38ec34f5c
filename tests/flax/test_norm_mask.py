"""Masks of norms' parameters, and what they are for: no decay of them, and freezing, end to end."""

import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from layers import assert_equal, inputs, small

import jbn.linen
import jbn.nnx

NORMS = ("BatchNorm_0", "BatchNorm_1", "LayerNorm_0", "GroupNorm_0", "InstanceNorm_0", "RMSNorm_0")


def network(x):
    """Every norm of Flax, ours, ones of a single parameter, and layers that share their names."""
    x = nn.Dense(4)(nn.Embed(5, 4)(jnp.argmax(x, -1)) + x)
    x = jbn.linen.BatchNorm(False, use_bias=False)(nn.BatchNorm(use_scale=False)(x, use_running_average=False))
    x = nn.RMSNorm()(nn.InstanceNorm()(nn.GroupNorm(2)(nn.LayerNorm()(x)[:, None])))[:, 0]
    return nn.WeightNorm(nn.Dense(4))(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.vmap(nn.LayerNorm, variable_axes={"params": 0}, split_rngs={"params": True})(name="stacked")(x)
        return nn.MultiHeadDotProductAttention(2, normalize_qk=True)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.again = self.layers[1]
        self.ours = jbn.nnx.BatchNorm(4, use_scale=False, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(4, rngs=rngs), nnx.GroupNorm(4, 2, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)])
        self.scale = nnx.Param(jnp.ones(4))  # of no norm

    def __call__(self, x):
        x = self.ours(self.again(self.layers[1](self.layers[0](x))))
        for norm in self.norms:
            x = norm(x)
        return x * self.scale


def linen_params(model, *shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.ones(shape))["params"]


def test_linen():
    params = linen_params(small(network), 8, 4)
    mask = jbn.linen.norm_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    found = {path[0].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(mask)}
    assert {name for name, leaf in found.items() if leaf} == {*NORMS}
    assert len(found) > len(NORMS) + 2
    params = freeze(linen_params(Attention(), 2, 3, 4))
    mask = jbn.linen.norm_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    true = {jax.tree_util.keystr(p) for p, leaf in jax.tree_util.tree_leaves_with_path(mask) if leaf}
    attention = "['MultiHeadDotProductAttention_0']"
    assert true == {"['stacked']['scale']", "['stacked']['bias']"} | {
        f"{attention}['{which}_ln']['scale']" for which in ("query", "key")
    }


def test_nnx():
    model = Nnx(nnx.Rngs(0))
    mask = jbn.nnx.norm_mask(model)
    assert jax.tree.structure(mask) == jax.tree.structure(nnx.as_pure(nnx.state(model, nnx.Param)))
    true = {".".join(map(str, path)) for path, leaf in nnx.to_flat_state(mask) if leaf}
    norms = ("again.scale", "again.bias", "ours.bias", "norms.0.scale", "norms.0.bias", "norms.1.scale")
    assert true == {*norms, "norms.1.bias", "norms.2.scale"}
    assert jax.tree.leaves(jbn.nnx.norm_mask(model, nnx.All(nnx.Param, nnx.PathContains("ours")))) == [True]


# In training: a model of others', all of whose parameters start at what is not zero.

X, DY = inputs((8, 4))


def linen_steps(transform):
    """Mask, variables before and after two steps in training mode, with statistics frozen."""
    model = small(lambda x: nn.Dense(4)(nn.relu(nn.BatchNorm(False)(nn.Dense(4)(x)))))
    before = jax.tree.map(lambda v: v + 0.5, model.init(jax.random.key(0), X))
    mask = jbn.linen.norm_mask(before["params"])
    tx = transform(mask)

    @jax.jit
    def step(variables, state):
        def loss(params):
            y, updates = model.apply({**variables, "params": params}, X, mutable=["batch_stats"])
            return jnp.sum(y * DY), updates

        gradient, updates = jax.grad(loss, has_aux=True)(variables["params"])
        change, state = tx.update(gradient, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], change), **updates}, state

    after, state = before, tx.init(before["params"])
    with jbn.linen.replacing(use_running_average=True):
        for _ in range(2):
            after, state = step(after, state)
    return mask, before["params"], after["params"], before["batch_stats"], after["batch_stats"]


def nnx_steps(transform):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs))
    nnx.update(model, jax.tree.map(lambda v: v + 0.5, nnx.state(model)))
    mask = jbn.nnx.norm_mask(model)
    optimizer = nnx.Optimizer(model, transform(mask), wrt=nnx.Param)
    model.set_attributes(nnx.BatchNorm, use_running_average=True)
    before = nnx.clone(model)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(X) * DY))(model))

    for _ in range(2):
        step(model, optimizer)
    return mask, *(nnx.state(m, kind) for kind in (nnx.Param, nnx.BatchStat) for m in (before, model))


def decay(mask):
    """Of what is not a norm's; the step itself is nothing."""
    mask = jax.tree.map(operator.not_, mask)
    return optax.chain(optax.scale(0.0), optax.add_decayed_weights(0.1, mask), optax.scale(-1.0))


def frozen(mask):
    return optax.chain(optax.adamw(0.1), optax.masked(optax.set_to_zero(), mask))


def labelled(mask):
    labels = jax.tree.map(lambda norm: "norm" if norm else "rest", mask)
    return optax.multi_transform({"norm": optax.set_to_zero(), "rest": optax.sgd(0.1)}, labels)


@pytest.mark.parametrize("steps", [linen_steps, nnx_steps])
@pytest.mark.parametrize("transform", [decay, frozen, labelled])
def test_what_is_masked_stays_and_all_else_moves(steps, transform):
    mask, before, after, stats_before, stats_after = steps(transform)
    for norm, old, new in zip(*map(jax.tree.leaves, (mask, before, after)), strict=True):
        assert np.all(old == new) == norm
    assert_equal(stats_before, stats_after)


def test_optax_calls_it_itself():
    """On parameters, and, beneath another mask, on what that has left of them."""
    tx = optax.masked(
        optax.masked(optax.set_to_zero(), jbn.linen.norm_mask), {"d": {"kernel": False, "bias": True}, "n": True}
    )
    params = {"d": {"kernel": np.ones(2), "bias": np.ones(2)}, "n": {"scale": np.ones(2)}}
    updates, _ = tx.update(params, tx.init(params))
    assert_equal(updates, {**params, "n": {"scale": np.zeros(2)}})


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: jbn.linen.norm_mask(nn.Dense(3)), TypeError, r"params is a Dense, .* give variables\['params'\]"),
        (
            lambda: jbn.linen.norm_mask({"params": {}, "batch_stats": {}}),
            ValueError,
            "params has .* params, batch_stats",
        ),
        (
            lambda: jbn.linen.norm_mask({"Dense_0": {"bias": np.ones(2), "kernel": 1}}),
            ValueError,
            "of Dense_0, have no",
        ),
        (lambda: jbn.nnx.norm_mask(nnx.state(Nnx(nnx.Rngs(0)))), TypeError, "model is a State, .* not its state"),
        (lambda: jbn.nnx.norm_mask(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), ValueError, "a Linear, has no norm with such"),
        (
            lambda: jbn.nnx.norm_mask(Nnx(nnx.Rngs(0)), nnx.Cache),
            ValueError,
            "has no norm with such variables: .*RMSNorm",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
