"""How a device is timed: work queued long enough that only the device's own time counts."""

import statistics
import time
from collections.abc import Callable
from typing import Any

# What a candidate prepares: a step for each pass, what waits for a step's result, and a fingerprint of the results.
Prepared = tuple[dict[str, Callable[[], Any]], Callable[[Any], Any], list[float]]

CACHE = 256 * 2**20  # bytes: a layer's inputs come from memory, not from a cache that the last run filled


def links(size: int) -> int:
    """How many layers a step has, each with inputs of its own, for x of `size` bytes."""
    return max(1, min(8, -(-CACHE // size)))


def sample(step: Callable[[], Any], wait: Callable[[Any], Any], samples: int, seconds: float) -> dict[str, list[float]]:
    """Microseconds of one call of `step`, and of handing it to the device, in each of `samples` rounds.

    A round queues as many calls as fit into `seconds`, then waits for the last. Where handing over takes as long as the
    whole, it is the host that was timed.
    """
    for _ in range(2):  # memory and code are there then
        wait(step())
    started = time.perf_counter()
    wait(step())
    once = time.perf_counter() - started
    calls = max(3, min(1000, int(seconds / once)))
    total, handed = [], []
    for _ in range(samples):
        started = time.perf_counter()
        out = None
        for _ in range(calls):
            out = step()
        queued = time.perf_counter()
        wait(out)
        handed.append(1e6 * (queued - started) / calls)
        total.append(1e6 * (time.perf_counter() - started) / calls)
    return {"microseconds": total, "handing_over": handed}


def spread(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
