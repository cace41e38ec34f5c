"""jax.checkpoint with the names that bn_train gives: the affine pass is redone, the reductions are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import operations

import jbn

pytestmark = pytest.mark.usefixtures("strict")

NAMES = jax.checkpoint_policies.save_only_these_names("bn_input", "bn_stats")
PARAMS, STATE = jbn.bn_init(5)
U, W1, W2 = (
    np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate([(64, 4), (4, 5), (5, 3)])
)


def layer(u, w1, w2, params, mask=None):
    """Two matrix products about a batch norm, and an activation that would want its input saved."""
    y, _ = jbn.bn_train(params, STATE, u @ w1, activation="silu", mask=mask)
    return jnp.sin(y) @ w2


def reductions(policy, mask):
    """How many reductions forward and backward ask for; XLA on CPU may merge what is redone, which helps no GPU."""
    f = layer if policy is None else jax.checkpoint(layer, policy=policy)
    grad = jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2, 3)))
    return operations(grad.lower(U, W1, W2, PARAMS, mask))["reduce"]


@pytest.mark.parametrize("masked", [False, True])
def test_the_names_save_the_reductions(masked):
    mask = np.arange(64)[:, None] % 3 > 0 if masked else None
    everything = reductions(None, mask)
    assert reductions(NAMES, mask) == everything
    assert reductions(jax.checkpoint_policies.nothing_saveable, mask) > everything  # else this test sees nothing


@pytest.mark.parametrize("masked", [False, True])
def test_the_names_save_one_activation(masked):
    mask = np.arange(64)[:, None] % 3 > 0 if masked else None
    h = U @ W1

    def saved(f):
        """What the backward pass keeps, of h's size and not an argument."""
        _, pull = jax.vjp(lambda *a: f(*a, mask), U, W1, W2, PARAMS)
        return [np.asarray(a) for a in jax.tree.leaves(pull) if np.shape(a) == h.shape]

    (kept,) = saved(jax.checkpoint(layer, policy=NAMES))
    np.testing.assert_allclose(kept, h, rtol=1e-5, atol=1e-5)
    assert len(saved(layer)) > 1
    assert saved(jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)) == []


@pytest.mark.parametrize("policy", [NAMES, jax.checkpoint_policies.nothing_saveable], ids=["names", "nothing"])
def test_the_gradients_stay_the_same(policy):
    def grads(f):
        return jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2, 3)))(U, W1, W2, PARAMS)

    for got, want in zip(
        *map(jax.tree.leaves, (grads(jax.checkpoint(layer, policy=policy)), grads(layer))), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
