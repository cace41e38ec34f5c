"""A whole ResNet's training step: the collectives that batch norm accounts for, read from the compiled program."""

import functools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.material.models import Bottleneck
from jbn.linen import BatchNorm

BLOCKS = ((4, 1), (8, 2))  # features, stride
CHANNELS = Counter([16, 4, 4, 16, 8, 8, 32, 32])  # of the norms, each once: stem, blocks, the second one's shortcut
NAMES = jax.checkpoint_policies.save_only_these_names("bn_input", "bn_stats")
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


class ResNet(nn.Module):
    """ResNet-50's blocks, few and narrow; `repeat` more of the last by `scan`."""

    block: Any = Bottleneck
    repeat: int = 0

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(BatchNorm, use_running_average=False)
        x = nn.relu(norm()(nn.Conv(16, (3, 3), (2, 2), use_bias=False)(x)))
        for features, stride in BLOCKS:
            x = self.block(features, stride, norm)(x)
        if self.repeat:
            repeated = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=self.repeat,
            )
            x, _ = repeated(self.block(*BLOCKS[-1][:1], 1, norm), x, None)
        return nn.Dense(10)(x.mean((1, 2)))


def step(model, variables, images, labels):
    """One step of SGD."""

    def loss(params):
        logits, updates = model.apply({**variables, "params": params}, images, mutable=["batch_stats"])
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, 10), -1)), updates

    (value, updates), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return {"params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient), **updates}, value


def lower(model, devices):
    """The step on a batch split over the devices, of two images each."""
    mesh = Mesh(np.array(devices), "data")
    split, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    shape = (2 * len(devices), 16, 16, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, *shape[1:])))
    variables = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=everywhere), variables)
    images = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=split)
    return jax.jit(functools.partial(step, model)).lower(variables, images, labels)


def check(model, devices, channels, spread=8):
    """One gather of 2C numbers a device and norm, one sum of 2C; besides these only sums of the parameters' gradients.

    XLA may put several sums, which do not wait for each other, into one collective: sums are told by their shapes.
    """
    found = COLLECTIVE.findall(lower(model, devices).compile().as_text())
    assert {kind for _, kind in found} == {"all-gather", "all-reduce"}
    gathered = Counter(result.partition("{")[0] for result, kind in found if kind == "all-gather")
    assert gathered == {f"f32[{spread},2,{c}]": n for c, n in channels.items()}
    summed = Counter(c for result, kind in found if kind == "all-reduce" for c in re.findall(r"f32\[2,(\d+)\]", result))
    assert summed == {str(c): n for c, n in channels.items()}
    carrying = sum("f32[2," in result for result, kind in found if kind == "all-reduce")
    assert carrying <= channels.total()


@pytest.mark.parametrize("block", [Bottleneck, nn.remat(Bottleneck, policy=NAMES)], ids=["plain", "remat"])
def test_step(block, devices):
    check(ResNet(block), devices, CHANNELS)


@pytest.mark.parametrize("block", [Bottleneck, nn.remat(Bottleneck, policy=NAMES)], ids=["plain", "remat"])
def test_scan_over_blocks(block, devices):
    """The loop's body holds what one block costs, however often it runs."""
    check(ResNet(block, repeat=3), devices, CHANNELS + Counter([8, 8, 32]))


MANY = """
import jax, test_network_communication as t
text = t.lower(t.ResNet(), jax.devices()).as_text()
print(jax.device_count(), text.count("CustomSPMDPartitioning"), text.count("all_gather"), text.count("all_reduce"))
"""


def test_lowers_for_512_devices():
    """Moments and gradient sums of each norm, split when the compiler knows the sharding; nothing else moves."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=512",
        "PYTHONPATH": os.pathsep.join(map(str, (here, *sys.path))),
    }
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["512", str(2 * CHANNELS.total()), "0", "0"]
