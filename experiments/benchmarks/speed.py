"""Does a training step's batch norm, forward and backward, take less time in jbn than in flax.linen?

Every candidate computes y, the new running statistics and the gradients of x, scale and bias for a given
cotangent of y, in float32, under `jax.jit`. Candidates take turns (A B C, B A C, …), so that whatever else the
machine does meets all of them; ratios are taken within a turn, medians and quartiles over turns. PyTorch takes
part where it can be imported. glibc is told to keep freed memory: else page faults of the arrays returned are
half the time, whoever computes them.

On a GPU host it is `experiments.benchmarks.gpu` instead: every shape of `experiments.material.cases`, three passes,
two dtypes, fusions, a training step of ResNet-50, within `--minutes`.
"""

import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

import jbn
import jbn.linen
from experiments.benchmarks.gpu import measure, report
from experiments.framework.plots import BLUE, GREEN, GREY, ORANGE, pyplot
from experiments.framework.record import Options, Results, cores, progress
from experiments.material.cases import CPU, Case

ENVIRONMENT = {
    "MALLOC_TOP_PAD_": str(2**30),  # one gibibyte each: freed memory stays in the heap
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # candidates on a GPU share its memory
    "OMP_WAIT_POLICY": "PASSIVE",  # else PyTorch's idle threads spin through the next candidate's turn
}
BASELINE = "flax.linen"
TURNS, QUICK_TURNS, WARM_UP = 100, 3, 3
MOMENTUM, EPSILON = 0.9, 1e-5
TOLERANCE = 1e-3  # of the largest value: candidates must compute the same thing


class Inputs(NamedTuple):
    """What a candidate is given: `x` and the cotangent of y of the case's shape, scale and bias (C,)."""

    x: np.ndarray
    cotangent: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


# One step of a candidate: blocks until y and the gradients of x, scale and bias are there, and returns them.
Step = Callable[[], tuple[Any, Any, Any, Any]]


def with_jax(apply: Callable[..., Any], state: Any, inputs: Inputs) -> Step:
    """A step of `apply(scale, bias, state, x) -> (y, new state)` in JAX."""

    @jax.jit
    def step(state: Any, x: Any, cotangent: Any, scale: Any, bias: Any) -> Any:
        y, pullback, state = jax.vjp(lambda x, scale, bias: apply(scale, bias, state, x), x, scale, bias, has_aux=True)
        return (y, *pullback(cotangent)), state

    arguments = jax.device_put((state, *inputs))
    return lambda: jax.block_until_ready(step(*arguments))[0]


def linen(module: Callable[..., Any]) -> Callable[[Case, Inputs], Step]:
    """The candidate that a Flax linen BatchNorm class is."""

    def candidate(case: Case, inputs: Inputs) -> Step:
        norm = module(use_running_average=False, axis=case.axis, momentum=MOMENTUM, epsilon=EPSILON)

        def apply(scale: Any, bias: Any, state: Any, x: Any) -> Any:
            variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": state}
            y, updates = norm.apply(variables, x, mutable=["batch_stats"])
            return y, updates["batch_stats"]

        state = {"mean": jnp.zeros_like(inputs.bias), "var": jnp.ones_like(inputs.scale)}
        return with_jax(apply, state, inputs)

    return candidate


def functional(case: Case, inputs: Inputs) -> Step:
    """The candidate `jbn.bn_train`."""

    def apply(scale: Any, bias: Any, state: Any, x: Any) -> Any:
        params = jbn.BNParams(scale, bias)
        return jbn.bn_train(params, state, x, axis=case.axis, momentum=MOMENTUM, epsilon=EPSILON)

    _, state = jbn.bn_init(len(inputs.scale))
    return with_jax(apply, state, inputs)


