"""The arithmetic of the experiment on initialization: rates chosen on some seeds, scales counted on the others."""

import numpy as np
import pytest

from experiments.claims.initialization import best, effects, scales, tuned, untuned

CONFIGURATION = {"per_decade": 1, "choosing_seeds": 1, "target": 0.9}
RATES = [[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 1], [1, 0]]  # the best of two at each of the seven scales


def accuracies(high, low):
    """One choosing seed, whose best rates are `RATES`, and one measured: `high` at those rates, `low` at the others."""
    measured = [[h if r else w for r in rates] for rates, h, w in zip(RATES, high, low, strict=True)]
    return {"accuracy": [RATES, measured]}


HIGH, LOW = [0.2, 0.9, 0.95, 0.97, 0.95, 0.9, 0.3], [0.99, 0.1, 0.1, 0.1, 0.6, 0.1, 0.1]


def test_the_middle_scale_is_exactly_one():
    assert scales({"per_decade": 2})[[0, 6, 12]].tolist() == [1e-3, 1, 1e3]


def test_rates_are_chosen_on_the_choosing_seeds_alone():
    row = accuracies(HIGH, LOW)
    assert best(row, CONFIGURATION).tolist() == np.argmax(RATES, 1).tolist()
    assert tuned(row, CONFIGURATION).tolist() == [HIGH]
    assert untuned(row, CONFIGURATION).tolist() == [[0.99, 0.1, 0.95, 0.97, 0.6, 0.9, 0.1]]


def test_effects():
    rows = [{"network": "batch norm", **accuracies(HIGH, LOW)}, {"network": "no norm", **accuracies([0.9] * 7, LOW)}]
    found = effects(rows, CONFIGURATION)
    assert found["range"] == [5 - 7]
    assert found["independence"] == pytest.approx([97 - 10])
