"""What `explain` says, against what is compiled, counted and refused."""

import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hlo import collectives
from jax._src.sharding_impls import GSPMDSharding
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn._functions import explain_gpus
from jbn._op.gpu import Device

ROOT = Path(__file__).parents[2]
X = jax.ShapeDtypeStruct((8, 56, 56, 64), jnp.bfloat16)
BYTES = 8 * 56 * 56 * 64 * 2
LARGE = jax.ShapeDtypeStruct((256, 56, 56, 256), jnp.bfloat16)
MASK = jax.ShapeDtypeStruct((8, 1, 1, 1), bool)


@pytest.fixture(scope="module")
def triton():
    pytest.importorskip("jbn._op.jax_triton", reason="jax-triton is not installed", exc_type=ImportError)


def test_xla_on_this_host():
    told = jbn.explain(jnp.ones((6, 3)))
    assert told.implementation == "xla"
    assert told.reason == "kernels are for GPUs, and this is compiled for cpu"
    assert told.launches == {} and told.collectives == {}
    assert "forward: XLA’s own launches, floor 0.000216 MB\n" in str(told)
    assert told.gpu is None and "forecast" not in str(told)


FLOORS = {  # kernels/README.md's table: passes over x forward, backward, in inference
    "plain": ({}, 3, 5, 2),
    "relu": ({"activation": "relu"}, 3, 5, 2),
    "residual": ({"residual": X}, 4, 5, 3),
    "residual, relu": ({"residual": X, "activation": "relu"}, 4, 7, 3),
    "mask": ({"mask": jax.ShapeDtypeStruct(X.shape, bool)}, 3.5, 6, 2),
    "float32 out": ({"dtype": jnp.float32}, 4, 7, 3),
}


@pytest.mark.parametrize("name", FLOORS)
def test_floor_and_launches(triton, name):
    options, *passes = FLOORS[name]
    told = jbn.explain(X, platform="cuda", implementation="triton", **options)
    assert (told.implementation, told.reason) == ("triton", "asked for")
    for key, count in zip(("forward", "backward", "inference"), passes, strict=True):
        assert told.floor[key] == count * BYTES
        asked = sum(k.loaded + k.stored for k in told.launches[key])
        assert told.floor[key] <= asked <= 1.02 * told.floor[key]
        assert len(told.launches[key]) == (1 if key == "inference" else 2)
    kernels = [k.kernel for k in told.launches["forward"] + told.launches["backward"]]
    assert kernels == ["jbn_moments", "jbn_apply", "jbn_gradient_sums", "jbn_gradient_input"]
    lines = str(told).splitlines()
    assert lines[:3] == [
        "triton: asked for",
        "x 8×56×56×64 on NVIDIA H100 (cuda)",
        "a forecast, as no such GPU is here: 132 multiprocessors, L2 of 52.4288 MB, memory at 3350000 MB/s",
    ]
    assert lines[3].startswith("floor: each launch loads or stores every tensor of x's size")
    floor = passes[0] * BYTES / 1e6
    time = f"({floor / 3.35:.1f} µs at that bandwidth)"
    assert lines[4].startswith(f"forward: 2 launches, floor {floor:.6f} MB {time}, 1.0")


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA L4", "AMD Instinct MI300X"])
def test_forecast(triton, name):
    """For a GPU by name: a reduction in as many programs as it holds at once, the rest by tiles; times by memory."""
    told = jbn.explain(LARGE, device=name, implementation="triton")
    assert (told.device, told.implementation, told.gpu.here) == (name, "triton", False)
    assert told.platform == ("rocm" if name.startswith("AMD") else "cuda")
    moments, apply = told.launches["forward"]
    assert 0.8 <= moments.programs / (4 * told.gpu.processors) <= 1
    assert apply.programs == math.prod(LARGE.shape) / math.prod(apply.tile)
    text = str(told)
    assert f"a forecast, as no such GPU is here: {told.gpu.processors} " in text
    assert f"({1e6 * told.floor['backward'] / told.gpu.bandwidth:.1f} µs at that bandwidth)" in text
    assert "x fits into L2" not in text


def test_registers_decide_on_tiles(triton):
    """Sums with add + relu in 16 bits have larger ones from compute capability 9.0 on."""
    elements = [
        math.prod(told.launches["backward"][0].tile)
        for told in (
            jbn.explain(LARGE, platform="cuda", residual=LARGE, activation="relu", device=name, implementation="triton")
            for name in ("NVIDIA H200", "NVIDIA A100", None)
        )
    ]
    assert elements == [4096, 2048, 4096]  # the last is of an H100, which is assumed


@pytest.mark.parametrize(
    "rows, channels, forward, backward",
    [(32 * 49, 2048, 64, 64), (32 * 49, 512, 64, 64), (2048, 1024, 32, 32), (4096, 1024, 352, 256)],
)
def test_few_rows_of_many_channels_have_a_program_each(triton, rows, channels, forward, backward):
    x = jax.ShapeDtypeStruct((rows, channels), jnp.bfloat16)
    told = jbn.explain(x, device="NVIDIA H200", implementation="triton", activation="relu")
    assert told.launches["forward"][0].programs == forward
    assert told.launches["backward"][0].programs == backward
    assert "inference: 1 launch, " in str(told)


