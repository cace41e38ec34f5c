"""What making a program costs: CPU seconds of tracing, lowering and compiling, and lines of StableHLO by platform."""

import gc
import time
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.costs.networks import FLAX, Network, Step
from experiments.benchmarks.costs.rows import row

PLATFORMS = ("cpu", "cuda", "tpu")
STAGES = ("trace", "lower", "compile")


def made(step: Step) -> list[float]:
    """CPU seconds, over all threads, of each stage; nothing is kept of what was made before."""
    function, given = step
    jax.clear_caches()
    gc.collect()
    times = [time.process_time()]
    traced = jax.jit(function).trace(*given)
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    lowered.compile()
    times.append(time.process_time())
    return np.diff(times).tolist()


def first(network: Network, candidates: tuple[str, ...]) -> list[dict[str, Any]]:
    """Makes small programs of every interface, which are not counted: what a process sets up once; no rows."""
    for make in network.steps.values():
        for name in candidates:
            made(make(name, True))
    return []


def seconds(
    network: Network, interface: str, candidates: tuple[str, ...], turns: int, rng: Any, small: bool
) -> list[dict[str, Any]]:
    """A row for each candidate: medians over turns, in each of which every candidate is made once, in a drawn order."""
    make = network.steps[interface]
    times: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name in rng.permutation(candidates):
            times[name].append(made(make(str(name), small)))
    totals = {name: np.sum(found, axis=1) for name, found in times.items()}
    told = {"kind": "program", "what": network.name, "interface": interface, "unit": "CPU s"}
    return [
        row(
            told,
            name,
            totals,
            FLAX,
            **{
                stage: float(np.median(each))
                for stage, each in zip(STAGES, zip(*times[name], strict=True), strict=True)
            },
        )
        for name in candidates
    ]


def lines(network: Network, interface: str, candidates: tuple[str, ...], small: bool) -> list[dict[str, Any]]:
    """A row for each platform and candidate: lines of the program before XLA has it, and CPU seconds of lowering it."""
    found: dict[str, dict[str, int]] = {platform: {} for platform in PLATFORMS}
    spent: dict[tuple[str, str], float] = {}
    for name in candidates:
        function, given = network.steps[interface](name, small)
        traced = jax.jit(function).trace(*given)
        for platform in PLATFORMS:
            before = time.process_time()
            lowered = traced.lower(lowering_platforms=(platform,))
            spent[platform, name] = time.process_time() - before
            found[platform][name] = len(lowered.as_text().splitlines())
    told = {"kind": "lines", "what": network.name, "interface": interface, "unit": "lines"}
    return [
        row({**told, "platform": platform}, name, {each: [count] for each, count in counts.items()}, FLAX,
            lower=spent[platform, name])
        for platform, counts in found.items()
        for name in candidates
    ]  # fmt: skip
