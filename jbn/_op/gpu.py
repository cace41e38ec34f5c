"""The GPU that kernels are for: the one of this host, or where there is none an H100."""

import functools
from typing import NamedTuple

import jax

GPUS = ("cuda", "rocm")
INSTALL = "pip install 'jax[cuda12]' triton 'jax-triton>=0.3.1,<0.4' (or 'jax[cuda13]')"  # what kernels need


class Device(NamedTuple):
    kind: str  # as jax names it, e.g. "NVIDIA H100 80GB HBM3"
    processors: int  # multiprocessors, compute units
    architecture: str  # compute capability, "9.0", or AMD's name, "gfx942"
    here: bool = True  # whether this host has it
    cache: int | None = None  # bytes of L2, where known
    bandwidth: int | None = None  # bytes a second of memory, where known

    @property
    def capability(self) -> int:
        """Compute capability times ten; 0 on AMD."""
        return 0 if self.architecture.startswith("gfx") else round(10 * float(self.architecture))


# PTX for 8.0 runs on every later device: what is compiled without a GPU at hand is for that
ASSUMED = {
    "cuda": Device("NVIDIA H100", 132, "8.0", here=False),
    "rocm": Device("AMD Instinct MI300X", 304, "gfx942", here=False),
}


@functools.cache
def gpu(platform: str) -> Device:
    """The first device of platform "cuda" or "rocm"."""
    try:
        device = jax.devices(platform)[0]
    except RuntimeError:
        return ASSUMED[platform]
    return Device(device.device_kind, device.core_count, str(device.compute_capability))


def default_platform() -> str:
    """What jax compiles for on this host: "cpu", "cuda", "rocm", "tpu"."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
