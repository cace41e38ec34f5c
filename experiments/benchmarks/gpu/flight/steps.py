"""A training step of ResNet-50 in a process of its own, which holds the device alone while it is timed.

python -m experiments.benchmarks.gpu.flight.steps LINES LOCK NAME BATCH [--named {all,segments}] [--tiny]

It is lowered while another has the lock, then compiled, where XLA tries out convolutions, and timed with nothing beside
it. Its line, of kind "step": `us` a step, `images` a second, `peak_bytes`, the most that the process held, and
`planned_bytes`, what XLA planned for the program. Then, of kind "kernels", what the device ran in a step (`profile`).
"""

import argparse
import fcntl
from pathlib import Path

from experiments.benchmarks.gpu import candidates
from experiments.benchmarks.gpu.flight.profile import profiled
from experiments.benchmarks.gpu.timing import sample, spread
from experiments.framework.lines import Lines

SAMPLES, SECONDS = 3, 0.6
NAMED = "keep batch norms' inputs and statistics alone, of the network in one checkpoint or in segments"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("lock", type=Path, help="file that whoever has the device has locked")
    parser.add_argument("name", choices=[name for name in candidates.NAMES if name != "copy"])
    parser.add_argument("batch", type=int)
    parser.add_argument("--named", default="", choices=["", "all", "segments"], help=NAMED)
    parser.add_argument("--tiny", action="store_true", help="one block, and images of 32 × 32")
    options = parser.parse_args()
    size = 224
    if options.tiny:
        from experiments.material import models

        models.STAGES, size = ((8, 1, 1),), 32
    lines = Lines(options.lines)
    told = {
        "candidate": options.name,
        "batch": options.batch,
        "named": bool(options.named),
        "segments": options.named == "segments",
    }
    try:
        prepare = candidates.lower_step(options.name, options.batch, size, options.named)
        with options.lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            step, wait, planned = prepare()
            found = sample(step, wait, SAMPLES, SECONDS)
            loss = float(step())
            ran = profiled(step, wait)
        us = spread(found["microseconds"])[1]
        lines(
            "step",
            **told,
            us=us,
            host_us=spread(found["handing_over"])[1],
            images=1e6 * options.batch / us,
            loss=loss,
            peak_bytes=candidates.peak_memory(),
            planned_bytes=planned,
        )
        for kernel, (launches, us) in ran.items():
            lines("kernels", **told, kernel=kernel, launches=launches, us=us)
    except Exception as error:
        lines("error", **told, error=f"{type(error).__name__}: {str(error)[:300]}")
        raise


if __name__ == "__main__":
    main()
