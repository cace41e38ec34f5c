"""What devices send each other, read from the compiled program: how many collectives, of how many bytes."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import NUMBERS, collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn._op import merging

SHAPE = (16, 8, 4, 64)
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def forward(x, mask=None, **options):
    return jbn.bn_train(*jbn.bn_init(SHAPE[-1]), x, mask=mask, **options)


def backward(x, dy, params=None, mask=None, **options):
    initial, state = jbn.bn_init(SHAPE[-1])
    params = params or initial
    y, vjp, state = jax.vjp(lambda p, x: jbn.bn_train(p, state, x, mask=mask, **options), params, x, has_aux=True)
    return y, state, vjp(dy)


@pytest.fixture(params=KINDS)
def mesh(request, devices):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(KINDS[request.param],) * 2, devices=devices)
    with jax.set_mesh(mesh):
        yield mesh


def place(mesh, spec, *arrays):
    return [jax.device_put(a, NamedSharding(mesh, spec)) for a in arrays]


def data(seed=0):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


SPECS = {  # spec: devices that share a channel, devices that channels are spread over
    "batch": (P("a"), 4, 1),
    "batch over both": (P(("a", "b")), 8, 1),
    "batch and space": (P("a", "b"), 8, 1),
    "space": (P(None, "a", "b"), 8, 1),
    "batch and channels": (P("a", None, None, "b"), 4, 2),
}


@pytest.mark.parametrize("name", SPECS)
def test_one_gather_forward_and_one_sum_backward(mesh, name):
    spec, members, spread = SPECS[name]
    x, dy = place(mesh, spec, data(), data(1))
    params = jbn.BNParams(*place(mesh, P(spec[3] if len(spec) == 4 else None), *jbn.bn_init(SHAPE[-1])[0]))
    gathered = ("all-gather", members * 2 * 4 * NUMBERS // spread)
    assert collectives(jax.jit(forward).lower(x).compile()) == [gathered]
    both = collectives(jax.jit(backward).lower(x, dy, params).compile())
    assert sorted(both) == [gathered, ("all-reduce", 2 * 4 * NUMBERS // spread)]


def test_channels_alone_need_none(mesh):
    x, dy = place(mesh, P(None, None, None, ("a", "b")), data(), data(1))
    params = jbn.BNParams(*place(mesh, P(("a", "b")), *jbn.bn_init(SHAPE[-1])[0]))
    assert collectives(jax.jit(backward).lower(x, dy, params).compile()) == []


def test_a_mask_sends_its_counts_too(mesh):
    x, mask = place(mesh, P("a"), data(), data(1) > 0)
    assert collectives(jax.jit(forward).lower(x, mask).compile()) == [("all-gather", 4 * 3 * 4 * NUMBERS)]


def test_outputs_keep_the_sharding(mesh):
    for spec, _, _ in SPECS.values():
        x, dy = place(mesh, spec, data(), data(1))
        y, _, (_, dx) = jax.jit(backward)(x, dy)
        assert y.sharding.is_equivalent_to(x.sharding, 4) and dx.sharding.is_equivalent_to(x.sharding, 4)


def test_inference_sends_nothing(mesh):
    params, state = jbn.bn_init(SHAPE[-1])
    (x,) = place(mesh, P("a", "b"), data())
    assert collectives(jax.jit(partial(jbn.bn_eval, params, state)).lower(x).compile()) == []


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(mesh, remat):
    """Three layers: the loop's body holds what one layer costs, and the names save the gather from being repeated."""
    (x,) = place(mesh, P("a"), data())
    params, state = jbn.bn_init(SHAPE[-1])

    def layer(x, _):
        y, _ = jbn.bn_train(params, state, x, activation="silu")
        return y, None

    if remat:
        policy = jax.checkpoint_policies.save_only_these_names("bn_input", "bn_stats")
        layer = jax.checkpoint(layer, policy=policy)
    loss = jax.jit(jax.grad(lambda x: jnp.sum(jax.lax.scan(layer, x, length=3)[0] ** 2)))
    kinds = sorted(kind for kind, _ in collectives(loss.lower(x).compile()))
    assert kinds == ["all-gather", "all-reduce"]


def test_large_gathers_become_two_sums(mesh, monkeypatch):
    (x,) = place(mesh, P("a"), data())
    want = jax.jit(forward)(x)
    monkeypatch.setattr(merging, "GATHER_LIMIT", 0)
    jax.clear_caches()
    program = jax.jit(forward).lower(x).compile()
    assert collectives(program) == [("all-reduce", 4 * NUMBERS)] * 2
    for got, expected in zip(jax.tree.leaves(program(x)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_sums", [False, True], ids=["gather", "sums"])
@pytest.mark.parametrize("masked", [False, True])
def test_mean_far_above_deviation_unevenly_over_devices(mesh, monkeypatch, by_sums, masked):
    """|mean| / std = 1e4 from a fresh state, other offsets on other devices, and a device with nothing valid."""
    if by_sums:
        monkeypatch.setattr(merging, "GATHER_LIMIT", 0)
        jax.clear_caches()
    rows = np.arange(SHAPE[0]).reshape(-1, 1, 1, 1)
    x = (data() + 1e4 + rows // 4).astype(np.float32)
    mask = (data(1) > rows / 8 - 1) & (rows >= 4) if masked else np.ones(SHAPE, bool)
    placed = place(mesh, P("a"), x, mask)
    _, state = jax.jit(partial(forward, momentum=0))(*(placed if masked else placed[:1]))
    count = mask.sum((0, 1, 2))
    mean = np.where(mask, x, 0).astype(np.float64).sum((0, 1, 2)) / count
    var = (np.where(mask, x - mean, 0) ** 2).sum((0, 1, 2)) / count
    np.testing.assert_allclose(state.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(state.var, var, rtol=1e-3)  # float32 holds each mean to 5e-4


def test_constant_channel_over_devices(mesh):
    for constant in (0.1, -7, 1e10, 3e38):
        (x,) = place(mesh, P("a", "b"), np.full(SHAPE, constant, np.float32))
        y, state = jax.jit(partial(forward, momentum=0))(x)
        assert not np.any(y) and not np.any(state.var)


def test_partly_manual_shard_map(devices):
    """One axis manual and named, the other left to the compiler: statistics are over both."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    params, state = jbn.bn_init(SHAPE[-1])
    x = data()
    with jax.set_mesh(mesh):

        def body(x):
            return jbn.bn_train(params, state, x, axis_name="a")

        f = jax.shard_map(body, mesh=mesh, in_specs=P("a"), out_specs=(P("a"), P()), axis_names={"a"})
        y, new = jax.jit(f)(*place(mesh, P(("a", "b")), x))
    want, wanted = jbn.bn_train(params, state, x)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new.var, wanted.var, rtol=1e-5)


MANY = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=512"
import jax, jax.numpy as jnp, jbn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((512,), ("data",), axis_types=(AxisType.Auto,))
x = jax.ShapeDtypeStruct((1024, 2, 2, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))
params, state = jbn.bn_init(64)
text = jax.jit(lambda x: jbn.bn_train(params, state, x)).lower(x).as_text()
print(text.count("CustomSPMDPartitioning"), text.count("all_gather"))
"""


def test_lowers_for_512_devices():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["1", "0"], "one reduction, split when the compiler knows the sharding"
