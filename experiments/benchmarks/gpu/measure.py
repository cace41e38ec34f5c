"""Hands tasks to workers, one candidate at a time on the device, and keeps what they find as it comes."""

import importlib.metadata
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from experiments.benchmarks.gpu import report
from experiments.benchmarks.gpu import tasks as plan
from experiments.benchmarks.gpu.tasks import PASSES, Task
from experiments.benchmarks.gpu.timing import links, spread
from experiments.benchmarks.gpu.worker import Failed, Worker
from experiments.framework.record import Options, Results, environment

CANDIDATES = ("jbn triton", "jbn xla", "flax.linen", "torch", "torch cudnn", "copy")
STEPS = ("flax.linen", "jbn triton", "jbn xla")
BASELINE = "flax.linen"
SAMPLES, SECONDS = 9, 0.02
PREPARING, TIMING, STEPPING = 180, 60, 400  # seconds that a worker is given
TOLERANCE = {"bfloat16": 2e-2, "float32": 2e-3}  # of fingerprints, relative


def run(
    options: Options,
    results: Results,
    tasks: Sequence[Task] | None = None,
    candidates: Sequence[str] = CANDIDATES,
    samples: int = SAMPLES,
) -> None:
    """Times every task within `--minutes`, going on from what `<out>/speed.json` has of the same device and versions.

    Rows are saved after every task. A candidate that fails leaves a row with the error in place of times.
    """
    tasks = plan.tasks() if tasks is None else tasks
    if options.quick:
        tasks = [task for task in tasks if task.batch is None][:2]
    minutes = getattr(options.arguments, "minutes", None)
    deadline = time.monotonic() + 60 * (minutes if minutes is not None else 1e6)
    results.configuration = {
        "kind": "gpu",
        "baseline": BASELINE,
        "candidates": list(candidates),
        "samples": samples,
        "seconds_per_sample": SECONDS,
        "driver": driver(),
        "packages": versions(),
    }
    results.rows += earlier(options.out, results)
    done = {(row["case"], row["dtype"], row["fused"], row["candidate"]) for row in results.rows}
    workers = {name: Worker(name) for name in candidates}
    rng = np.random.default_rng(options.seed)
    longest = 0.0
    try:
        for number, task in enumerate(tasks):
            names = [n for n in (candidates if task.batch is None else STEPS) if wanted(n, task, candidates)]
            left = [n for n in names if (task.case, task.dtype, task.fused, n) not in done]
            if not left:
                continue
            if time.monotonic() + longest > deadline:
                print(f"out of time before task {number + 1} of {len(tasks)}: the same command goes on from there")
                break
            started = time.monotonic()
            print(f"{number + 1}/{len(tasks)} {task.case} {task.dtype} {task.fused}", flush=True)
            if task.batch is None:
                results.rows += layer_rows(task, {n: workers[n] for n in left}, rng, samples)
                longest = max(longest, time.monotonic() - started)
            else:
                for worker in workers.values():
                    worker.stop()  # their memory is wanted
                for name in left:
                    if time.monotonic() + 90 < deadline:
                        results.rows.append(step_row(task, name, samples))
                        results.write(options.out)
            results.write(options.out)
    finally:
        for worker in workers.values():
            worker.stop()
    results.summary = report.summary(results)


def wanted(name: str, task: Task, candidates: Sequence[str]) -> bool:
    return name in candidates and (name != "copy" or task.fused == "alone")


