"""The arithmetic of experiments/claims/batch_size.py: blocks, norms that know no batch, bounds that open."""

import jax
import numpy as np
import pytest

from experiments.claims.batch_size import Renormalization, blocks, norm_of
from experiments.framework.plots import apart
from experiments.material.train import at_best

SETTINGS = {"use_running_average": False, "momentum": 0.9, "epsilon": 1e-5}
X = np.random.default_rng(0).normal(3, 2, (6, 4, 4, 8)).astype(np.float32)


def test_blocks():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    found = np.asarray(blocks(x, 2))
    assert found.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(found[1, 0, 2], x[1, :2, 4:].reshape(-1))


@pytest.mark.parametrize(("method", "groups"), [("group norm", 4), ("layer norm", 1), ("instance norm", 8)])
def test_norms_that_know_no_batch(method, groups):
    layer = norm_of(method, 2, {})(**SETTINGS)
    y, _ = layer.init_with_output(jax.random.key(0), X)
    grouped = X.astype(np.float64).reshape(6, 16, groups, -1)
    mean, var = (f(grouped, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    np.testing.assert_allclose(y, ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(X.shape), atol=2e-5)


def test_running_averages_look_back_over_as_many_digits():
    configuration = {"digits_seen": 1024}
    for method, size, momentum in (("batch norm", 2, 0.9 ** (1 / 64)), ("virtual batches", 2, 0.9)):
        assert norm_of(method, size, configuration)(**SETTINGS).momentum == pytest.approx(momentum)


def test_bounds_open_with_the_steps():
    """Batch norm to the quarter of the steps; at the end what inference gives, where no bound is reached."""
    layer = Renormalization(**SETTINGS, steps=8)
    variables = layer.init(jax.random.key(0), X)
    assert int(variables["batch_stats"]["step"]) == 1  # of initialization
    near = {"mean": np.full(8, 2.9, np.float32), "var": np.full(8, 4.2, np.float32)}

    def at(step):
        stats = {**variables["batch_stats"], "step": np.int32(step), "BatchNorm_0": near}
        y, updates = layer.apply({**variables, "batch_stats": stats}, X, mutable=["batch_stats"])
        assert int(updates["batch_stats"]["step"]) == step + 1
        return np.asarray(y)

    mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
    np.testing.assert_allclose(at(2), (X - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    np.testing.assert_allclose(at(8), (X - near["mean"]) / np.sqrt(near["var"] + 1e-5), atol=1e-5)


def test_at_best_chooses_on_other_seeds():
    configuration = {"seed": 0, "seeds": 5, "choosing_seeds": 2}

    @jax.jit
    def every(keys, settings, offset):
        return {"error": abs(settings[:, 0] - 3) + offset, "second": settings[:, 1]}

    found = at_best(every, configuration, [(1, 10), (2.5, 20), (4, 30)], 1.0)
    assert found["setting"].tolist() == [2.5, 20]
    assert found["error_of_choice"] == 1.5
    assert found["error"].tolist() == [1.5] * 3
    assert found["second"].tolist() == [20] * 3


@pytest.mark.parametrize(
    ("heights", "placed"),
    [([0, 20, 40], [0, 20, 40]), ([0, 1], [-4.5, 5.5]), ([0, 9, 18], [-1, 9, 19]), ([0, 30, 31, 38], [0, 23, 33, 43])],
)
def test_names_move_apart(heights, placed):
    assert apart(heights, 10) == pytest.approx(placed)
