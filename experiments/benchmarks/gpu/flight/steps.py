"""A training step of ResNet-50 in a process of its own, which holds the device alone while it is timed.

python -m experiments.benchmarks.gpu.flight.steps LINES LOCK NAME BATCH [--named] [--tiny]

It compiles at once, beside others, then waits for the lock. Its line, of kind "step": `us` a step, `images` a second,
`peak_bytes`, the most that the process held, and `planned_bytes`, what XLA planned for the program.
"""

import argparse
import fcntl
from pathlib import Path

from experiments.benchmarks.gpu import candidates
from experiments.benchmarks.gpu.timing import sample, spread
from experiments.framework.lines import Lines

SAMPLES, SECONDS = 3, 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("lock", type=Path, help="file that whoever has the device has locked")
    parser.add_argument("name", choices=[name for name in candidates.NAMES if name != "copy"])
    parser.add_argument("batch", type=int)
    parser.add_argument("--named", action="store_true", help="keep batch norms' inputs and statistics alone")
    parser.add_argument("--tiny", action="store_true", help="one block, and images of 32 × 32")
    options = parser.parse_args()
    size = 224
    if options.tiny:
        from experiments.material import models

        models.STAGES, size = ((8, 1, 1),), 32
    lines, told = Lines(options.lines), {"candidate": options.name, "batch": options.batch, "named": options.named}
    try:
        step, wait, planned = candidates.prepare_step(options.name, options.batch, size, options.named)
        with options.lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = sample(step, wait, SAMPLES, SECONDS)
            loss = float(step())
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
    except Exception as error:
        lines("error", **told, error=f"{type(error).__name__}: {str(error)[:300]}")
        raise


if __name__ == "__main__":
    main()
