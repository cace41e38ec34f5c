"""Real processes on this host, two devices each: the loss curve of one process, and no hanging when one dies."""

import json
import os
import signal
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
