"""The probe of a loss along its gradient, on quadratics where all is known."""

import jax.numpy as jnp
import numpy as np

from experiments.claims import smoothness


def test_probe_of_a_quadratic():
    curvature, x, rate = np.array([1.0, 4.0]), np.array([3.0, 2.0]), 0.1
    found = smoothness.probe(lambda p: (curvature * p["x"] ** 2).sum() / 2, {"x": jnp.array(x)}, rate, 8)
    g, reaches = curvature * x, np.linspace(0.5, 4, 8)
    there = x - rate * reaches[:, None] * g
    losses = (curvature * there**2).sum(1) / 2
    changes = np.linalg.norm(curvature * there - g, axis=1)
    np.testing.assert_allclose(found["loss"], losses.max() - losses.min(), rtol=1e-5)
    np.testing.assert_allclose(found["gradient"], changes.max(), rtol=1e-5)
    np.testing.assert_allclose(found["relative"], changes.max() / np.linalg.norm(g), rtol=1e-5)
    np.testing.assert_allclose(found["beta"], np.linalg.norm(curvature * g) / np.linalg.norm(g), rtol=1e-5)


def test_numbers_that_are_not_finite_count_as_many():
    row = {"loss": [[[1.0]], [[None]], [[100.0]]]}
    np.testing.assert_array_equal(smoothness.logs(row, "loss", 0, {"choosing_seeds": 1}), [[6.0], [2.0]])