def test_forecast_with_triton_alone():
    """jax-triton is not installed, and there is no GPU: what would be launched is told all the same."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import importlib.metadata, sys
sys.modules["jax_triton"] = None
version = importlib.metadata.version

def without(name):
    if name == "jax-triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = without
import jax, jbn
x = jax.ShapeDtypeStruct((8, 56, 56, 64), jax.numpy.bfloat16)
print(jbn.explain(x, platform="cuda", implementation="triton", activation="relu"))
print(jbn.explain(x, device="NVIDIA L40S", activation="relu"))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, second = out.split("xla: ")
    assert first.startswith("triton: asked for\nx 8×56×56×64 on NVIDIA H100 (cuda)\na forecast, ")
    for kernel in ("moments", "apply", "gradient_sums", "gradient_input"):
        assert f"jbn_{kernel}: " in first
    assert "note: no kernel can be launched with the packages here: jax-triton is not installed: pip install" in first
    assert second.startswith(
        "no measurement shows the kernels ahead for bfloat16, channels last, 3.211264 MB on NVIDIA L40S"
    )
    assert "142 multiprocessors" in second and "note: implementation='triton' would run the kernels" in second


def test_names_of_gpus():
    """As jax has them; in whole words."""
    wanted = {"NVIDIA H100 80GB HBM3": "NVIDIA H100", "AMD Instinct MI300X VF": "AMD Instinct MI300X"}
    wanted |= {row.kind: row.kind for row in explain_gpus.KNOWN}
    assert {name: explain_gpus.find(name).kind for name in wanted} == wanted
    assert explain_gpus.find("NVIDIA A100-SXM4-40GB").bandwidth < explain_gpus.find("NVIDIA A100-SXM4-80GB").bandwidth
    assert explain_gpus.find("NVIDIA H1000") is None and explain_gpus.find("NVIDIA") is None


def test_a_gpu_that_is_here_is_no_forecast(monkeypatch):
    here = Device("NVIDIA H200 NVL", 132, "9.0")
    monkeypatch.setattr(explain_gpus, "gpu", lambda _: here)
    for told in (jbn.explain(X, platform="cuda"), jbn.explain(X, device="NVIDIA H200")):
        assert told.gpu == here._replace(cache=52428800, bandwidth=4800 * 10**9)
        assert "\nthis host’s: 132 multiprocessors" in str(told) and "forecast" not in str(told)
    assert not jbn.explain(X, device="NVIDIA H100").gpu.here


def test_rows_of_a_mask_are_read_at_their_own_size():
    told = jbn.explain(X, mask=MASK)
    assert told.floor == {"forward": 3 * BYTES + 8, "backward": 5 * BYTES + 16, "inference": 2 * BYTES}


def test_default_on_a_gpu_is_xla_as_nothing_is_measured():
    told = jbn.explain(X, platform="cuda")
    assert told.implementation == "xla"
    assert told.reason.startswith("no measurement shows the kernels ahead for bfloat16, channels last, 3.211264 MB")
    assert told.notes[0].startswith("implementation='triton' would ")


def test_what_would_raise():
    told = jbn.explain(X, implementation="triton")
    assert told.implementation is None
    assert "the kernels need a GPU, and this is compiled for cpu" in told.reason
    assert str(told).startswith("raises NotImplementedError: implementation='triton' cannot be used")


def test_virtual_batches_are_batches_of_the_same_kernels(triton):
    told = jbn.explain(X, platform="cuda", implementation="triton", virtual_batch_size=4, activation="silu")
    assert [len(found) for found in told.launches.values()] == [2, 2, 1]


def mesh(devices):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def test_collectives_of_a_sharded_call(devices):
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh(devices), P("a", None, None, "b")))
    told = jbn.explain(x)
    assert told.shape == (2, 56, 56, 32)
    assert [(c.kind, c.size) for c in told.collectives["forward"]] == [("all-gather", 4 * 2 * 32 * 4)]
    assert [(c.kind, c.size) for c in told.collectives["backward"]] == [("all-reduce", 2 * 32 * 4)]
    assert not told.notes


def test_an_uneven_axis_is_gathered(devices):
    x = jax.ShapeDtypeStruct((9, 56, 56, 64), X.dtype, sharding=NamedSharding(mesh(devices), P("a", "b")))
    told = jbn.explain(x, mask=jax.ShapeDtypeStruct((9, 56, 1, 1), bool))
    assert told.shape == (9, 28, 56, 64)
    assert told.notes == ("axis 0 of x, 9 long, is not divided evenly: it is gathered",)
    assert [(c.kind, c.size) for c in told.collectives["forward"]] == [("all-gather", 2 * 3 * 64 * 4)]


def test_channels_on_devices_of_their_own_send_nothing(devices):
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh(devices), P(None, None, None, "b")))
    assert jbn.explain(x).collectives == {}


def test_collectives_of_named_axes():
    told = jbn.explain(X, axis_name="data", axis_size=16)
    assert [(c.kind, c.size) for c in told.collectives["forward"]] == [("all-gather", 16 * 2 * 64 * 4)]
    told = jbn.explain(X, axis_name="data", axis_size=10_000)
    assert [(c.kind, c.size) for c in told.collectives["forward"]] == [("all-reduce", 256), ("all-reduce", 256)]


def sent(told):
    return {name: [(c.kind, c.size) for c in found] for name, found in told.collectives.items()}


def test_virtual_batches_over_devices(devices):
    """Legal for the whole batch, whatever a device's part of it is."""
    split = NamedSharding(jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=devices[:4]), P("d"))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=split)
    told = jbn.explain(x, virtual_batch_size=4)
    own = [("XLA’s own", None)]
    assert sent(told) == {"forward": own, "backward": own}
    assert "virtual batches are shared" in told.notes[0]
    assert "  XLA’s own: virtual batches that devices share" in str(told)
    assert sent(jbn.explain(x, virtual_batch_size=2)) == {"forward": [("all-reduce", 64)] * 3, "backward": []}
    assert jbn.explain(x, virtual_batch_size=8) == jbn.explain(x)  # the whole
    with pytest.raises(ValueError, match="virtual_batch_size is 3, which does not divide the 8 examples of x"):
        jbn.explain(x, virtual_batch_size=3)
    images = jax.ShapeDtypeStruct((16, 8, 16), jnp.float32, sharding=split.update(spec=P(None, "d")))
    assert sent(jbn.explain(images, virtual_batch_size=4)) == {"forward": own, "backward": own}


