"""The arithmetic of the experiment on the identity: its errors, and the distance from the identity that it tells."""

import numpy as np
import pytest

from experiments.claims.identity import EPS, distance, error, half_squares
from experiments.material.models import EPSILON

X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32) * [1, 10, 100] + np.float32([0, 5, 300])


def variables(scale, bias):
    stats = {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}
    params = {"scale": np.float32(scale), "bias": np.float32(bias)}
    return {"params": {"BatchNorm_0": params}, "batch_stats": {"BatchNorm_0": stats}}


def test_error_is_rounding_and_a_constant_feature_has_none():
    assert 0 < error(X.astype(np.float32)) < 8 * EPS
    assert error(np.full((5, 2), 0, np.float32)) == 0


def test_half_squares_are_of_unit_curvature():
    assert half_squares(np.float32([[1, 2], [3, 4]]), np.zeros((2, 2), np.float32)) == (5 + 25) / 2 / 2


def test_distance_from_the_identity_on_the_whole_batch():
    x = X.astype(np.float32)
    mean, var = x.astype(np.float64).mean(0), x.astype(np.float64).var(0)
    std = np.sqrt(var + EPSILON)
    at = distance(x, len(x))(variables(std, mean))
    assert at["missed"] < 1e-10 and at["off"] < 1e-5
    off = distance(x, len(x))(variables(std * [1, 1, 0.5], mean + np.sqrt(var) * [0, 2, 0]))
    assert off["off"] == pytest.approx(2, rel=1e-4)
    assert off["missed"] == pytest.approx((4 + 0.25) / 3, rel=1e-4)  # a mean off by 2σ, and half of the deviations


def test_batches_miss_what_their_own_statistics_take_away():
    x = X.astype(np.float32)
    mean, std = x.astype(np.float64).mean(0), np.sqrt(x.astype(np.float64).var(0) + EPSILON)
    found = distance(x, 15)(variables(std, mean))["missed"]
    batches = x[:30].astype(np.float64).reshape(2, 15, 3)
    normal = (batches - batches.mean(1, keepdims=True)) / np.sqrt(batches.var(1, keepdims=True) + EPSILON)
    missed = np.square(normal * std + mean - batches).mean((0, 1)) / x.astype(np.float64).var(0)
    assert found == pytest.approx(missed.mean(), rel=1e-4)