def layer_rows(task: Task, workers: dict[str, Worker], rng: np.random.Generator, samples: int) -> list[dict[str, Any]]:
    """A row for each candidate and pass; all compile at once, then one after the other has the device, in turns."""
    rows, ready, prints = [], {}, {}
    for worker in workers.values():
        worker.ask(do="prepare", task=list(task), links=links(task.size))
    for name, worker in workers.items():
        try:
            answer = worker.answer(PREPARING)
            ready[name], prints[name] = answer["passes"], answer["fingerprint"]
        except Failed as error:
            rows.append(row(task, name, "both", error=str(error)))
    for name in differing(task, prints):
        del ready[name]
        rows.append(row(task, name, "both", error=f"differs from {BASELINE}: {prints[name]}, {prints[BASELINE]}"))
    for each in PASSES:
        times: dict[str, dict[str, list[float]]] = {}
        for _ in range(3):  # turns, so that a slow moment does not meet one candidate alone
            for name in rng.permutation([n for n in ready if each in ready[n]]).tolist():
                try:
                    workers[name].ask(do="time", samples=-(-samples // 3), seconds=SECONDS, **{"pass": each})
                    found = workers[name].answer(TIMING)
                except Failed as error:
                    del ready[name]
                    times.pop(name, None)
                    rows.append(row(task, name, each, error=str(error)))
                    continue
                kept = times.setdefault(name, {key: [] for key in found})
                for key, values in found.items():
                    kept[key] += values
        rows += [row(task, name, each, None, **found) for name, found in times.items()]
    return rows


def step_row(task: Task, name: str, samples: int) -> dict[str, Any]:
    """A training step in a process of its own, since the most memory held is a process's."""
    worker = Worker(name)
    try:
        worker.ask(do="step", batch=task.batch, samples=samples, seconds=1.0)
        found = worker.answer(STEPPING)
    except Failed as error:
        return row(task, name, "step", error=str(error))
    finally:
        worker.stop()
    more = {"loss": found.pop("loss"), "peak_bytes": found.pop("peak_bytes")}
    return row(task, name, "step", **found) | more


def row(task: Task, name: str, each: str, error: str | None = None, **found: Any) -> dict[str, Any]:
    """One measurement; times are of one layer, or of one training step."""
    shown: dict[str, Any] = {
        "case": task.case,
        "shape": list(task.shape),
        "dtype": task.dtype,
        "layout": task.layout,
        "bytes": task.size,
        "fused": task.fused,
        "pass": each,
        "candidate": name,
        "floor_bytes": None if task.batch else floor(task, name, each),
    }
    total, handed = (spread(found[key]) if found else (None,) * 3 for key in ("microseconds", "handing_over"))
    return shown | {
        "microseconds": total[1],
        "microseconds_lower_quartile": total[0],
        "microseconds_upper_quartile": total[2],
        "handing_over": handed[1],
        "images_per_second": 1e6 * task.batch / total[1] if task.batch and total[1] else None,
        "loss": None,
        "peak_bytes": None,
        "error": error,
    }


def floor(task: Task, name: str, each: str) -> int:
    """Bytes that a pass cannot do without, from the table in kernels/README.md; of a copy, one read and one write."""
    if name == "copy":
        return 2 * task.size
    x = jax.ShapeDtypeStruct(task.shape, jnp.dtype(task.dtype))
    told = jbn.explain(
        x,
        axis=task.axis,
        residual=x if task.fused == "add + relu" else None,
        activation=None if task.fused == "alone" else "relu",
        platform="cpu",
    ).floor
    if task.fused == "add + relu":  # kernels keep z̄, which spares a read of ȳ, residual and x's activation
        told = told | {"backward": 7 * task.size}
    return told["forward"] + told["backward"] if each == "both" else told[each]


def differing(task: Task, prints: dict[str, list[float]]) -> list[str]:
    """Candidates whose results are not the baseline's."""
    right = prints.get(BASELINE, [])
    found = [n for n, p in prints.items() if p and right and n != BASELINE]
    return [n for n in found if not np.allclose(prints[n], right, rtol=TOLERANCE[task.dtype], atol=1e-3)]


def earlier(out: Path, results: Results) -> list[dict[str, Any]]:
    """Rows of an earlier run that this one goes on from: without errors, of the same device and versions."""
    path = out / f"{results.name}.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["environment"] != environment() or record["configuration"] != results.configuration:
        path.rename(path.with_name(f"{results.name}-{int(path.stat().st_mtime)}.json"))
        print("the results there are of another device, version or setting: kept under another name, and begun anew")
        return []
    failed = {(r["case"], r["dtype"], r["fused"], r["candidate"]) for r in record["rows"] if r["error"]}
    return [r for r in record["rows"] if (r["case"], r["dtype"], r["fused"], r["candidate"]) not in failed]


def driver() -> str | None:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def versions() -> dict[str, str | None]:
    """Of the packages that only a GPU host needs."""
    found: dict[str, str | None] = {}
    for package in ("triton", "jax-triton", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