def torch(case: Case, inputs: Inputs) -> Step:
    """The candidate PyTorch, on as many threads, images in its channels-last memory format."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(cores())
    x, cotangent, scale, bias = map(torch.from_numpy, inputs)
    last = case.axis == -1
    x, cotangent = (tensor.movedim(-1, 1) if last else tensor for tensor in (x, cotangent))  # a view
    leaves = [tensor.requires_grad_() for tensor in (x, scale, bias)]
    mean, var = torch.zeros(len(inputs.scale)), torch.ones(len(inputs.scale))

    def step() -> Any:
        y = torch.nn.functional.batch_norm(x, mean, var, scale, bias, training=True, momentum=1 - MOMENTUM, eps=EPSILON)
        x_gradient, *gradients = torch.autograd.grad(y, leaves, cotangent)
        y, x_gradient = (tensor.movedim(1, -1) if last else tensor for tensor in (y.detach(), x_gradient))
        return y, x_gradient, *gradients

    return step


CANDIDATES: dict[str, Callable[[Case, Inputs], Step]] = {
    "jbn.bn_train": functional,
    "jbn.linen": linen(jbn.linen.BatchNorm),
    BASELINE: linen(flax.linen.BatchNorm),
    "torch": torch,
}
COLORS = {"jbn.bn_train": BLUE, "jbn.linen": GREEN, "torch": ORANGE}


def arguments(group: Any) -> None:
    """This experiment's own options."""
    group.add_argument("--minutes", type=float, help="on a GPU: stop in time for this budget (default: no limit)")


def run(options: Options, results: Results) -> None:
    """Times every candidate on every case; a row for each pair."""
    if jax.default_backend() == "gpu":
        return measure.run(options, results)
    turns = QUICK_TURNS if options.quick else TURNS
    candidates = dict(CANDIDATES)
    absent = [name for name in ("torch",) if importlib.util.find_spec(name) is None]
    for name in absent:
        del candidates[name]
        print(f"{name} is not installed: its row is left out")
    results.configuration = {
        "seed": options.seed,
        "quick": options.quick,
        "turns": turns,
        "threads": cores(),
        "dtype": "float32",
        "baseline": BASELINE,
        "candidates": list(candidates),
        "absent": absent,
        "torch": None if absent else importlib.metadata.version("torch"),
        "environment": ENVIRONMENT,
    }
    with progress(len(CPU)) as part:
        for case in CPU:
            part(case.name)
            rng = np.random.default_rng(options.seed)
            inputs = draw(case, rng)
            steps = {name: prepare(case, inputs) for name, prepare in candidates.items()}
            check(case, steps)
            times = take_turns(steps, turns, rng)
            results.rows += [row(case, name, times) for name in candidates]
    results.summary = {"speedup_geometric_mean": {name: overall(results.rows, name) for name in candidates}}


def draw(case: Case, rng: np.random.Generator) -> Inputs:
    """Normal random inputs; x of mean 1 and deviation 2."""
    x, cotangent = (rng.standard_normal(case.shape, np.float32) for _ in range(2))
    scale, bias = (rng.standard_normal(case.shape[case.axis], np.float32) for _ in range(2))
    return Inputs(1 + 2 * x, cotangent, 1 + 0.1 * scale, 0.1 * bias)


def check(case: Case, steps: dict[str, Step]) -> None:
    """Raises RuntimeError unless every candidate computes what the baseline does; this also compiles them."""
    expected = [np.asarray(value) for value in steps[BASELINE]()]
    for name, step in steps.items():
        for what, value, right in zip(
            ("y", "gradient of x", "gradient of scale", "gradient of bias"), step(), expected, strict=True
        ):
            error = np.abs(np.asarray(value) - right).max() / np.abs(right).max()
            if not error < TOLERANCE:
                raise RuntimeError(f"{name} and {BASELINE} differ on {case.name}, {what}: {error:.1e} relative")


def take_turns(steps: dict[str, Step], turns: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Seconds of each candidate at each turn; who follows whom is drawn anew each turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + turns):
        for name in rng.permutation(list(steps)):
            start = time.perf_counter()
            steps[name]()
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return {name: np.array(seconds) for name, seconds in times.items()}


def row(case: Case, name: str, times: dict[str, np.ndarray], baseline: str = BASELINE) -> dict[str, Any]:
    """Median and quartiles of a candidate's milliseconds, and of its speed over the baseline's."""
    milliseconds, speedup = 1e3 * times[name], times[baseline] / times[name]
    low, median, high = np.quantile(milliseconds, (0.25, 0.5, 0.75))
    slow, speed, fast = np.quantile(speedup, (0.25, 0.5, 0.75))
    return {
        "case": case.name,
        "candidate": name,
        "milliseconds": float(median),
        "milliseconds_lower_quartile": float(low),
        "milliseconds_upper_quartile": float(high),
        "speedup": float(speed),
        "speedup_lower_quartile": float(slow),
        "speedup_upper_quartile": float(fast),
    }


