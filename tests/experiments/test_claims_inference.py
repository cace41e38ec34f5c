"""Population statistics in one pass with virtual batches are those that `recalibrate` finds batch by batch."""

import jax
import numpy as np

from experiments.claims import inference
from jbn.linen import recalibrate


def test_one_pass_pools_the_batches():
    told = {"features": (4, 3)}
    x = jax.random.normal(jax.random.key(0), (12, 5)) + 1
    model = inference.network(told, momentum=0.9)
    variables = model.init(jax.random.key(1), x, train=False)
    pooling = inference.network(told, momentum=0.0, virtual_batch_size=4)
    found = pooling.apply(variables, x, train=True, mutable=["batch_stats"])[1]
    expected = recalibrate(model, variables, list(x.reshape(3, 4, 5)), train=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found["batch_stats"],
        expected["batch_stats"],
    )
