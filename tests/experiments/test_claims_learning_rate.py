"""The arithmetic of the experiment on learning rates: which work, how many, and which is compared."""

import numpy as np
import pytest

from experiments.claims.learning_rate import effects, equal, rates, working

CONFIGURATION = {"decades": (-1, 1), "per_decade": 2, "working_loss": 0.3, "choosing_seeds": 1}


def row(network, losses, accuracies):
    return {"network": network, "loss": losses, "accuracy": accuracies}


ROWS = [
    row("batch norm", [[2.0, 0.1, 0.1, 0.2, 0.3], [2.0, 0.1, 0.4, 0.2, None]], [[0.5] * 5, [0.5, 0.7, 0.9, 0.8, 0.1]]),
    row(
        "no norm", [[2.0, 0.2, 0.25, None, None], [0.1, 2.0, None, None, None]], [[0.5] * 5, [0.9, 0.6, 0.0, 0.0, 0.0]]
    ),
]


def test_rates_are_even_in_logarithm():
    np.testing.assert_allclose(rates(CONFIGURATION), [0.1, 10**-0.5, 1, 10**0.5, 10])


def test_the_largest_rate_that_works_and_the_decades_that_do():
    largest, decades = working(ROWS[0], CONFIGURATION)
    np.testing.assert_allclose(largest, [10, 10**0.5])
    np.testing.assert_array_equal(decades, [2, 1])  # a rate that fails in between does not count


def test_where_no_rate_works_the_lowest_stands_for_the_largest():
    largest, decades = working(row("no norm", [[2.0] * 5, [None] * 5], []), CONFIGURATION)
    assert largest.tolist() == [0.1, 0.1] and decades.tolist() == [0, 0]


def test_the_equal_rate_is_that_of_the_choosing_seeds_without_batch_norm():
    assert equal(ROWS, CONFIGURATION) == 1  # the other seed's lowest loss is at 0


def test_effects_are_of_the_measured_seeds():
    found = effects(ROWS, CONFIGURATION)
    assert found["higher"] == pytest.approx([10**1.5])
    assert found["more"] == pytest.approx([0.5])
    assert found["equal"] == pytest.approx([10])
