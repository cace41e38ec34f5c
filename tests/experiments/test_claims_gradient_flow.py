"""The theory's rates against a simulation of one layer in NumPy float64, and the gradients the measurement takes."""

import jax
import numpy as np
import pytest

from experiments.claims import gradient_flow


def simulated(relu, batch, channels, rng):
    """The factor by which one layer multiplies an isotropic gradient covariance, channels drawn independently."""
    centre = np.eye(batch) - 1 / batch
    v = rng.standard_normal((channels, batch)) @ centre
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    x = np.maximum(v, 0) if relu else v
    kappa = batch * ((x @ centre) ** 2).sum() / channels / (batch - 1)  # of the next layer's inputs, within the batch
    slope = (v > 0) if relu else np.ones_like(v)
    back = rng.standard_normal((channels, batch)) @ centre * slope @ centre
    back -= v * (v * back).sum(1, keepdims=True)
    inverse = batch / (kappa * (batch - 3))  # E 1 / ‖h‖² of a chi-squared of batch - 1 degrees, times batch
    return inverse * (back**2).sum() / channels / (batch - 1)


@pytest.mark.parametrize(("activation", "batch"), [("relu", 6), ("relu", 32), ("linear", 6), ("linear", 32)])
def test_theory(activation, batch):
    found = simulated(activation == "relu", batch, 200_000, np.random.default_rng(0))
    assert gradient_flow.theory(activation, batch) == pytest.approx(found, rel=0.01)


def test_theory_of_large_batches():
    assert gradient_flow.theory("relu", 1e6) == pytest.approx(np.pi / (np.pi - 1), rel=1e-5)


def test_noise_gradients_are_those_of_the_layers_outputs():
    """The last layer's: the gradient of normalization, in float64, of what the loss gives."""
    depth, width, batch, key = 2, 5, 4, jax.random.key(3)
    inputs, direction, weights = jax.random.split(key, 3)

    def normalized(h):
        centred = h - h.mean(0)
        return centred / np.sqrt((centred**2).mean(0) + 1e-5)

    x = normalized(np.array(jax.random.normal(inputs, (batch, width)), np.float64))
    h = x
    for layer in jax.random.split(weights, depth):
        h = x @ np.array(jax.random.normal(layer, (width, width)), np.float64) / np.sqrt(width)
        x = normalized(h)
    g = np.array(jax.random.normal(direction, (batch, width)), np.float64)
    g = (g - g.mean(0) - x * (g * x).mean(0)) / np.sqrt(h.var(0) + 1e-5)
    found = jax.jit(lambda key: gradient_flow.noise_gradients(lambda x: x, depth, width, batch, key))(key)
    assert found.shape == (depth,)
    np.testing.assert_allclose(found[-1], np.log((g**2).sum()), rtol=1e-5, atol=1e-5)
