"""GPUs that need not be here: what a forecast has to know of each.

Sources: NVIDIA's architecture whitepapers (Ampere A100, Ada, Hopper H100) and data sheets (A100, L4, L40S, H100, H200)
for multiprocessors, L2 and bandwidth of memory; AMD's MI300X data sheet and ROCm's table of GPU specifications, whose
L2 are 4 MiB for each of 8 dies. Compute capabilities: NVIDIA's CUDA GPUs.
"""

from jbn._op.gpu import GPUS, Device, default_platform, gpu

MIB = 2**20


def _row(kind: str, processors: int, architecture: str, cache: int, bandwidth: int) -> Device:
    """L2 in MiB, bandwidth in GB/s."""
    return Device(kind, processors, architecture, False, cache * MIB, bandwidth * 10**9)


KNOWN = (
    _row("NVIDIA H200", 132, "9.0", 50, 4800),
    _row("NVIDIA H100", 132, "9.0", 50, 3350),  # SXM
    _row("NVIDIA H100 NVL", 132, "9.0", 50, 3900),
    _row("NVIDIA H100 PCIe", 114, "9.0", 50, 2000),
    _row("NVIDIA A100", 108, "8.0", 40, 1555),  # of 40 GB
    _row("NVIDIA A100-SXM4-80GB", 108, "8.0", 40, 2039),
    _row("NVIDIA A100 80GB PCIe", 108, "8.0", 40, 1935),
    _row("NVIDIA L40S", 142, "8.9", 96, 864),
    _row("NVIDIA L4", 58, "8.9", 48, 300),
    _row("AMD Instinct MI300X", 304, "gfx942", 32, 5300),
)


def find(kind: str) -> Device | None:
    """The row with the longest name that `kind`, such as jax's "NVIDIA H100 80GB HBM3", begins with, in whole words."""
    fits = [row for row in KNOWN if kind.startswith(row.kind) and not kind[len(row.kind) :][:1].isalnum()]
    return max(fits, key=lambda row: len(row.kind), default=None)


def target(platform: str | None, device: str | None) -> tuple[str, Device | None]:
    """What a call is told for: the platform, and its GPU: the one named, this host's, or where there is none assumed.

    Raises:
      ValueError: for a platform or device that is not known, or if they do not go together.
    """
    if platform not in (None, "cpu", "tpu", *GPUS):
        raise ValueError(f"platform is {platform!r}, expected None, 'cpu', 'cuda', 'rocm' or 'tpu': give one of these")
    if device is None:
        platform = platform or default_platform()
        return platform, _with_facts(gpu(platform)) if platform in GPUS else None
    row = find(device)
    if row is None:
        names = ", ".join(repr(row.kind) for row in KNOWN)
        raise ValueError(f"device is {device!r}, expected None or a GPU of which facts are known: give one of {names}")
    its = "rocm" if row.architecture.startswith("gfx") else "cuda"
    if platform not in (None, its):
        raise ValueError(f"platform is {platform!r}, but device is {device!r}, for {its!r}: leave one of them out")
    own = gpu(its)
    return its, _with_facts(own) if own.here and find(own.kind) == row else row


def _with_facts(device: Device) -> Device:
    row = find(device.kind)
    if row is None:
        return device
    # what is assumed is compiled for less than it can: tiles go by what it is
    architecture = device.architecture if device.here else row.architecture
    return device._replace(cache=row.cache, bandwidth=row.bandwidth, architecture=architecture)
