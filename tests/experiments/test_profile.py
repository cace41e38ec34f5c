"""What a device ran, from a trace of JAX's profiler."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.gpu.flight import profile


def event(name, us, process=1, phase="X"):
    return {"name": name, "ph": phase, "pid": process, "dur": us}


def test_kinds_of_kernels_are_counted_a_step(tmp_path):
    process = [
        {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"name": "process_name", "ph": "M", "pid": 2, "args": {"name": "/host:CPU"}},
        {},
    ]
    ran = [
        event("jbn_apply", 3.0),
        event("loop_add_fusion_2", 1.0),
        event("wrapped_slice", 2.0),
        event("Memset 3", 0.5),
    ]
    ran += [event("sm90_xmma_fprop", 9.0), event("memcpy32_post", 0.5), event("a call", 7.0, process=2)]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [*process, *ran, *ran]}).encode()))
    found = {"jbn_apply": (1, 3), "XLA": (2, 3), "copies and zeros": (2, 1), "cuDNN and cuBLAS": (1, 9)}
    assert profile.kernels(path, 2) == found


@pytest.mark.parametrize("times", [1, 2])
def test_a_cpu_runs_no_kernels(times):
    assert profile.profiled(lambda: jnp.ones(3) + 1, jax.block_until_ready, times) == {}
