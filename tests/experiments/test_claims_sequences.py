"""The arithmetic of experiments/claims/sequences.py: splits, steps beyond the longest, and what padding reaches."""

import jax
import numpy as np
import pytest

from experiments.claims.sequences import COLORS, Recurrent, drawn, last_known
from jbn import BNState


def test_beyond_the_longest_the_last_step_serves():
    stats = BNState(np.arange(5.0), 10 + np.arange(5.0))
    found = last_known(stats, np.array([True, True, True, False, False]))
    np.testing.assert_array_equal(found.mean, [0, 1, 2, 2, 2])
    np.testing.assert_array_equal(found.var, [10, 11, 12, 12, 12])
    np.testing.assert_array_equal(last_known(stats, np.zeros(5, bool)).mean, 0)


def test_a_split_has_each_utterance_once():
    x, y = (np.arange(10.0)[:, None], -np.arange(10)), np.arange(10)
    split = drawn(jax.random.key(0), 4, x, y)
    assert (len(split.train_y), len(split.test_y)) == (4, 6)
    assert sorted([*split.train_y.tolist(), *split.test_y.tolist()]) == list(range(10))
    for (first, second), labels in ((split.train_x, split.train_y), (split.test_x, split.test_y)):
        np.testing.assert_array_equal(first[:, 0], labels)
        np.testing.assert_array_equal(second, -labels)


@pytest.mark.parametrize("method", COLORS)
def test_padding_reaches_statistics_alone(method):
    rng = np.random.default_rng(0)
    lengths = np.array([2, 4, 3, 4])
    mask = np.arange(5)[None, :, None] < lengths[:, None, None]
    x = rng.normal(size=(4, 5, 12)).astype(np.float32)
    model = Recurrent(method, 3)
    variables = model.init(jax.random.key(0), (x, mask), train=False)
    for train in (False, True):
        logits = [
            model.apply(variables, (np.where(mask, x, padding), mask), train=train, mutable=["batch_stats"])
            for padding in (0.0, 7.0)
        ]
        alike = jax.tree.map(lambda a, b: bool(np.allclose(a, b, atol=1e-6)), *logits)
        assert jax.tree.all(alike) == (not (train and method.endswith("counted")))
        if train and method.startswith("per step"):
            assert logits[0][1]["batch_stats"]["seen"].tolist() == [True] * 4 + [method.endswith("counted")]