@pytest.mark.parametrize("k, shared", [(2, False), (4, False), (8, True), (16, True)])
def test_virtual_batches_over_a_named_axis(devices, k, shared):
    """Of its own, or shared by two, or by all: what is sent is what is compiled."""
    x = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    told = jbn.explain(x, axis_name="d", axis_size=4, virtual_batch_size=k)
    assert any("virtual batches are shared" in note for note in told.notes) == shared
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=devices[:4])
    params, state = jbn.bn_init(16)

    def step(x):
        y, pull, new = jax.vjp(
            lambda x: jbn.bn_train(params, state, x, axis_name="d", virtual_batch_size=k), x, has_aux=True
        )
        return y, new, pull(y)

    f = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P(), P("d"))))
    compiled = collectives(f.lower(jnp.ones((16, 16))).compile())
    assert sorted(c for found in sent(told).values() for c in found) == sorted(compiled)


def test_groups_of_a_named_axis_gather():
    """A sum over groups is a gather too."""
    groups = [[0, 2], [1, 3]]
    told = jbn.explain(X, axis_name="data", axis_size=4, axis_index_groups=groups)
    gather = [("all-gather", 2 * 2 * 64 * 4)]
    assert sent(told) == {"forward": gather, "backward": gather}


def test_another_sharding_is_not_taken_for_none(devices):
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=GSPMDSharding.get_replicated(tuple(devices)))
    assert jbn.explain(x).notes == ("x has a GSPMDSharding, expected a NamedSharding: explained as if on one device",)


def test_bad_arguments():
    with pytest.raises(ValueError, match="platform is 'gpu', expected None, 'cpu', 'cuda', 'rocm' or 'tpu'"):
        jbn.explain(X, platform="gpu")
    with pytest.raises(ValueError, match="device is 'NVIDIA A10', expected None or a GPU of which facts are known"):
        jbn.explain(X, device="NVIDIA A10")
    with pytest.raises(ValueError, match="platform is 'rocm', but device is 'NVIDIA L4', for 'cuda': leave one"):
        jbn.explain(X, platform="rocm", device="NVIDIA L4")
    with pytest.raises(ValueError, match="axis is 4, out of range"):
        jbn.explain(X, axis=4)
    with pytest.raises(TypeError, match="x has dtype int32, expected one of"):
        jbn.explain(jnp.arange(3))
    with pytest.raises(ValueError, match=r"residual has shape \(3,\), expected x's shape"):
        jbn.explain(X, residual=jnp.ones(3))
    with pytest.raises(ValueError, match="axis_size is 0, expected None or a positive integer: give the number"):
        jbn.explain(X, axis_name="d", axis_size=0)
    with pytest.raises(ValueError, match="axis_size is 4, but axis_name is None: name the axis"):
        jbn.explain(X, axis_size=4)
    with pytest.raises(
        ValueError, match=r"axis_index_groups is \[\[0, 1\]\], expected groups of one size that hold each"
    ):
        jbn.explain(X, axis_name="d", axis_size=4, axis_index_groups=[[0, 1]])
    with pytest.raises(TypeError, match="x is a list, expected an array"):
        jbn.explain([1.0])
