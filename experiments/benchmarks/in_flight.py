"""A model: bytes that a multiprocessor waits for at once, and the bandwidth that these allow; and what was measured.

By Little's law, bytes in flight = bandwidth × latency. A program asks at once for the tiles of one pass through its
loop, and a multiprocessor holds as many programs as registers, warps and shared memory allow, and as are launched. What
instructions, arrivals and memory itself cost is not in it: it is a ceiling, which says something where it is low.
"""

import functools
import math
from typing import Any, NamedTuple

from experiments.framework.lines import read
from experiments.framework.record import CHECKOUT
from jbn.kernels.binaries import Binary
from jbn.kernels.launches import Launch
from jbn.kernels.tiling import View
from jbn.kernels.traffic import traffic

PROCESSORS = 132  # multiprocessors of an H100
LATENCY = 800e-9  # seconds, of a load among many others
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # of a multiprocessor, at most
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}  # bytes of one, 1 KiB of each program its own
FLIGHT = CHECKOUT / "experiments/results/gpu/nvidia-h100-80gb-hbm3/flight3.jsonl"


class InFlight(NamedTuple):
    """Of a multiprocessor."""

    resident: int  # programs
    waiting: int  # bytes that these ask for at once
    ceiling: float  # bytes a second, read and written, of a whole H100


def in_flight(launch: Launch, binary: Binary, view: View, itemsize: int) -> InFlight:
    """By the model, of a launch on x like `view`, compiled for an NVIDIA GPU."""
    tiling = launch.tiling
    asked = traffic(launch, view, dict.fromkeys(("x", "residual", "dy", "y", "dx", "dz"), itemsize))
    # bytes an element: what is loaded or stored besides is a few per cent of one
    loaded, stored = (asked.loaded - asked.again) // view.size, asked.stored // view.size
    steps = -(-view.rows // (tiling.ROWS * tiling.splits))
    tiles = min(launch.constants.get("UNROLL", 1), steps)
    resident = min(holds(launch, binary), -(-launch.programs // PROCESSORS))
    waiting = resident * tiles * tiling.ROWS * tiling.CHANNELS * loaded
    return InFlight(resident, waiting, waiting * PROCESSORS / LATENCY * (loaded + stored) / loaded)


def holds(launch: Launch, binary: Binary) -> int:
    """Programs that fit on a multiprocessor."""
    warps = launch.tiling.warps
    registers = -(-binary.registers // 8) * 8 * 32 * warps  # allotted in steps of 8 a thread
    return min(REGISTERS // registers, WARPS // warps, SHARED[binary.target] // (binary.shared + 1024), PROGRAMS)


@functools.cache
def measured() -> dict[tuple[Any, ...], float]:
    """By kernel, what is fused, shape and dtype: bandwidth on an H100 over that of a copy of the same x."""
    speeds = {
        (run["kernel"], run["fused"], math.prod(run["shape"][:-1]), run["shape"][-1], run["dtype"]): run["bytes"]
        / run["us"]
        for run in read([FLIGHT])
        if run["kind"] == "run" and run["chosen"]
    }
    return {key: speed / speeds["copy", "alone", *key[2:]] for key, speed in speeds.items()}
