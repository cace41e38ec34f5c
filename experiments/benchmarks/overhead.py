"""What does changing the import from Flax to jbn cost in compiling, eager calls, small layers and imports?

Programs: training steps of 20 layers (dense, x of (4096, 64); 1×1 convolutions, x of (32, 16, 16, 64); each followed by
batch norm and relu) and of ResNet-50 (batch 16, 224², SGD with momentum) are traced, lowered and compiled for the CPU,
in CPU seconds over all threads, nothing being kept of what was made before; the first program of a process is not
counted. Lines are those of StableHLO, before XLA has it, for each platform. None of them runs.

Calls: one layer, eagerly, and small ones under `jax.jit`, until the results are there. `jbn fused` has the relu as an
option of the batch norm; beside it stands Flax followed by relu, beside `jbn` Flax alone. Where `bn_train` and
`bn_eval` are called, Flax's linen stands beside them. Small layers' gradients are of two losses: Σ y·ȳ, where ȳ is an
array, as it is before another layer, and the mean of y², where XLA computes ȳ again from x wherever it needs it.

Candidates take turns in an order drawn anew each time; ratios are taken within a turn, medians and quartiles over
turns. Imports are timed in processes of their own, after what they need is imported.
"""

import functools
from typing import Any

import numpy as np

from experiments.benchmarks.costs import calls, imports, networks, programs
from experiments.benchmarks.costs.networks import FLAX, FUSED, OURS
from experiments.benchmarks.speed import ENVIRONMENT as ENVIRONMENT
from experiments.benchmarks.turns import dots
from experiments.framework.plots import BLUE, GREEN, GREY, pyplot, samples
from experiments.framework.record import Options, Results, cores, progress

CANDIDATES = (FLAX, OURS, FUSED)
COLORS = {OURS: BLUE, FUSED: GREEN}
EAGER, QUICK_EAGER = ((32, 8, 8, 32), (32, 16, 16, 64)), ((32, 8, 8, 32),)
SMALL, QUICK_SMALL = ((16, 32), (16, 256), (128, 32), (128, 256)), ((16, 32),)
TURNS = {"stacks": 5, "ResNet-50": 2, "eager": 60, "jit": 100, "calls": 3, "imports": 4}
QUICK_TURNS = {"stacks": 1, "ResNet-50": 0, "eager": 3, "jit": 3, "calls": 1, "imports": 1}
KINDS = {
    "program": "trace + lower + compile",
    "lines": "StableHLO",
    "eager": "eager calls",
    "jit": "under jit",
    "import": "imports",
}


def run(options: Options, results: Results) -> None:
    """Measures one kind after another; a row for each candidate."""
    turns = QUICK_TURNS if options.quick else TURNS
    rng = np.random.default_rng(options.seed)
    results.configuration = {
        "seed": options.seed,
        "quick": options.quick,
        "turns": turns,
        "threads": cores(),
        "candidates": list(CANDIDATES),
        "environment": ENVIRONMENT,
    }
    named = list(imports.IMPORTS)[: 1 if options.quick else None]

    def loaded() -> list[dict[str, Any]]:
        rows, results.summary["loads"] = imports.imports(named, turns["imports"])
        return rows

    tasks = {f"import {', '.join(named)}": loaded}
    shapes = (QUICK_EAGER, QUICK_SMALL) if options.quick else (EAGER, SMALL)
    for kind, measure, given in zip(("eager", "jit"), (calls.eager, calls.jitted), shapes, strict=True):
        for shape in given:
            name = f"{KINDS[kind]}, {calls.shape_name(shape)}"
            tasks[name] = functools.partial(measure, shape, turns[kind], turns["calls"], rng)
    measured = networks.networks()
    tasks["first programs"] = functools.partial(programs.first, measured[0], CANDIDATES)
    for network in measured:
        for interface in network.steps:
            count = turns.get(network.name, turns["stacks"])
            if count:
                given = (network, interface, CANDIDATES)
                tasks[f"{network.name}, {interface}"] = functools.partial(
                    programs.seconds, *given, count, rng, options.quick
                )
                tasks[f"{network.name}, {interface}, lines"] = functools.partial(programs.lines, *given, options.quick)
    with progress(len(tasks)) as part:
        for name, task in tasks.items():
            part(name)
            results.rows += task()


def beside_flax(results: Results, **wanted: Any) -> list[dict[str, Any]]:
    """The rows of our candidates that have these values."""
    return [
        row
        for row in results.rows
        if row["candidate"] in COLORS and row["over"] and all(row[key] == value for key, value in wanted.items())
    ]


def label(row: dict[str, Any]) -> str:
    """What a row is of, but for the candidate."""
    where = row["platform"] or (row["interface"] if row["kind"] != "import" else None)
    return f"{row['what']}, {where}" if where else row["what"]


