"""JAX's compilation cache on disk: a program is found again by another process, and never another one in its place."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn._op import dispatch, rule_name, xla

ROOT = Path(__file__).parents[2]
PROCESS = """
import json, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jbn

seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name.rpartition("/")[2]))
for kind, activation in json.loads(sys.argv[1]):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(getattr(AxisType, kind),))
    params, state = jbn.bn_init(3)

    def loss(x):
        return (jbn.bn_train(params, state, x, activation=activation)[0] * np.arange(3, dtype=np.float32)).sum()

    with jax.set_mesh(mesh):
        x = jax.device_put(np.arange(12, dtype=np.float32).reshape(4, 3) ** 2, NamedSharding(mesh, P("d")))
        seen.clear()
        compiled = jax.jit(jax.value_and_grad(loss)).lower(x).compile()
        found = [name for name in seen if name in ("cache_hits", "cache_misses")]
        value, grad = compiled(x)
    print(json.dumps([found, float(value), np.asarray(grad).tolist()]))
"""


def process(folder, programs, **more):
    """Whether a process found each of these programs in the cache, and what it computed."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        **more,
    }
    command = [sys.executable, "-c", PROCESS, json.dumps(programs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, *values = zip(*map(json.loads, done.stdout.splitlines()), strict=True)
    return [event for (event,) in found], values


def test_another_process_finds_it(tmp_path):
    programs = [("Auto", "relu"), ("Explicit", "relu")]
    first, values = process(tmp_path, programs)
    second, again = process(tmp_path, [*programs, ("Auto", "silu")])
    assert first == ["cache_misses"] * 2
    assert second == ["cache_hits"] * 2 + ["cache_misses"]
    assert [value[:2] for value in again] == [value[:2] for value in values]


def test_the_setting_that_leaves_addresses_out(tmp_path):
    """With it, and rules named by an address alone, silu would be given the program of relu."""
    setting = {"JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1"}
    found, (values, _) = process(tmp_path, [("Auto", "relu"), ("Auto", "silu"), ("Auto", "relu")], **setting)
    assert found == ["cache_misses", "cache_misses", "cache_hits"]
    assert values[0] == values[2] != values[1]


@pytest.fixture
def mesh(devices):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=devices[:2])
    with jax.set_mesh(mesh):
        yield mesh


def lowered(mesh, platform="cpu", **options):
    params, state = jbn.bn_init(3)
    x = jax.device_put(np.ones((4, 3), np.float32), NamedSharding(mesh, P("d")))
    jax.clear_caches()
    step = jax.jit(jax.grad(lambda x: jbn.bn_train(params, state, x, **options)[0].sum()))
    return step.trace(x).lower(lowering_platforms=(platform,)), x


def rules(mesh, *how, **options):
    """The names of the rules in a program; each stands where the setting above does not reach."""
    text = lowered(mesh, *how, **options)[0].as_text()
    named = re.findall(r'@CustomSPMDPartitioning.*?backend_config = "(\w+)", mhlo.*?jbn_rule = "(\w+)"', text)
    assert len(named) == text.count("@CustomSPMDPartitioning") > 0
    assert all(a == b for a, b in named)
    return {a for a, _ in named}


def test_what_differs_has_another_name(mesh, monkeypatch):
    """Activations, implementations, tables, settings, devices in a row, and our own code."""
    monkeypatch.setattr(dispatch, "obstacle", lambda *_, **__: None)
    monkeypatch.setattr(dispatch, "packages", lambda _: None)
    monkeypatch.setattr(dispatch, "kernels", lambda name, _: getattr(xla, name))  # which need not be installed
    found = {"relu": rules(mesh, activation="relu"), "silu": rules(mesh, activation="silu")}
    assert rules(mesh, activation="relu") == found["relu"], "the same in every process"
    found["xla"] = rules(mesh, "cuda", activation="relu", implementation="xla")
    found["triton"] = rules(mesh, "cuda", activation="relu", implementation="triton")
    found["none"] = rules(mesh, "cuda", activation="relu")
    for size in (0, 10):
        monkeypatch.setattr(dispatch, "WINS", (dispatch.Win("NVIDIA H100", "float32", "last", size, "a test"),))
        found[f"from {size} bytes"] = rules(mesh, "cuda", activation="relu")
    with jax.default_matmul_precision("highest"):
        found["precision"] = rules(mesh, activation="relu")
    with jax.enable_x64(True):
        found["x64"] = rules(mesh, activation="relu")
    monkeypatch.setattr(rule_name, "_code", lambda: "a line was changed")
    found["code"] = rules(mesh, activation="relu")
    every = [name for names in found.values() for name in names]
    assert len(every) == len(set(every))
    jax.clear_caches()


def test_alike_rules_outlive_one_another(mesh):
    """Two programs with the same rules; one is gone before the other is compiled."""
    first, x = lowered(mesh)
    second, _ = lowered(mesh)
    want = second.compile()(x)
    del second
    gc.collect()
    np.testing.assert_array_equal(first.compile()(x), want)
    third, _ = lowered(mesh)
    del first
    gc.collect()
    np.testing.assert_array_equal(third.compile()(x), want)
