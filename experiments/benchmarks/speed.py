"""Does a training step's batch norm, forward and backward, take less time in jbn than in flax.linen?

Every candidate computes y, the new running statistics and the gradients of x, scale and bias for a given
cotangent of y, in float32 and in bfloat16 (scale, bias and statistics stay float32), under `jax.jit`. Candidates take
turns (A B C, B A C, …), so that whatever else the machine does meets all of them; ratios are taken within a turn,
medians and quartiles over turns. PyTorch takes part where it can be imported. glibc is told to keep freed memory: else
page faults of the arrays returned are half the time, whoever computes them.

The copy, which takes turns with them, moves as many bytes as the eight passes over x that forward and backward need
where no cache holds x: what memory gives. It writes half of them, a batch norm a quarter, and writing costs more: so a
batch norm can be somewhat faster than it.

On a GPU host it is `experiments.benchmarks.gpu` instead: every shape of `experiments.material.cases`, three passes,
two dtypes, fusions, a training step of ResNet-50, within `--minutes`.
"""

import importlib.metadata
import importlib.util
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.candidates import BASELINE, CANDIDATES, COPY, Inputs, Step
from experiments.benchmarks.gpu import measure, report
from experiments.benchmarks.turns import dots, quartiles, take_turns, told
from experiments.framework.plots import BLUE, GREEN, GREY, ORANGE, pyplot, samples
from experiments.framework.record import Options, Results, cores, progress
from experiments.material.cases import CPU, Case, images

ENVIRONMENT = {
    "MALLOC_TOP_PAD_": str(2**30),  # one gibibyte each: freed memory stays in the heap
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # candidates on a GPU share its memory
    "OMP_WAIT_POLICY": "PASSIVE",  # else PyTorch's idle threads spin through the next candidate's turn
}
TURNS, QUICK_TURNS = 100, 3
QUICK = [images(4, 7, 64), images(2, 4, 32)]
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}  # of the largest value: candidates must compute the same thing
COLORS = {"jbn.bn_train": BLUE, "jbn.linen": GREEN, "torch": ORANGE}


def arguments(group: Any) -> None:
    """This experiment's own options."""
    group.add_argument("--minutes", type=float, help="on a GPU: stop in time for this budget (default: no limit)")


def run(options: Options, results: Results) -> None:
    """Times every candidate on every case; a row for each pair."""
    if jax.default_backend() == "gpu":
        return measure.run(options, results)
    turns, cases = (QUICK_TURNS, QUICK) if options.quick else (TURNS, CPU)
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
        "dtypes": list(TOLERANCES),
        "baseline": BASELINE,
        "candidates": list(candidates),
        "absent": absent,
        "torch": None if absent else importlib.metadata.version("torch"),
        "environment": ENVIRONMENT,
    }
    with progress(len(cases) * len(TOLERANCES)) as part:
        for dtype in TOLERANCES:
            for each in cases:
                part(f"{each.name}, {dtype}")
                rng = np.random.default_rng(options.seed)
                inputs = draw(each, rng, dtype)
                steps = {name: prepare(each, inputs) for name, prepare in candidates.items()}
                check(each, steps, TOLERANCES[dtype])
                times = take_turns(steps, turns, rng)
                results.rows += [row(each, name, times) | of_copy(name, times, dtype) for name in candidates]
    results.summary = {
        f"{what}_geometric_mean": {
            dtype: {name: overall(results.rows, name, dtype, what) for name in candidates} for dtype in TOLERANCES
        }
        for what in ("speedup", "of_copy")
    }


def draw(case: Case, rng: np.random.Generator, dtype: str = "float32") -> Inputs:
    """Normal random inputs; x of mean 1 and deviation 2."""
    x, cotangent = (rng.standard_normal(case.shape, np.float32) for _ in range(2))
    scale, bias = (rng.standard_normal(case.shape[case.axis], np.float32) for _ in range(2))
    x, cotangent = (each.astype(jnp.dtype(dtype)) for each in (1 + 2 * x, cotangent))
    return Inputs(x, cotangent, 1 + 0.1 * scale, 0.1 * bias)


