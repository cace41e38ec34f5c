"""The arithmetic of experiments/claims/regularization.py: dropout, groups, and which rows are compared."""

import functools

import jax
import numpy as np
import pytest

from experiments.claims.regularization import Network, configuration, parts, rows_of

X = np.random.default_rng(0).normal(size=(8, 14, 14, 1)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("group", "dropout"))
def logits(train, seed=0, group=None, dropout=0.5):
    model = Network((16,), group=group, dropout=dropout)
    variables = model.init(jax.random.key(0), X, train=False)
    told = {"train": train, "mutable": ["batch_stats", "intermediates"], "rngs": {"dropout": jax.random.key(seed)}}
    return model.apply(variables, X, **told)[0]


def test_dropout_is_of_training_alone():
    assert not np.allclose(logits(True), logits(True, seed=1))
    np.testing.assert_array_equal(logits(False), logits(False, seed=1))
    np.testing.assert_allclose(logits(True, dropout=0.0), logits(False), atol=1e-6)


def test_dropout_keeps_the_mean():
    many = jax.jit(jax.vmap(lambda seed: logits(True, seed)))(np.arange(400)).mean(0)
    np.testing.assert_allclose(many, logits(False), atol=0.3)


def test_groups_have_statistics_of_their_own():
    whole, halves = (logits(True, dropout=0.0, group=group) for group in (8, 4))
    assert not np.allclose(whole, halves, atol=1e-2)


@pytest.mark.parametrize("better", [0.2, 0.5])
def test_dropout_is_chosen_on_other_seeds(better):
    settings = configuration(False)
    choices = {0.0: 0.3, 0.2: 0.2, 0.5: 0.2, better: 0.1}
    rows = [{**part, "error_of_choice": choices[part["dropout"]]} for part in parts(settings)]
    for network in ("no norm", "batch norm"):
        off, on = rows_of(rows, settings, network, 1000)
        assert (off["dropout"], on["dropout"]) == (0.0, better)
        assert {row["network"] for row in (off, on)} == {network}
        assert {row["group"] for row in (off, on)} == {128 if network == "batch norm" else None}