def overall(rows: list[dict[str, Any]], name: str) -> float:
    """Geometric mean over cases of a candidate's median speedup."""
    return statistics.geometric_mean(row["speedup"] for row in rows if row["candidate"] == name)


def table(results: Results) -> Any:
    """Per case and candidate: median time, and speed over the baseline's with its quartiles."""
    if results.configuration.get("kind") == "gpu":
        return report.table(results)
    from rich.table import Table

    candidates = results.configuration["candidates"]
    shown = Table(
        title="batch norm, forward + backward, float32",
        caption=f"Median milliseconds; speed over {BASELINE}: median (quartiles) "
        f"over {results.configuration['turns']} turns. {results.configuration['threads']} threads.",
    )
    shown.add_column("shape")
    for name in candidates:
        shown.add_column(name, justify="right")
    for case in dict.fromkeys(row["case"] for row in results.rows):
        rows = [row for row in results.rows if row["case"] == case]
        shown.add_row(case, *map(cell, rows), end_section=True)
    means = results.summary.get("speedup_geometric_mean", {})
    if means:
        shown.add_row("geometric mean", *(f"{means[name]:.2f}×" for name in candidates))
    return shown


def cell(row: dict[str, Any]) -> str:
    """What the table says of one candidate on one case."""
    time = f"{row['milliseconds']:.2f} ms"
    if row["candidate"] == BASELINE:
        return time
    quartiles = f"{row['speedup_lower_quartile']:.2f}–{row['speedup_upper_quartile']:.2f}"
    return f"{time}\n{row['speedup']:.2f}× ({quartiles})"


def found(results: Results) -> list[str]:
    """The speed of each candidate over the baseline's."""
    means = results.summary.get("speedup_geometric_mean", {})  # of a GPU the table says more than a mean
    cases = len({row["case"] for row in results.rows})
    speeds = ", ".join(f"{name} {means[name]:.2f}×" for name in means if name != BASELINE)
    return [f"Speed over {BASELINE}, geometric mean over {cases} shapes: {speeds}."] if speeds else []


def figure(results: Results) -> Any:
    """Speed over the baseline's: a line for each case, a dot and its quartiles for each candidate."""
    if results.configuration.get("kind") == "gpu":
        return report.figure(results)
    plt = pyplot()
    cases = list(dict.fromkeys(row["case"] for row in results.rows))
    shown = [name for name in results.configuration["candidates"] if name != BASELINE]
    means = results.summary.get("speedup_geometric_mean", {})
    fig, axes = plt.subplots(figsize=(7, 0.8 + 0.5 * (len(cases) + bool(means))), layout="constrained")
    axes.axvline(1, color=GREY, linewidth=1)
    for index, name in enumerate(shown):
        color, offset = COLORS[name], 0.2 * (index - (len(shown) - 1) / 2)
        rows = [row for row in results.rows if row["candidate"] == name]
        middle = np.array([row["speedup"] for row in rows])
        quartiles = [[row[f"speedup_{end}_quartile"] for row in rows] for end in ("lower", "upper")]
        y = np.arange(len(rows)) + offset
        axes.errorbar(middle, y, xerr=np.abs(np.array(quartiles) - middle), color=color, fmt="o", markersize=5)
        axes.annotate(
            name, (quartiles[1][0], y[0]), (6, 0), textcoords="offset points", color=color,
            va="center", weight="bold", fontsize="small",
        )  # fmt: skip
        if means:
            axes.plot(means[name], len(cases) + offset, "D", color=color, markersize=6)
            axes.annotate(
                f"{means[name]:.2f}×", (means[name], len(cases) + offset), (7, 0),
                textcoords="offset points", color=color, va="center", fontsize="small",
            )  # fmt: skip
    labels = [*cases, "geometric mean"] if means else cases
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel=f"speed over {BASELINE}: median and quartiles", ylim=(len(labels) - 0.5, -0.5))
    axes.grid(False, axis="y")
    axes.margins(x=0.2)  # room for the names
    axes.set_title("batch norm, forward + backward, float32")
    return fig