def paired(results: Results, kind: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Label → candidate → row, of one kind."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results.rows:
        if row["kind"] == kind:
            found.setdefault(label(row), {})[row["candidate"]] = row
    return found


def cells(kind: str, rows: dict[str, dict[str, Any]]) -> tuple[str, str, str]:
    """Flax's median, and our candidates' ratios to what stands beside them, with quartiles where there are any."""
    if kind == "import":
        [row] = rows.values()
        return "", f"{row['median']:.2f} s ({row['lower_quartile']:.2f}–{row['upper_quartile']:.2f})", ""
    flax = rows[FLAX]
    digits = {"program": ".2f", "lines": ",.0f", "eager": ",.0f", "jit": ",.0f"}[kind]

    def ratio(row: dict[str, Any]) -> str:
        if kind == "lines":
            return f"{row['over']:.2f}"
        return f"{row['over']:.2f} ({row['over_lower_quartile']:.2f}–{row['over_upper_quartile']:.2f})"

    return f"{flax['median']:{digits}} {flax['unit']}", ratio(rows[OURS]), ratio(rows[FUSED])


def table(results: Results) -> Any:
    """Every measurement, a line each."""
    from rich.table import Table

    shown = Table(
        title="beside Flax: what changing the import costs",
        caption="Flax: median. jbn, over it: median (quartiles) over turns; imports: CPU seconds that they add.",
    )
    for column in ("", "Flax", "jbn", "jbn fused"):
        shown.add_column(column, justify="left" if not column else "right")
    for kind, says in KINDS.items():
        if found := paired(results, kind):
            shown.add_row(f"[bold]{says}")
            for name, rows in found.items():
                shown.add_row(name, *cells(kind, rows), end_section=name == list(found)[-1])
    return shown


def markdown(results: Results) -> str:
    """The table of experiments/README.md."""
    lines = ["| | | Flax | jbn | jbn fused |", "|---|---|---|---|---|"]
    for kind, says in KINDS.items():
        for i, (name, rows) in enumerate(paired(results, kind).items()):
            lines.append(f"| {says if i == 0 else ''} | {name} | {' | '.join(cells(kind, rows))} |")
    return "\n".join(lines) + "\n"


def span(rows: list[dict[str, Any]]) -> str:
    """The least and the most of the rows' ratios."""
    found = [row["over"] for row in rows]
    return f"{min(found):.2f} to {max(found):.2f}"


def found(results: Results) -> list[str]:
    """Ratios to Flax of each kind, and what imports add."""
    sentences = []
    for kind, what in (
        ("program", "CPU seconds of trace, lower and compile"),
        ("lines", "Lines of StableHLO"),
        ("eager", "Eager calls of one layer"),
        ("jit", "Small layers under jit, forward, gradient and inference"),
    ):
        told = (f"{name} {span(rows)}×" for name in COLORS if (rows := beside_flax(results, kind=kind, candidate=name)))
        if said := ", ".join(told):
            sentences.append(f"{what}, over Flax's: {said}.")
    added = (f"{row['what'].removeprefix('import ')} {row['median']:.2f} s" for row in results.rows if is_ours(row))
    loads = results.summary.get("loads", {}).get("jbn")
    said = "" if loads is None else f"; of flax and triton `import jbn` loads {' and '.join(loads) or 'neither'}"
    return [*sentences, f"Imports add {', '.join(added)} of CPU time{said}."]


def is_ours(row: dict[str, Any]) -> bool:
    """Whether a row is of an import of ours."""
    return row["kind"] == "import" and row["what"].startswith("import jbn")


def figure(results: Results) -> Any:
    """Ratios to Flax: a panel for each kind, a dot and its quartiles for each candidate."""
    panels = {
        "program": ("trace + lower + compile", {}),
        "lines": ("lines of StableHLO", {}),
        "eager": ("eager calls of one layer", {}),
        "jit": ("small layers, jit, linen", {"interface": "linen"}),
    }
    drawn = {kind: names for kind, (_, only) in panels.items() if (names := of_panel(results, kind, only))}
    heights = [max(map(len, pair), default=0) + 2 for pair in zip(*2 * [iter(drawn.values())], strict=False)]
    fig, grid = pyplot().subplots(
        len(heights), 2, figsize=(7.2, 0.6 + 0.2 * sum(heights)), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, (kind, names) in zip(grid.flat, drawn.items(), strict=True):
        axes.axvline(1, color=GREY, linewidth=1)
        most = max(row["over"] for rows in names.values() for row in rows.values() if row["over"])
        for candidate, color in COLORS.items():
            shift = -0.14 if candidate == OURS else 0.14
            rows = [names[name][candidate] for name in names]
            dots(axes, rows, np.arange(len(rows)) + shift, "over", color=color, markersize=4, linewidth=1)
        axes.set_yticks(range(len(names)), list(names))
        axes.set(title=panels[kind][0], xlabel="over Flax", ylim=(len(names) - 0.5, -0.5))
        axes.set_xlim(0, max(2, 1.2 * most))
        axes.grid(False, axis="y")
    dot = {"marker": "o", "linestyle": "none", "markersize": 4}
    drawn = {name: {**dot, "color": color} for name, color in COLORS.items()}
    samples(fig, drawn, loc="outside upper left", ncols=len(drawn))
    return fig


def of_panel(results: Results, kind: str, only: dict[str, str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Label → candidate → row of one panel."""
    chosen = {}
    for rows in paired(results, kind).values():
        row = rows[OURS]
        if all(row[key] == value for key, value in only.items()):
            chosen[row["what"] if only else label(row).replace(" convolution", " conv.")] = rows
    return chosen
