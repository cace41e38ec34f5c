"""Training over several processes, statistics shared, follows the loss curve of a single process.

The main job's network is trained with the same data order twice: in this process, and data-parallel over
`--processes` processes on this host, each with its part of every batch. Under `jit` the batch is split over all
devices, and batch norm's statistics are those of the whole batch. The two loss curves differ by rounding alone; to show
it they are in double precision, since training amplifies what single precision rounds until it can be seen.

On a cluster, start the same command once per process with `--cluster`: SLURM, Open MPI and Kubernetes are recognised by
`jax.distributed.initialize` itself, and process 0 writes the results.
"""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.framework.plots import BLUE, VERMILION, pyplot
from experiments.framework.record import Options, Results
from experiments.material.data import Split
from experiments.material.data.digits import load_digits
from experiments.material.models import DigitsCNN
from experiments.material.train import Schedule, train, wait

LEARNING_RATE = 0.3
SCHEDULE = Schedule(steps=200, batch_size=64, evaluate_every=20)
QUICK = Schedule(steps=12, batch_size=64, evaluate_every=6)
QUICK_FEATURES = (8,)
HEARTBEAT = 20  # seconds without a sign of life after which the others give a process up


def arguments(parser: Any) -> None:
    """Options of this experiment alone."""
    parser.add_argument("--processes", type=int, default=2, help="processes to start on this host (default: 2)")
    parser.add_argument("--cluster", action="store_true", help="this is one process of a cluster that JAX recognises")
    parser.add_argument("--join", nargs=2, metavar=("ADDRESS", "INDEX"), help=argparse.SUPPRESS)  # a process we started


class SplitBatch(nn.Module):
    """The model in double precision, with training batches split over the mesh axis `data`."""

    model: nn.Module
    mesh: jax.sharding.Mesh

    @nn.nowrap
    def init(self, *args: Any, **options: Any) -> Any:
        return jax.tree.map(lambda value: value.astype(np.float64), super().init(*args, **options))

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if train:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P("data")))
        return self.model(x, train)


def run(options: Options, results: Results) -> None:
    """Trains in one process and in several, and compares."""
    schedule = QUICK if options.quick else SCHEDULE
    given = options.arguments
    if given.join or given.cluster:
        count = 0 if given.cluster else given.processes
        join(given.join, count)
    elif given.processes < 1 or schedule.batch_size % given.processes:
        raise SystemExit(
            f"error: --processes is {given.processes}, give a divisor of the {schedule.batch_size} examples of a batch"
        )
    results.configuration = {
        "seed": options.seed,
        "quick": options.quick,
        "learning_rate": LEARNING_RATE,
        "optimizer": "sgd",
        **schedule._asdict(),
    }
    started = time.perf_counter()
    model = DigitsCNN(features=QUICK_FEATURES) if options.quick else DigitsCNN()
    with double_precision():
        curve = loss_curve(model, options.seed, schedule)
    results.rows.append(row(jax.process_count(), jax.device_count(), curve, time.perf_counter() - started))
    if not (given.join or given.cluster):
        others = start(given.processes, options)
        results.rows.append(others)
        results.summary["largest_difference"] = float(np.max(np.abs(np.subtract(others["loss"], curve))))


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """`jax.enable_x64` for every thread: rules of partitioning run in one of the compiler's."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def join(given: Any, processes: int) -> None:
    """Makes this process one of many."""
    if given is None:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    else:
        address, index = given
        jax.distributed.initialize(address, processes, int(index), heartbeat_timeout_seconds=HEARTBEAT)


def loss_curve(network: nn.Module, seed: int, schedule: Schedule) -> np.ndarray:
    """The training loss of every step, `(steps,)` float64, over all devices of all processes."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    if schedule.batch_size % jax.device_count():
        raise SystemExit(
            f"error: {jax.device_count()} devices cannot share a batch of {schedule.batch_size} examples evenly"
        )
    model = SplitBatch(network, mesh)
    everywhere = NamedSharding(mesh, P())
    train_x, train_y, *test = load_digits()
    digits = Split(*(jax.device_put(part, everywhere) for part in (np.float64(train_x), train_y, *test)))
    key = jax.device_put(jax.random.key_data(jax.random.key(seed)), everywhere)

    @jax.jit
    def whole(key: jax.Array, digits: Split) -> Any:
        start = jax.random.wrap_key_data(key)
        return train(model, optax.sgd(LEARNING_RATE), digits, start, schedule, evaluate=lambda variables: ()).loss

    return np.asarray(wait(whole(key, digits)))


def row(processes: int, devices: int, loss: np.ndarray, seconds: float) -> dict[str, Any]:
    return {
        "processes": processes,
        "devices": devices,
        "seconds": round(seconds, 2),
        "final_loss": float(loss[-1]),
        "loss": loss.tolist(),
    }


def start(processes: int, options: Options) -> dict[str, Any]:
    """Runs this experiment in processes of this host, and returns what the first of them found.

    Raises:
      SystemExit: one of them failed; the others are ended, and its last words are in the message.
    """
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        command = [sys.executable, "-m", "experiments", "distributed", f"--processes={processes}"]
        command += [f"--seed={options.seed}", f"--out={folder}"] + ["--quick"] * options.quick
        logs = [Path(folder, f"{index}.log") for index in range(processes)]
        running = [
            subprocess.Popen([*command, "--join", address, str(index)], stdout=log.open("wb"), stderr=subprocess.STDOUT)
            for index, log in enumerate(logs)
        ]
        try:
            while any(status is None for status in (process.poll() for process in running)):
                for index, process in enumerate(running):
                    if process.returncode:
                        words = logs[index].read_text(errors="replace", encoding="utf-8").strip().splitlines()
                        raise SystemExit(
                            f"error: process {index} of {processes} ended with status {process.returncode}, the others "
                            f"were stopped; its last words: {' | '.join(words[-3:])}"
                        )
                time.sleep(0.1)
        finally:
            for process in running:
                process.kill()
                process.wait()
        if options.quick:  # each tells what it took
            for index, log in enumerate(logs):
                for line in log.read_text(errors="replace", encoding="utf-8").splitlines():
                    if line.startswith("took "):
                        print(f"process {index} {line}")
        return json.loads(Path(folder, "distributed.json").read_text(encoding="utf-8"))["rows"][0]


def table(results: Results) -> Any:
    """Processes, devices, seconds and final loss."""
    from rich.table import Table

    steps = results.configuration["steps"]
    shown = Table(title=f"MNIST digits, {steps} steps, one batch over all devices")
    for column in ("processes", "devices", "seconds", "final loss"):
        shown.add_column(column, justify="right")
    for row in results.rows:
        shown.add_row(str(row["processes"]), str(row["devices"]), f"{row['seconds']:.1f}", f"{row['final_loss']:.6f}")
    if "largest_difference" in results.summary:
        shown.caption = f"largest difference of the loss at any step: {results.summary['largest_difference']:.1e}"
    return shown


def figure(results: Results) -> Any:
    """Both loss curves over the steps."""
    plt = pyplot()
    fig, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for row, color, width in zip(results.rows, (BLUE, VERMILION), (4, 1.2), strict=False):
        label = f"{row['processes']} process{'es' * (row['processes'] > 1)}"
        axes.plot(range(1, 1 + len(row["loss"])), row["loss"], color=color, linewidth=width, label=label)
    axes.set(xlabel="training steps", ylabel="training loss / nats", yscale="log")
    axes.legend(frameon=False)
    return fig
