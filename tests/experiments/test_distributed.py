"""Real processes on this host, two devices each: the loss curve of one process, and no hanging when one dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emitters
import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.distributed import start
from experiments.framework.record import Options

ROOT = Path(__file__).parents[2]
COMMAND = ["distributed", "--quick", "--processes=2"]
TWO_DEVICES = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2" + emitters.FLAGS}


@pytest.fixture
def two_devices(monkeypatch):
    """In each process that is started; this one has its own already."""
    jax.devices()
    for name, value in TWO_DEVICES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)


def test_two_processes_follow_the_curve_of_one(two_devices, tmp_path):
    assert main([*COMMAND, f"--out={tmp_path}"]) == 0
    one, two = json.loads((tmp_path / "distributed.json").read_text(encoding="utf-8"))["rows"]
    assert (one["processes"], one["devices"]) == (1, jax.device_count())
    assert (two["processes"], two["devices"]) == (2, 4)
    assert one["loss"][-1] < 0.6 * one["loss"][0]
    # what float64 rounds stays small; a mistake in a statistic, or float32 on the way, does not
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-9)


def test_a_process_that_dies_ends_the_others(two_devices, tmp_path):
    with ThreadPoolExecutor() as pool:
        started = pool.submit(start, 2, Options(out=tmp_path, quick=True))
        victim = next(filter(None, (child_of(os.getpid()) for _ in wait(120))))
        os.kill(victim, signal.SIGKILL)
        error = started.exception(timeout=60)
    assert isinstance(error, SystemExit)
    assert f"ended with status {-signal.SIGKILL}, the others were stopped" in str(error)


def wait(seconds):
    for _ in range(10 * seconds):
        yield
        time.sleep(0.1)


def child_of(parent):
    """A process that joined, started by `parent`."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == parent:
                if b"--join" in stat.with_name("cmdline").read_bytes():
                    return int(stat.parent.name)
        except (OSError, IndexError):
            continue
    return None


@pytest.mark.parametrize("processes", [0, 3])
def test_processes_that_cannot_share_a_batch(processes, tmp_path):
    with pytest.raises(SystemExit, match=f"--processes is {processes}, give a divisor of the 64 examples of a batch"):
        main([*COMMAND, f"--processes={processes}", f"--out={tmp_path}"])


def test_without_who_started_them_the_others_still_end():
    """Processes of a cluster, with nobody to stop them: JAX notices that one is gone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ENDLESS, address, str(index)],
            cwd=ROOT,
            env={**os.environ, **TWO_DEVICES},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            assert "4 devices\n" in process.stdout, process.stderr.read()  # gloo writes above it
        processes[1].kill()
        _, error = processes[0].communicate(timeout=60)
        assert processes[0].returncode != 0
        assert re.search(r"heartbeat|Connection closed by peer|unavailable|UNAVAILABLE|died", error), error
    finally:
        for process in processes:
            process.kill()


ENDLESS = """
import sys, jax, jbn
from experiments import distributed
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

distributed.HEARTBEAT = 5  # seconds, so that this ends soon
distributed.join(sys.argv[1:], 2)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
x = jax.jit(lambda: jax.random.normal(jax.random.key(0), (8, 3)), out_shardings=NamedSharding(mesh, P("data")))()
params, state = jbn.bn_init(3)
step = jax.jit(lambda state, x: jbn.bn_train(params, state, x)[1])
state = jax.block_until_ready(step(state, x))
print(jax.device_count(), "devices", flush=True)
while True:
    state = jax.block_until_ready(step(state, x))
"""
