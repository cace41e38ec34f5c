"""Batch norms and training steps through JAX: kernels, XLA, Flax and PyTorch in a process each, one at a time timed.

python -m experiments.benchmarks.gpu.flight.side_by_side LINES {steps | layers} [--only …] [--seconds S] [--dump FOLDER]

Training steps, each in a process of its own, are compiled and timed one after the other: what XLA finds out of
convolutions in one holds for all (`--xla_gpu_per_fusion_autotune_cache_dir`), else chance decides between them. Layers
are compiled for most of the time, then timed task by task, each candidate in turn, while nothing compiles. Lines:
"step" and "kernels" (`steps`), and "layer": microseconds of a pass, `host_us` of handing it over (where both are
alike, the host was timed), `same`, whether results are Flax's up to rounding.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.gpu import tasks as plan
from experiments.benchmarks.gpu.measure import TOLERANCE
from experiments.benchmarks.gpu.tasks import Task
from experiments.benchmarks.gpu.worker import Failed, Worker
from experiments.framework.lines import Lines
from experiments.material import cases

CANDIDATES = ("jbn triton", "jbn xla", "flax.linen", "torch", "torch cudnn")
BASELINE = "flax.linen"
# "CANDIDATE, BATCH[, what is checkpointed]" of training steps and "BATCH, FUSED" of layers, the most valuable first
STEPS = (
    *("jbn triton, 128", "flax.linen, 128", "jbn triton, 128, segments", "jbn, 128", "jbn xla, 128"),
    *("jbn triton, 256", "flax.linen, 256", "jbn triton, 256, segments"),
)
LAYERS = (
    *(f"{batch}, {fused}" for fused in ("relu", "add + relu") for batch in (256, 128)),
    *("32, relu", "32, add + relu", "256, alone", "128, alone", "32, alone"),
)
SAMPLES, SECONDS = 3, 0.01
AT_ONCE = 2  # training steps: one has the device, and the next is lowered
PATIENCE = 40  # seconds that a candidate is given for a task
HELD = 2 * 2**30  # bytes that PyTorch may hold between tasks; on an H100 it held 31 GiB, and others had no room
TIMING = 0.5  # of the time for layers is for timing them


def tasks(asked: Sequence[str] = LAYERS) -> list[Task]:
    """ResNet-50's shapes in bfloat16, of each batch and fusion the largest first."""
    found = []
    for each in asked:
        batch, fused = each.split(", ")
        shapes = sorted(cases.distinct(cases.resnet50(int(batch))), key=plan.size, reverse=True)
        found += [Task(case.name, case.shape, fused=fused) for case in shapes]
    return found


TINY = [Task("2×3×3×4", (2, 3, 3, 4), -1, "float32", fused) for fused in ("relu", "add + relu")]


def flags(*wanted: str) -> dict[str, str]:
    """The environment with these flags of XLA's beside those that are set."""
    return {"XLA_FLAGS": " ".join([*os.environ.get("XLA_FLAGS", "").split(), *wanted])}


