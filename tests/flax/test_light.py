"""What changing the import costs before a step runs: operations and lines of StableHLO, beside Flax's own."""

import re
from collections import Counter
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from hlo import operations

import jbn.linen
from experiments.material.models import Bottleneck, norm_relu

NORMS = {"flax": (nn.BatchNorm, False), "jbn": (jbn.linen.BatchNorm, False), "fused": (jbn.linen.BatchNorm, True)}
LINES = {"cpu": 0.9, "cuda": 0.8, "tpu": 0.8}  # at most so many times Flax's
OPERATIONS = {"cpu": 1.7, "cuda": 1.55, "tpu": 1.55}


class Dense(nn.Module):
    """Layers of dense, norm and relu."""

    layers: int
    norm: type
    fused: bool

    @nn.compact
    def __call__(self, x):
        norm = partial(self.norm, use_running_average=False)
        for _ in range(self.layers):
            x = norm_relu(norm, self.fused, nn.Dense(64, use_bias=False)(x))
        return x


class Blocks(Dense):
    """ResNet-50's blocks: a norm of the sum with a residual in each."""

    @nn.compact
    def __call__(self, x):
        norm = partial(self.norm, use_running_average=False)
        for i in range(self.layers):
            x = Bottleneck(16, 2 if i == self.layers // 2 else 1, norm, fused=self.fused)(x)
        return x


NETWORKS = {"dense": (Dense, 8, (4096, 64)), "blocks": (Blocks, 6, (32, 16, 16, 8))}


@cache
def traced(network, norm):
    """The gradients of a training step."""
    module, layers, shape = NETWORKS[network]
    model = module(layers, *NORMS[norm])
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params, stats, x):
        y, updates = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.sum(y**2), updates

    return jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(variables["params"], variables["batch_stats"], x)


@cache
def step(network, norm, platform):
    return traced(network, norm).lower(lowering_platforms=(platform,))


def lines(lowered) -> int:
    return lowered.as_text().count("\n")


@pytest.mark.parametrize("platform", LINES)
@pytest.mark.parametrize("norm", ["jbn", "fused"])
@pytest.mark.parametrize("network", NETWORKS)
def test_programs_have_fewer_lines_and_few_more_operations(network, norm, platform):
    ours, theirs = step(network, norm, platform), step(network, "flax", platform)
    assert lines(ours) <= LINES[platform] * lines(theirs)
    assert operations(ours).total() <= OPERATIONS[platform] * operations(theirs).total()


@pytest.mark.parametrize("platform", LINES)
def test_pieces_are_lowered_once_and_called(platform):
    """What layers of one shape compute stands once in the program, and each calls it."""
    text = step("dense", "fused", platform).as_text()
    layers = NETWORKS["dense"][1]
    passes = ["bn_apply", "bn_gradient_input", "bn_gradient_sums", "bn_moments"]
    assert sorted(re.findall(r"func\.func private @(bn_\w+)", text)) == passes
    assert Counter(re.findall(r"call @(bn_\w+)", text)) == {name: layers for name in passes}


def busiest(norm, relu):
    """The most operations for a byte in a loop over little x: gradients of a loss of y alone, so ȳ is made of x."""
    kind, fused = NORMS[norm]
    layer = kind(use_running_average=False, **{"activation": "relu"} if relu and fused else {})

    def loss(params, stats, x):
        y, updates = layer.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        y = nn.relu(y) if relu and not fused else y
        return jnp.mean(y * y), updates

    x = jax.ShapeDtypeStruct((128, 32), jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    step = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))
    text = step.lower(variables["params"], variables["batch_stats"], x).compile().as_text()
    bodies = dict(re.findall(r"^%(\S+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    found = []
    for called in re.findall(r"= f32\[128,32\]\S* fusion\(.*kind=kLoop, calls=%([\w.]+)", text):
        steps = Counter(re.findall(r"= (?:f32|pred)\[128,32\]\S* (\w+)\(", bodies[called]))
        found.append((steps.total() - steps["parameter"] - steps["broadcast"]) / (4 * (steps["parameter"] + 1)))
    assert len(found) >= 4
    return max(found)


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_of_little_x_wake_no_thread_that_flax_leaves_asleep(relu):
    """XLA gives a CPU's threads the loops with more than an operation for a byte, and waking them takes longer."""
    assert busiest("fused" if relu else "jbn", relu) <= max(busiest("flax", relu), 1)