def check(case: Case, steps: dict[str, Step], tolerance: float) -> None:
    """Raises RuntimeError unless every candidate computes what the baseline does; this also compiles them."""
    expected = [numbers(value) for value in steps[BASELINE]()]
    for name in steps.keys() - {COPY}:
        for what, value, right in zip(
            ("y", "gradient of x", "gradient of scale", "gradient of bias"), steps[name](), expected, strict=True
        ):
            error = np.abs(numbers(value) - right).max() / np.abs(right).max()
            if not error < tolerance:
                raise RuntimeError(f"{name} and {BASELINE} differ on {case.name}, {what}: {error:.1e} relative")


def numbers(value: Any) -> np.ndarray:
    """An array of JAX's or PyTorch's in float32; NumPy has no bfloat16 of PyTorch's."""
    return np.asarray(value.float() if hasattr(value, "float") else value, np.float32)


def row(case: Case, name: str, times: dict[str, np.ndarray], baseline: str = BASELINE) -> dict[str, Any]:
    """Median and quartiles of a candidate's milliseconds, and of its speed over the baseline's."""
    return {
        "case": case.name,
        "candidate": name,
        **quartiles("milliseconds", 1e3 * times[name]),
        **quartiles("speedup", times[baseline] / times[name]),
    }


def of_copy(name: str, times: dict[str, np.ndarray], dtype: str) -> dict[str, Any]:
    """The part of the copy's speed that a candidate has: median and quartiles."""
    return {"dtype": dtype, **quartiles("of_copy", times[COPY] / times[name])}


def overall(rows: list[dict[str, Any]], name: str, dtype: str, what: str = "speedup") -> float:
    """Geometric mean over cases of a candidate's median speedup, or of its part of the copy's speed."""
    return statistics.geometric_mean(row[what] for row in rows if (row["candidate"], row["dtype"]) == (name, dtype))


def table(results: Results) -> Any:
    """Per case and candidate: median time, and speed over the baseline's with its quartiles."""
    if results.configuration.get("kind") == "gpu":
        return report.table(results)
    from rich.table import Table

    made, candidates = results.configuration, results.configuration["candidates"]
    shown = Table(
        title="batch norm, forward + backward",
        caption=f"Median milliseconds; speed over {BASELINE}: median (quartiles) over {made['turns']} turns; part of "
        f"the copy's speed. {made['threads']} threads.",
    )
    shown.add_column("shape")
    for name in candidates:
        shown.add_column(name, justify="right")
    for dtype, case in dict.fromkeys((row["dtype"], row["case"]) for row in results.rows):
        rows = [row for row in results.rows if (row["dtype"], row["case"]) == (dtype, case)]
        shown.add_row(f"{case}\n{dtype}", *map(cell, rows), end_section=True)
    for dtype, means in results.summary.get("speedup_geometric_mean", {}).items():
        shown.add_row(f"geometric mean\n{dtype}", *(f"{means[name]:.2f}×" for name in candidates))
    return shown


def cell(row: dict[str, Any]) -> str:
    """What the table says of one candidate on one case."""
    lines = [f"{row['milliseconds']:.2f} ms"]
    if row["candidate"] != BASELINE:
        lines.append(told(row))
    if row["candidate"] != COPY:
        lines.append(f"{row['of_copy']:.0%}")
    return "\n".join(lines)


