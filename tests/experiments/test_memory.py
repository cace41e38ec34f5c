"""What a network keeps for its backward pass: small ones counted by hand, the job on one, and what a GPU measured."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from experiments.benchmarks import memory
from experiments.framework.record import Options, Results
from experiments.material.models import POOL, norm_relu
from experiments.material.networks import DenseNet121, UNet

SHAPE = (2, 8, 8, 4)
BYTES = 2 * 8 * 8 * 4 * 2  # of one array of bfloat16
WEIGHTS = (2 * 3 * 3 * 4 * 4 + 64 * 3) * 2  # in bfloat16, of both convolutions and the dense layer


class Small(nn.Module):
    """Two batch norms with relu, the second with a residual; pooling; a dense layer."""

    norm: type
    dtype: type
    fused: bool

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, 4, (3, 3), use_bias=False, dtype=self.dtype)
        norm = functools.partial(self.norm, use_running_average=not train, dtype=self.dtype)
        skip = x = norm_relu(norm, self.fused, conv()(x))
        x = conv()(x)
        x = norm(activation="relu")(x, residual=skip) if self.fused else nn.relu(norm()(x) + skip)
        return nn.Dense(3, dtype=self.dtype)(nn.max_pool(x, **POOL).reshape(len(x), -1))


def saved(name):
    count = memory.on_paper if name in memory.ON_PAPER else memory.saved_bytes
    return count(*memory.traceable(Small, memory.CANDIDATES[name], SHAPE, "bfloat16"))


def test_what_pytorch_keeps():
    """Both norms' inputs, both relus' outputs, the pooling's indices, the dense layer's input (a quarter array)."""
    assert saved("PyTorch") == 4 * BYTES + 2 * 4 * 4 * 4 * 8 + BYTES // 4 + WEIGHTS


def test_what_inplace_abn_keeps():
    """The first norm's output, the second's before and behind residual and relu; the rest as before."""
    assert saved("InPlace-ABN") == 3 * BYTES + 2 * 4 * 4 * 4 * 8 + BYTES // 4 + WEIGHTS


def test_what_ours_keeps():
    """With the policy both inputs; without it outputs, the dense layer's input and weights too; else more."""
    vectors = 32 * 4 * 4
    assert 2 * BYTES <= saved("jbn, fused, policy") <= 2 * BYTES + vectors
    assert 4 * BYTES <= saved("jbn, fused") <= 4 * BYTES + BYTES // 4 + WEIGHTS + vectors
    assert saved("jbn, fused") < saved("jbn") < saved("flax.linen")


def test_the_job_on_a_small_network(tmp_path):
    results = Results("memory")
    memory.run(Options(quick=True), results)
    assert [row["candidate"] for row in results.rows] == list(memory.CANDIDATES)
    for row in results.rows:
        assert row["saved_bytes"] > 0 and row["peak_bytes"] is None
        assert (row["planned_bytes"] is None) == (row["candidate"] in memory.ON_PAPER)
    assert memory.table(results).row_count == len(memory.CANDIDATES)
    assert memory.found(results)[0].endswith("whatever the activation.")
    assert all(path.stat().st_size for path in results.save(tmp_path, memory.figure))


def test_peaks_are_those_measured_of_the_same_step():
    peaks = [memory.peak_bytes("ResNet-50", each, 128) for each in memory.CANDIDATES.values()]
    assert [peak and round(peak / 2**30, 2) for peak in peaks] == [5.08, None, 5.66, 3.55, None, None]
    assert memory.peak_bytes("ResNet-50", memory.CANDIDATES["flax.linen"], 64) is None
    assert memory.peak_bytes("U-Net", memory.CANDIDATES["flax.linen"], 128) is None


@pytest.mark.parametrize(
    ("size", "says"), [(2**30, "1.00"), (10 * 2**30, "10.0"), (2**20, "0.000977"), (None, "–")], ids=str
)
def test_gib_has_three_digits(size, says):
    assert memory.gib(size) == says


@pytest.mark.parametrize(("network", "parameters"), [(DenseNet121(), 7_978_856), (UNet(), 31_037_698)], ids=["D", "U"])
def test_networks_have_the_parameters_of_their_sources(network, parameters):
    """DenseNet-121's are torchvision's; the U-Net's of 3×3, 2×2 and 1×1 convolutions follow from its figure."""
    images = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(functools.partial(network.init, train=True), jax.random.key(0), images)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
