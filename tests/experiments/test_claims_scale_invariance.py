"""The arithmetic of the experiment on scale invariance: its factors, the change it tells, the slope it fits."""

import numpy as np
import pytest

from experiments.claims.scale_invariance import change, compare, scales, slopes


def test_the_middle_scale_is_exactly_one():
    assert scales({"per_decade": 4})[[0, 12, 24]].tolist() == [1e-3, 1, 1e3]


def test_change_is_relative_to_the_largest_value_at_the_middle_scale():
    values = np.array([[4.0, 1.0], [4.0, 2.0], [3.0, -2.0]], np.float32)
    np.testing.assert_array_equal(change(values), [0.25, 0, 1])


def test_slope_of_a_power_law():
    configuration = {"per_decade": 1}
    norms = np.stack([7 / scales(configuration), 3 * scales(configuration) ** 2])
    np.testing.assert_allclose(slopes(configuration, norms), [-1, 2], rtol=1e-12)


def test_epsilon_shrinks_the_output_as_the_design_says():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(30, 5)).astype(np.float32), rng.normal(size=(5, 100)).astype(np.float32)
    readout, factors = np.zeros((100, 10), np.float32), np.array([0.01, 1, 100], np.float32)
    found = compare(x, np.zeros(30, np.int32), weights, readout, factors, True, np.float32(0.5))

    products = x.astype(np.float64) @ weights
    var = products.var(0)
    normal = (products - products.mean(0)) / np.sqrt(var + 0.5)
    shrunk = np.sqrt((var + 0.5) / (var + 0.5 / np.array([[0.01], [1], [100]]) ** 2))
    expected = np.abs(normal * (shrunk[:, None] - 1)).max((1, 2)) / np.abs(normal).max()
    assert np.asarray(found["output"]) == pytest.approx(expected, rel=1e-5)