def markdown(results: Results) -> str:
    """The table of experiments/README.md."""
    others = [name for name in results.configuration["candidates"] if name not in (BASELINE, COPY)]
    heads = [f"PyTorch {results.configuration['torch']}" if name == "torch" else name for name in others]
    lines = [f"| | shape | {BASELINE} / ms | {' | '.join(heads)} | copy / ms |", "|---" * (len(others) + 4) + "|"]

    for dtype, means in results.summary["speedup_geometric_mean"].items():
        rows = [row for row in results.rows if row["dtype"] == dtype]
        for i, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
            found = {row["candidate"]: row for row in rows if row["case"] == case}
            cells = [
                f"{found[BASELINE]['milliseconds']:.2f}",
                *(f"{told(found[name])}, {found[name]['of_copy']:.0%}" for name in others),
            ]
            lines.append(
                f"| {dtype if i == 0 else ''} | {case} | {' | '.join(cells)} | {found[COPY]['milliseconds']:.2f} |"
            )
        parts = results.summary["of_copy_geometric_mean"][dtype]
        cells = (f"{means[name]:.2f}×, {parts[name]:.0%}" for name in others)
        lines.append(f"| | geometric mean | | {' | '.join(cells)} | |")
    return "\n".join(lines) + "\n"


def found(results: Results) -> list[str]:
    """The speed of each candidate over the baseline's, and the part of the copy's that it has."""
    speeds, parts = (results.summary.get(f"{what}_geometric_mean", {}) for what in ("speedup", "of_copy"))
    cases = len({row["case"] for row in results.rows})  # of a GPU the table says more than a mean

    def listed(means: dict[str, dict[str, float]], form: str, left_out: tuple[str, ...]) -> str:
        return "; ".join(
            f"{dtype}: {', '.join(f'{name} {value:{form}}' for name, value in found.items() if name not in left_out)}"
            for dtype, found in means.items()
        )

    if not speeds:
        return []
    return [
        f"Times as fast as {BASELINE}, geometric mean over {cases} shapes, {listed(speeds, '.2f', (BASELINE, COPY))}.",
        f"Part of the speed of a copy of the same bytes, {listed(parts, '.0%', (COPY,))}.",
    ]


def figure(results: Results) -> Any:
    """Speed over the baseline's: a panel for each dtype, a line for each case, a dot for each candidate."""
    if results.configuration.get("kind") == "gpu":
        return report.figure(results)
    dtypes = list(dict.fromkeys(row["dtype"] for row in results.rows))
    cases = list(dict.fromkeys(row["case"] for row in results.rows))
    means = results.summary.get("speedup_geometric_mean", {})
    labels = [*cases, "geometric mean"] if means else cases
    fig, panels = pyplot().subplots(
        1, len(dtypes), figsize=(7.2, 1.2 + 0.4 * len(labels)), sharey=True, sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    shown = {name: color for name, color in COLORS.items() if name in results.configuration["candidates"]}
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        axes.axvline(1, color=GREY, linewidth=1)
        for index, (name, color) in enumerate({**shown, COPY: GREY}.items()):
            rows = [row for row in results.rows if (row["candidate"], row["dtype"]) == (name, dtype)]
            y = np.arange(len(rows)) + (0 if name == COPY else 0.2 * (index - (len(shown) - 1) / 2))
            if name == COPY:  # what memory gives
                axes.plot([row["speedup"] for row in rows], y, "|", color=color, markersize=16)
                continue
            dots(axes, rows, y, color=color, markersize=4)
            if means:
                axes.plot(means[dtype][name], len(cases) + y[0], "D", color=color, markersize=5)
        axes.set(title=dtype, xlabel=f"speed over {BASELINE}", ylim=(len(labels) - 0.5, -0.5))
        axes.grid(False, axis="y")
    panels[0, 0].set_yticks(range(len(labels)), labels)
    panels[0, 0].set_xlim(left=0)
    dot = {"marker": "o", "linestyle": "none", "markersize": 4}
    drawn = {name: {**dot, "color": color} for name, color in shown.items()}
    drawn["a copy"] = {"marker": "|", "linestyle": "none", "markersize": 10, "color": GREY}
    samples(fig, drawn, loc="outside upper left", ncols=len(drawn), columnspacing=1, handlelength=1)
    return fig
