"""The arithmetic of the experiment on placement: its network, its gradients, the rates it chooses."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from experiments.claims.placement import Network, bias_gradient, bias_ratio, chosen
from experiments.material.models import MLP

X = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
CONFIGURATION = {"choosing_seeds": 1}
ROW = {  # (2 seeds, 2 activations, 2 rates, 2 evaluations)
    "accuracy": [[[[0.9, 0.1], [0.1, 0.2]], [[0.9, 0.3], [0.1, 0.2]]], [[[0, 0.4], [0, 0.5]], [[0, 0.6], [0, 0.7]]]],
    "bias": [[[[9, 9], [9, 9]], [[9, 9], [9, 9]]], [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]],
}


@pytest.mark.parametrize(("is_relu", "activation"), [(True, nn.relu), (False, nn.sigmoid)])
def test_batch_norm_before_the_activation_is_the_common_network(is_relu, activation):
    common = MLP(features=(5, 4), activation=activation)
    network = Network((5, 4), use_bias=False, is_after=np.bool_(False), is_relu=np.bool_(is_relu))

    @jax.jit
    def outputs(key):
        variables = common.init(key, X, train=False)
        return [model.apply(variables, X, train=True, mutable=["batch_stats"])[0] for model in (network, common)]

    np.testing.assert_allclose(*outputs(jax.random.key(0)), rtol=1e-6, atol=1e-6)


def test_a_bias_matters_only_after_the_activation():
    labels = np.arange(20) % 10

    @jax.jit
    def ratio(key, is_after):
        network = Network((5, 4), use_bias=True, is_after=is_after, is_relu=np.bool_(False))
        return bias_gradient(network, network.init(key, X, train=False), X, labels)

    assert 1e-3 < ratio(jax.random.key(0), True) < 1e3
    assert ratio(jax.random.key(0), False) < 1e-5


def test_rates_are_chosen_by_the_last_accuracy_of_the_choosing_seeds():
    relu, sigmoid = (chosen(ROW, activation, CONFIGURATION) for activation in ("relu", "sigmoid"))
    assert relu[0] == pytest.approx(np.array([[40, 50]])) and relu[1] == 1
    assert sigmoid[0] == pytest.approx(np.array([[60, 70]])) and sigmoid[1] == 0


def test_gradients_are_those_at_the_chosen_rates():
    assert bias_ratio(ROW, CONFIGURATION).tolist() == [[[3, 4], [5, 6]]]
