"""Which kernels a device ran, by JAX's profiler: how many launches, and how long."""

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

COPIES = ("memcpy", "memset")
GENERATED = ("fusion", "wrapped_")  # in the names that XLA gives its own kernels


def profiled(step: Callable[[], Any], wait: Callable[[Any], Any], times: int = 3) -> dict[str, tuple[float, float]]:
    """Of each kind of kernel the launches and the microseconds of a step; of a CPU nothing."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            wait([step() for _ in range(times)])
        [path] = Path(folder).rglob("perfetto_trace.json.gz")
        return kernels(path, times)


def kernels(path: Path, times: int) -> dict[str, tuple[float, float]]:
    """What a trace of so many steps has of devices."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    named = (event for event in events if event.get("name") == "process_name")
    devices = {event["pid"] for event in named if "/device:" in event["args"]["name"]}
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.get("ph") == "X" and event["pid"] in devices:
            kind = found[kind_of(event["name"])]
            kind[0] += 1
            kind[1] += event["dur"]
    return {name: (count / times, us / times) for name, (count, us) in found.items()}


def kind_of(kernel: str) -> str:
    """Ours by name; XLA's; copies; and what else there is, the libraries'."""
    if kernel.startswith("jbn_"):
        return kernel
    if any(part in kernel for part in GENERATED):
        return "XLA"
    return "copies and zeros" if kernel.lower().startswith(COPIES) else "cuDNN and cuBLAS"
