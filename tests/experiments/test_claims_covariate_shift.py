"""The noise after batch norm, the shift, and what is watched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.claims import covariate_shift
from experiments.material.models import MLP


def test_shift():
    watched = np.zeros((3, 3, 2))
    watched[1, 0, 0], watched[2, 0, 0] = 6.0, 3.0
    np.testing.assert_allclose(covariate_shift.shift(watched), [1.0, 0.5])


def test_noise_has_its_mean_and_scale():
    x = jax.random.normal(jax.random.key(0), (2_000, 300))
    means, stds = (f(covariate_shift.noisy(jax.random.key(1), x, 1.0), 0) for f in (jnp.mean, jnp.std))
    for found, (low, high), expected in ((means, (-0.6, 0.6), 0.0), (stds, (0.93, 1.33), 1.13)):
        assert low < found.min() and found.max() < high
        assert abs(found.mean() - expected) < 0.06
    np.testing.assert_array_equal(covariate_shift.noisy(jax.random.key(1), x, 0.0), x)
    assert means.std() > 0.25  # of a uniform distribution over an interval of length 1: 0.29


def test_noisy_batch_norm_draws_anew_in_training_and_has_none_in_inference():
    model = MLP(functools.partial(covariate_shift.NoisyBatchNorm, 1.0), (3,), activation=nn.sigmoid)
    x = jax.random.normal(jax.random.key(0), (8, 5))
    variables = model.init(jax.random.key(1), x, train=False)
    first, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    second, _ = model.apply({**variables, **updates}, x, train=True, mutable=["batch_stats"])
    assert abs(first - second).max() > 1e-3
    plain = {"params": {**variables["params"], "BatchNorm_0": variables["params"]["NoisyBatchNorm_0"]["BatchNorm_0"]}}
    plain["batch_stats"] = {"BatchNorm_0": variables["batch_stats"]["NoisyBatchNorm_0"]["BatchNorm_0"]}
    del plain["params"]["NoisyBatchNorm_0"]
    expected = MLP(features=(3,), activation=nn.sigmoid).apply(plain, x, train=False)
    np.testing.assert_array_equal(model.apply(variables, x, train=False), expected)


def test_inputs_of_the_last_sigmoids():
    model = MLP(None, (4, 3), activation=nn.sigmoid)
    x = jax.random.normal(jax.random.key(0), (6, 5))
    variables = model.init(jax.random.key(1), x, train=False)
    w = jax.tree.map(np.array, variables["params"])
    hidden = 1 / (1 + np.exp(-(x @ w["Dense_0"]["kernel"] + w["Dense_0"]["bias"])))
    found = covariate_shift.inputs_of(model, variables, x, "Dense_1")
    np.testing.assert_allclose(found, hidden @ w["Dense_1"]["kernel"] + w["Dense_1"]["bias"], rtol=1e-5, atol=1e-6)