class Device:
    """The processes, and who may use the device: training steps lock a file, layers wait for their turn."""

    def __init__(self, lines: Lines, candidates: tuple[str, ...], dump: Path | None):
        self.lines, self.dump = lines, dump
        self.workers = {
            name: Worker(name, "experiments.benchmarks.gpu.flight.layers", flags(*self.dumping(name, "both")))
            for name in candidates
        }
        self.steps: list[subprocess.Popen[bytes]] = []
        self.waiting: list[list[str]] = []

    def dumping(self, name: str, programs: str) -> list[str]:
        """Flags by which XLA keeps its programs whose names have this in them."""
        if self.dump is None:
            return []
        folder = self.dump / name.replace(" ", "-")
        return [f"--xla_dump_to={folder}", "--xla_dump_hlo_as_text", f"--xla_dump_hlo_module_re=.*{programs}.*"]

    def begin_steps(self, steps: Sequence[str], lock: Path, tiny: bool) -> None:
        """The first steps start; the others wait for their turn."""
        for each in steps:
            name, batch, *named = each.split(", ")
            self.waiting.append([str(lock), name, batch, *(f"--named={of}" for of in named), *["--tiny"] * tiny])
        self.more_steps()

    def compile_layers(self, asked: list[Task], seconds: float) -> None:
        """Every candidate compiles tasks, so long at most."""
        for worker in self.workers.values():
            worker.ask(do="begin", tasks=[list(task) for task in asked])
        for worker in self.workers.values():
            worker.answer(PATIENCE)  # that it has begun
            worker.ask(do="finish", seconds=seconds)
        for name, worker in self.workers.items():
            print(f"{name}: compiled {worker.answer(seconds + PATIENCE)['compiled']} of {len(asked)} tasks", flush=True)

    def more_steps(self) -> bool:
        """Starts steps for which there is room; whether any are under way."""
        running = sum(process.poll() is None for process in self.steps)
        for arguments in self.waiting[: AT_ONCE - running]:
            command = [
                sys.executable,
                "-m",
                "experiments.benchmarks.gpu.flight.steps",
                str(self.lines.file.name),
                *arguments,
            ]
            shared = f"--xla_gpu_per_fusion_autotune_cache_dir={Path(arguments[0]).parent}"
            wanted = flags(shared, *self.dumping("-".join(["step", *arguments[1:]]), "train"))
            self.steps.append(subprocess.Popen(command, env={**os.environ, **wanted}))
        del self.waiting[: AT_ONCE - running]
        return any(process.poll() is None for process in self.steps)

    def wait_for_steps(self, until: float) -> None:
        """Until all are done, or their time is up."""
        while self.more_steps() and time.monotonic() < until:
            time.sleep(0.2)
        for process in self.steps:
            if process.poll() is None:
                process.kill()
                process.wait()
                self.lines("error", error=f"no time was left for {process.args}")

    def layer(self, task: Task, until: Callable[[], float]) -> None:
        """A line for each candidate and pass, each timed while the others wait."""
        told = {"case": task.case, "shape": list(task.shape), "dtype": task.dtype, "fused": task.fused}
        found: dict[str, dict[str, Any]] = {}
        for name, worker in list(self.workers.items()):
            try:
                worker.ask(do="time", task=list(task), samples=SAMPLES, seconds=SECONDS)
                found[name] = worker.answer(min(PATIENCE, until()))
            except Failed as error:
                self.lines("error", **told, candidate=name, error=str(error))
                del self.workers[name]  # it would have to compile all anew
        right = found.get(BASELINE, {}).get("fingerprint")
        for name, answer in found.items():
            same = None
            if right and answer["fingerprint"]:
                same = bool(np.allclose(answer["fingerprint"], right, rtol=TOLERANCE[task.dtype], atol=1e-3))
            for each, times in answer["passes"].items():
                self.lines("layer", **told, bytes=task.size, candidate=name, **{"pass": each}, **times, same=same)
            for each, error in answer["failed"].items():
                self.lines("error", **told, candidate=name, **{"pass": each}, error=error)
            if answer["held_bytes"] > HELD:
                self.lines("held", **told, candidate=name, bytes=answer["held_bytes"])
                self.workers[name].stop()  # only its end gives that back; its next task starts another process
        shown = [f"{name} {answer['passes'].get('both', {}).get('us', 0):.1f}" for name, answer in found.items()]
        print(f"{task.case:16} {task.fused:10} both/us:", *shown, flush=True)

    def end(self) -> None:
        for worker in self.workers.values():
            worker.stop()
        for process in self.steps:
            process.kill()


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="file that lines are appended to")
    parser.add_argument("what", choices=["steps", "layers"])
    parser.add_argument("--seconds", type=float, default=100, help="of all (default: 100)")
    parser.add_argument("--dump", type=Path, help="folder for XLA's programs")
    parser.add_argument(
        "--candidates", nargs="+", default=CANDIDATES, choices=CANDIDATES, help="of layers (default: all)"
    )
    parser.add_argument(
        "--only", nargs="+", help="which steps or layers, as STEPS and LAYERS have them (default: these)"
    )
    parser.add_argument("--tiny", action="store_true", help="small tasks or a small step, without kernels")
    options = parser.parse_args()
    lines, deadline = Lines(options.lines), started + options.seconds
    names = ("jbn xla", "flax.linen") if options.tiny else tuple(options.candidates)
    device = Device(lines, names if options.what == "layers" else (), options.dump)
    try:
        if options.what == "steps":
            with tempfile.TemporaryDirectory() as folder:
                steps = ("jbn xla, 2, segments",) if options.tiny else options.only or STEPS
                device.begin_steps(steps, Path(folder) / "lock", options.tiny)
                device.wait_for_steps(deadline)
            return
        asked = TINY if options.tiny else tasks(options.only or LAYERS)
        device.compile_layers(asked, (1 - TIMING) * options.seconds)
        for number, task in enumerate(asked):
            if time.monotonic() > deadline:
                print(f"out of time after {number} of {len(asked)} tasks", flush=True)
                break
            device.layer(task, lambda: deadline + 5 - time.monotonic())
    finally:
        device.end()


if __name__ == "__main__":
    main()
