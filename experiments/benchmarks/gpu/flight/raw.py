"""Launches what was compiled ahead by the driver alone: checks every result against float64, and times it.

python -m experiments.benchmarks.gpu.flight.raw LINES
    [--seconds S] [--largest N] [--each N] [--repeat N] [--host] [--dry]

Neither JAX nor Triton: `.gpu/runs.json` says what is launched, in order. Kinds of lines: "device", "run" (`us`, the
median of a captured graph's replays; `same_us`, on one set of operands, from L2 where they fit; `errors`, of each
result, and `ok`; `resident`, programs that a multiprocessor holds; `registers` and `spilled` bytes a thread) and
"error"; "repeat" with --repeat, "check" with --host, which times nothing, and else "baseline" (`baselines`).
"""

import argparse
import collections
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.flight.driver import CudaError, Driver, Nothing, Program
from experiments.benchmarks.gpu.flight.memory import HostMemory, Memory, TorchMemory, parameter, pointer
from experiments.benchmarks.gpu.flight.operands import LARGE, Operands, limit
from experiments.framework.lines import Lines

FOLDER = Path(".gpu")  # at the project's root, ignored by git: goes along to the machine with the GPU
COPIED = ("copy", "read")  # kernels that only show what memory can do
FAILURES = 20  # runs one behind the other that fail: then something is wrong that is no run's own
BEYOND_L2 = 200e6  # bytes: a shape's sets of operands together pass this
TOLD = ("kernel", "fused", "shape", "dtype", "tiling", "unroll", "chosen", "programs")


class Prepared:
    """A run's launches, one for each set of operands, and what they write."""

    def __init__(self, driver: Driver, memory: Memory, operands: Operands, program: Program, run: dict[str, Any]):
        self.run, self.driver, self.memory, self.operands = run, driver, memory, operands
        self.steps, self.written = [], []
        own = {i: self._own(output) for i, output in enumerate(run["outputs"]) if not self._large(output)}
        self.zeroed = [memory.address(own[i]) for i, output in enumerate(run["outputs"]) if output[2]]
        self.counts = [math.prod(output[0]) for output in run["outputs"] if output[2]]
        for i in range(operands.sets):
            arrays = [operands.operand(name, run["fused"], i) for name in run["reads"]]
            written = [
                own[k] if k in own else operands.buffer(k, output[1], i) for k, output in enumerate(run["outputs"])
            ]
            values = [pointer(memory.address(array)) for array in arrays]
            values += [parameter(kind, value) for kind, value in run["numbers"]]
            values += [pointer(memory.address(array)) for array in written]
            self.steps.append(driver.launcher(program, run["programs"], values))
            self.written.append(written)

    def _large(self, output: list[Any]) -> bool:
        """Whether it is of x's size: each set has its own then."""
        return output[3] in LARGE

    def _own(self, output: list[Any]) -> Any:
        shape, dtype, zeroed, _name = output
        poison = 0 if zeroed else -1 if dtype == "int32" else math.nan
        return self.memory.full(tuple(shape), dtype, poison)

    def step(self, i: int) -> None:
        """Queues the launch on set i, and before it the zeros that it asks for."""
        for address, count in zip(self.zeroed, self.counts, strict=True):
            self.driver.zero(address, count)
        self.steps[i % len(self.steps)]()

    def results(self) -> Iterable[tuple[str, Any]]:
        """(name, array) of what the first set's launch writes and is compared."""
        for output, array in zip(self.run["outputs"], self.written[0], strict=True):
            if output[3]:
                yield output[3], array

    def errors(self) -> dict[str, float]:
        """Distance of each result of a launch on poisoned arrays."""
        for _, array in self.results():
            self.memory.fill(array, math.nan)
        self.step(0)
        self.driver.wait()
        return {name: self.operands.distance(array, name, self.run["fused"]) for name, array in self.results()}


