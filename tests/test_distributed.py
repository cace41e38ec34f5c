"""Real processes on this host, two devices each: the loss curve of one process, and no hanging when one dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlxtend")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "experiments", "distributed", "--quick", "--processes=2"]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def test_two_processes_follow_the_curve_of_one(tmp_path):
    done = subprocess.run([*COMMAND, f"--out={tmp_path}"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = json.loads((tmp_path / "distributed.json").read_text())["rows"]
    assert (one["processes"], one["devices"]) == (1, 2)
    assert (two["processes"], two["devices"]) == (2, 4)
    assert one["loss"][-1] < 0.6 * one["loss"][0]
    # a step amplifies the difference of two float32 reductions but little
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4)


def test_a_process_that_dies_ends_the_others(tmp_path):
    started = subprocess.Popen(
        [*COMMAND, f"--out={tmp_path}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    victim = next(filter(None, (child_of(started.pid) for _ in wait(120))))
    os.kill(victim, signal.SIGKILL)
    _, error = started.communicate(timeout=60)
    assert started.returncode not in (0, None)
    assert f"ended with status {-signal.SIGKILL}, the others were stopped" in error


def wait(seconds):
    for _ in range(10 * seconds):
        yield
        time.sleep(0.1)


def child_of(parent):
    """A process that joined, started by `parent`."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                if b"--join" in stat.with_name("cmdline").read_bytes():
                    return int(stat.parent.name)
        except (OSError, IndexError):
            continue
    return None


@pytest.mark.parametrize("processes", [0, 3])
def test_processes_that_cannot_share_a_batch(processes):
    command = [*COMMAND[:-1], f"--processes={processes}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"--processes is {processes}, give a divisor of the 64 examples of a batch" in done.stderr


def test_without_who_started_them_the_others_still_end():
    """Processes of a cluster, with nobody to stop them: JAX notices that one is gone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ENDLESS, address, str(index)],
            cwd=ROOT,
            env=ENVIRONMENT,
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
from experiments.distributed import join
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

join(sys.argv[1:], 2)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
x = jax.jit(lambda: jax.random.normal(jax.random.key(0), (8, 3)), out_shardings=NamedSharding(mesh, P("data")))()
params, state = jbn.bn_init(3)
step = jax.jit(lambda state, x: jbn.bn_train(params, state, x)[1])
state = jax.block_until_ready(step(state, x))
print(jax.device_count(), "devices", flush=True)
while True:
    state = jax.block_until_ready(step(state, x))
"""
