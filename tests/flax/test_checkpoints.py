"""Checkpoints that Flax's models and ours write load in one another, through orbax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx

X = jnp.asarray(np.random.default_rng(0).normal(1, 2, (16, 3)), jnp.float32)
WAYS = pytest.mark.parametrize("write, read", [(0, 1), (1, 0)], ids=["ours to Flax", "Flax to ours"])


def through_disk(path, state, target):
    """What was written as `state`, read as `target`, which may be abstract."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", state)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "checkpoint", target)


class LinenNet(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(self.norm(use_bias=False)(nn.Dense(4)(x), use_running_average=not train))
        return self.norm(momentum=0.5, name="last")(nn.Dense(2)(x), use_running_average=not train)


@WAYS
def test_linen(tmp_path, write, read):
    writer, reader = ((LinenNet(jbn.linen.BatchNorm), LinenNet(nn.BatchNorm))[i] for i in (write, read))
    variables = writer.init(jax.random.key(0), X, False)
    _, update = writer.apply(variables, X, True, mutable=["batch_stats"])
    trained = {**variables, **update}

    target = jax.eval_shape(lambda: reader.init(jax.random.key(1), X, False))
    restored = through_disk(tmp_path, trained, target)
    jax.tree.map(np.testing.assert_array_equal, restored, trained)
    oracle.assert_close(reader.apply(restored, X, False), writer.apply(trained, X, False), factor=16)


class NnxNet(nnx.Module):
    def __init__(self, norm, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = norm(4, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)
        self.last = norm(2, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.out(nnx.relu(self.norm(self.hidden(x)))))


@WAYS
def test_nnx(tmp_path, write, read):
    norms = jbn.nnx.BatchNorm, nnx.BatchNorm
    writer = NnxNet(norms[write], nnx.Rngs(0))
    writer(X)  # moves the statistics
    trained = nnx.state(writer)

    graph, target = nnx.split(nnx.eval_shape(lambda: NnxNet(norms[read], nnx.Rngs(1))))
    restored = through_disk(tmp_path, trained, target)
    jax.tree.map(np.testing.assert_array_equal, restored, trained)
    reader = nnx.merge(graph, restored)
    assert type(reader.norm) is norms[read]
    writer.eval()
    reader.eval()
    oracle.assert_close(reader(X), writer(X), factor=16)