class Launcher:
    """Runs one after the other, with what they share kept between them."""

    def __init__(self, driver: Driver, memory: Memory, folder: Path, lines: Lines, beyond: float = BEYOND_L2):
        self.driver, self.memory, self.folder, self.lines, self.beyond = driver, memory, folder, lines, beyond
        self.programs: dict[str, Program] = {}
        self.operands: tuple[Any, Operands | None] = None, None

    def program(self, name: str) -> Program:
        if name not in self.programs:
            about = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            self.programs[name] = self.driver.load((self.folder / f"{name}.cubin").read_bytes(), **about)
        return self.programs[name]

    def of(self, run: dict[str, Any]) -> Operands:
        """The operands of its shape and dtype, those of the run before where they are alike."""
        shape, dtype = tuple(run["shape"]), run["dtype"]
        if self.operands[0] != (shape, dtype):
            self.operands = None, None  # memory is free before it is asked for again
            self.memory.release()
            self.operands = (shape, dtype), Operands(self.memory, shape, dtype, self.beyond)
        found = self.operands[1]
        assert found is not None
        return found

    def prepare(self, run: dict[str, Any]) -> Prepared:
        return Prepared(self.driver, self.memory, self.of(run), self.program(run["binary"]), run)

    def check(self, run: dict[str, Any]) -> None:
        """A line that says whether a run's results are right."""
        self.lines("check", **told(run), **judged(run, self.prepare(run).errors()))

    def measure(self, run: dict[str, Any]) -> None:
        """A line that says it, and how long the run takes."""
        operands, prepared = self.of(run), self.prepare(run)
        program = self.program(run["binary"])
        found = judged(run, prepared.errors())
        found |= {key: getattr(program, key) for key in ("resident", "registers", "spilled")}
        found["us"] = self.driver.time(prepared.step, max(4, operands.sets))
        if run["chosen"]:
            found["same_us"] = self.driver.time(lambda _: prepared.step(0), 8)
        found["bytes"] = run["moved"] * operands.size
        self.lines("run", **told(run), **found)

    def warm(self, run: dict[str, Any], seconds: float) -> None:
        """Keeps the device busy, so that its clocks are up when times begin to count."""
        prepared, started = self.prepare(run), time.monotonic()
        while time.monotonic() - started < seconds:
            for i in range(50):
                prepared.step(i)
            self.driver.wait()

    def repeat(self, run: dict[str, Any], times: int, disturb: Callable[[int], None]) -> None:
        """Whether a run gives the same bits every time, with whatever `disturb` queues beside it."""
        prepared = self.prepare(run)
        prepared.step(0)
        self.driver.wait()
        first = [(array, self.memory.copied(array)) for _, array in prepared.results()]
        differing = 0
        for i in range(times):
            disturb(i)
            prepared.step(0)
            self.driver.wait()
            differing += not all(self.memory.unchanged(array, before) for array, before in first)
        self.lines("repeat", **told(run), times=times, differing=differing)

    def each(self, runs: list[dict[str, Any]], seconds: float, do: Callable[[dict[str, Any]], None]) -> int:
        """Does the runs, as many as begin in time; one that fails leaves a line. Returns how many were begun.

        Raises:
          Exception: what a run raised, if the context is lost with it or FAILURES in a row failed.
        """
        started, failures = time.monotonic(), 0
        for number, run in enumerate(runs):
            if time.monotonic() - started > seconds:
                print(f"out of time after {number} of {len(runs)} launches", flush=True)
                return number
            try:
                do(run)
                failures = 0
            except Exception as error:
                failures += 1
                self.lines("error", **told(run), error=f"{type(error).__name__}: {str(error)[:300]}")
                print("ERROR", *(run[key] for key in TOLD[:5]), error, flush=True)
                if failures == FAILURES or (isinstance(error, CudaError) and error.lost):
                    raise
        print(f"all {len(runs)} launches done", flush=True)
        return len(runs)


def told(run: dict[str, Any]) -> dict[str, Any]:
    return {key: run[key] for key in TOLD}


def judged(run: dict[str, Any], errors: dict[str, float]) -> dict[str, Any]:
    return {"errors": errors, "ok": all(error <= limit(name, run["dtype"]) for name, error in errors.items())}


def few(runs: list[dict[str, Any]], largest: float, each: int) -> list[dict[str, Any]]:
    """The first runs of each kernel, shape and dtype, of shapes that are not too large."""
    seen, found = collections.Counter(), []
    for run in runs:
        if math.prod(run["shape"]) <= largest:
            key = run["kernel"], run["fused"], tuple(run["shape"]), run["dtype"]
            seen[key] += 1
            if seen[key] <= each:
                found.append(run)
    return found


def busy_streams(memory: Memory) -> Callable[[int], None]:
    """What keeps none to three other streams busy with matrix products."""
    if isinstance(memory, HostMemory):
        return lambda _: None
    torch = memory.torch
    matrix, streams = torch.randn(1024, 1024, device=memory.device), [torch.cuda.Stream() for _ in range(3)]

    def disturb(i: int) -> None:
        for stream in streams[: i % 4]:
            with torch.cuda.stream(stream):
                for _ in range(4):
                    torch.mm(matrix, matrix)

    return disturb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="file that lines are appended to")
    parser.add_argument("--seconds", type=float, default=1e9, help="no launch begins later (default: none is too late)")
    parser.add_argument("--largest", type=float, default=math.inf, help="elements of x: larger ones are left out")
    parser.add_argument("--each", type=int, default=10**6, help="at most so many ways of each kernel and shape")
    parser.add_argument("--repeat", type=int, default=0, help="times: for equal bits, in place of times")
    parser.add_argument("--host", action="store_true", help="operands by NumPy: neither PyTorch nor its baselines")
    parser.add_argument("--dry", action="store_true", help="without a GPU: small shapes, and nothing is launched")
    options = parser.parse_args()
    if options.dry:
        options.host, options.largest, options.each, options.repeat = True, 9e5, 1, min(options.repeat, 2)
    lines, driver = Lines(options.lines), Driver(Nothing() if options.dry else None)
    lines("device", **driver.about())
    memory = HostMemory(driver) if options.host else TorchMemory(driver)
    runs = few(json.loads((FOLDER / "runs.json").read_text(encoding="utf-8")), options.largest, options.each)
    launcher = Launcher(driver, memory, FOLDER / "binaries", lines)
    if options.repeat:
        disturb, runs = busy_streams(memory), [run for run in runs if run["kernel"] not in COPIED]
        launcher.each(runs, options.seconds, lambda run: launcher.repeat(run, options.repeat, disturb))
    elif isinstance(memory, HostMemory):
        launcher.beyond = 0
        launcher.each(runs, options.seconds, launcher.measure if options.dry else launcher.check)
    else:
        from experiments.benchmarks.gpu.flight.baselines import Baselines

        baselines = Baselines(driver, memory, lines)

        def measure(run: dict[str, Any]) -> None:
            launcher.measure(run)
            baselines.once(run, launcher.of(run))

        launcher.warm(runs[0], 1.0)
        launcher.each(runs, options.seconds, measure)


if __name__ == "__main__":
    main()
