"""The arithmetic of experiments/claims/feature_scaling.py: R², and the choice of the optimizer."""

import jax
import numpy as np
import optax
import pytest

from experiments.claims.feature_scaling import adam_if, at_best, r_squared


def test_r_squared():
    y = np.array([1.0, 2.0, 3.0, 6.0], np.float32)
    predicted = np.array([1.5, 2.0, 3.0, 5.0], np.float32)
    assert float(r_squared(predicted, y)) == pytest.approx(1 - (0.25 + 1) / (4 + 1 + 0 + 9))
    assert float(r_squared(np.full(4, 3.0), y)) == 0  # the mean
    assert float(r_squared(-y, y)) == 0
    assert float(r_squared(predicted * np.nan, y)) == 0


@pytest.mark.parametrize("wanted", [True, False])
def test_adam_or_nothing(wanted):
    params, optimizer, adam = np.ones(3, np.float32), adam_if(wanted), optax.scale_by_adam()
    state, expected_state = optimizer.init(params), adam.init(params)
    for gradient in (np.float32([1, -2, 0.5]), np.float32([0.1, 3, -0.5])):
        updates, state = optimizer.update(gradient, state, params)
        expected, expected_state = adam.update(gradient, expected_state, params)
        np.testing.assert_array_equal(updates, expected if wanted else gradient)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)


def test_the_rate_is_chosen_on_other_seeds():
    configuration = {"choosing_seeds": 2, "learning_rates": (0.1, 1.0)}
    rows = [{"method": "a", "r2": [[0.2, 0.1], [0.2, 0.5], [0.9, 0.4], [0.8, 0.3]]}]
    rate, r2 = at_best(rows, configuration, method="a")
    assert rate == 1.0
    np.testing.assert_array_equal(r2, [0.4, 0.3])
