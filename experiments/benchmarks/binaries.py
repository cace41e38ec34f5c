"""Do the kernels compile without spills, for GPUs that need not be here?

Every kernel, as it is launched for three representative layouts, is compiled ahead of time for three NVIDIA
architectures and one of AMD's; registers, spills, shared memory and the width of each access to global memory are
read from the binary. The layouts are ResNet's: channels last (32×56×56×256), channels first (32×64×56×56), and
channels first with 7×7 positions, where no row of a channel starts at a multiple of 16 bytes.

Beside them, for NVIDIA's, a model of what the loads allow (`in_flight.py`): bytes that a multiprocessor asks for at
once, and the bandwidth that these allow an H100 at 800 ns a load; and, where an H100 measured the same launch, its
bandwidth over that of a copy of x.
"""

import importlib.metadata
from collections.abc import Iterator
from typing import Any

from experiments.framework.compiling import making
from experiments.framework.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, pyplot, samples
from experiments.framework.record import Options, Results, progress, require

require("triton")

# Triton is asked for first, so that its absence gets a remedy
from experiments.benchmarks.in_flight import PROCESSORS, REGISTERS, in_flight, measured  # noqa: E402
from jbn.kernels import launches  # noqa: E402
from jbn.kernels.binaries import TARGETS, compile_launch, name_of  # noqa: E402
from jbn.kernels.launches import ITEMSIZE, Launch, Mask, Problem  # noqa: E402
from jbn.kernels.tiling import View  # noqa: E402

MOST_REGISTERS = 255  # of a thread, on NVIDIA's
THREADS = 2048  # of a multiprocessor
# Launches that were measured too, and what they are called there.
MEASURED = {
    "moments": ("moments", "alone"),
    "apply": ("apply", "alone"),
    "sums": ("sums", "alone"),
    "sums, relu": ("sums", "relu"),
    "input": ("input", "alone"),
    "input, relu": ("input", "relu"),
}
VIEWS = {
    "last": View(1, 32 * 56 * 56, 256, 1),
    "first": View(1, 32, 64, 56 * 56),
    "unaligned": View(1, 32, 512, 7 * 7),
}
DTYPES = ("bfloat16", "float32")
COLORS = dict(zip(TARGETS, (SKY, BLUE, GREEN, ORANGE), strict=True))
# What a launch reads, (dtype of x and the like, then vectors); see the functions of `launches`.
VECTORS = ("float32",) * 5


def representative(
    view: View, dtype: str, activation: str = "silu", target: str = "sm_80"
) -> dict[str, tuple[Launch, tuple[str, ...]]]:
    """Launches, with their input dtypes; `activation` is that of those with a residual."""
    capability = int(target.removeprefix("sm_")) if target.startswith("sm_") else 0
    plain = Problem(view, dtype, view.rows)
    fused = plain._replace(residual=True, activation=activation)
    full, of_rows = Mask("full"), Mask("rows", period=view.rows)
    sums = (dtype, *VECTORS, dtype, "bool", dtype)
    moved = (dtype, *VECTORS, "float32", dtype, "bool", dtype, "float32", "float32")
    return {
        "moments": (launches.moments(plain, PROCESSORS, capability=capability), (dtype, "bool")),
        "moments, full mask": (launches.moments(plain._replace(mask=full), PROCESSORS), (dtype, "bool")),
        "moments, mask of rows": (launches.moments(plain._replace(mask=of_rows), PROCESSORS), (dtype, "bool")),
        "apply": (launches.apply(plain, dtype, PROCESSORS), (dtype, *VECTORS, dtype)),
        f"apply, residual, {activation}": (launches.apply(fused, dtype, PROCESSORS), (dtype, *VECTORS, dtype)),
        "sums": (launches.gradient_sums(plain, None, PROCESSORS), sums),
        "sums, relu": (launches.gradient_sums(plain._replace(activation="relu"), None, PROCESSORS), sums),
        f"sums, residual, {activation}": (launches.gradient_sums(fused, dtype, PROCESSORS), sums),
        "sums, residual, relu": (
            launches.gradient_sums(fused._replace(activation="relu"), dtype, PROCESSORS, capability=capability),
            sums,
        ),
        "sums, mask of rows": (launches.gradient_sums(plain._replace(mask=of_rows), None, PROCESSORS), sums),
        "input": (launches.gradient_input(plain, dtype, None, PROCESSORS), moved),
        "input, relu": (launches.gradient_input(plain._replace(activation="relu"), dtype, None, PROCESSORS), moved),
        f"input, mask, residual, {activation}": (
            launches.gradient_input(fused._replace(mask=full, weight=True), dtype, dtype, PROCESSORS),
            moved,
        ),
        "input, mask of rows": (
            launches.gradient_input(plain._replace(mask=of_rows, weight=True), dtype, None, PROCESSORS),
            moved,
        ),
    }


def compiled(targets: Any = TARGETS, views: Any = VIEWS, dtypes: Any = DTYPES) -> Iterator[tuple[Any, ...]]:
    """Every launch compiled for each target in turn: (layout, dtype, name, launch, binary, its name)."""
    for layout in views:
        for dtype in dtypes:
            for target in targets:
                for name, (launch, arrays) in representative(VIEWS[layout], dtype, target=target).items():
                    with making("triton"):
                        binary = compile_launch(launch, arrays, target)
                    yield layout, dtype, name, launch, binary, name_of(launch, arrays, target)


def run(options: Options, results: Results) -> None:
    """Compiles everything; a row of results for each binary."""
    targets, views, dtypes = tuple(TARGETS), tuple(VIEWS), DTYPES
    if options.quick:
        targets, views, dtypes = ("sm_90",), ("last",), ("bfloat16",)
    results.configuration = {
        "triton": importlib.metadata.version("triton"),
        "targets": targets,
        "layouts": views,
        "dtypes": dtypes,
        "quick": options.quick,
    }
    count = len(representative(VIEWS["last"], "float32")) * len(targets) * len(views) * len(dtypes)
    with progress(count) as step:
        for layout, dtype, name, launch, binary, known in compiled(targets, views, dtypes):
            step(f"{binary.target}, channels {layout}, {dtype}, {name}")
            view, threads = VIEWS[layout], 32 * launch.tiling.warps
            nvidia, h100 = binary.target.startswith("sm_"), binary.target == "sm_90"
            flying = in_flight(launch, binary, view, ITEMSIZE[dtype]) if nvidia else None
            case = (*MEASURED.get(name, ("", "")), view.rows, view.channels, dtype)
            share = measured().get(case) if h100 and layout == "last" else None
            by_registers = REGISTERS // (-(-binary.registers // 8) * 8 * threads)  # allotted in steps of 8 a thread
            results.rows.append(
                {
                    "launch": name,
                    "layout": layout,
                    "dtype": dtype,
                    "target": binary.target,
                    "tile": f"{launch.tiling.ROWS}×{launch.tiling.CHANNELS}",
                    "threads": threads,
                    "registers": binary.registers,
                    "spilled": binary.spilled,
                    "shared_bytes": binary.shared,
                    "loads_bytes": widths(binary.loads),
                    "stores_bytes": widths(binary.stores),
                    # AMD's registers are allotted otherwise
                    "occupancy": min(by_registers * threads / THREADS, 1) if nvidia else None,
                    "resident": flying and flying.resident,
                    "in_flight_bytes": flying and flying.waiting,
                    "ceiling_tbs": round(flying.ceiling / 1e12, 2) if flying and h100 else None,
                    "of_a_copy": share and round(share, 3),
                    "binary": known,
                }
            )
    results.summary = {
        "binaries": len(results.rows),
        "spilling": sum(row["spilled"] > 0 for row in results.rows),
        "registers_most": max(row["registers"] for row in results.rows),
    }


def widths(accesses: tuple[int, ...]) -> str:
    """How many accesses there are of each width in bytes: `16×8 4×2`, widest first."""
    return " ".join(f"{width}×{accesses.count(width)}" for width in sorted(set(accesses), reverse=True))


def table(results: Results) -> Any:
    """Every binary, a line each."""
    from rich.table import Table

    shown = Table(
        title="What the kernels compile to",
        caption="Loads and stores: bytes × instructions. Occupancy: threads that fit, by registers. In flight: KiB "
        "that the programs on a multiprocessor ask for at once; ceiling: TB/s that these allow an H100 at 800 ns. "
        "Of a copy: what an H100 measured.",
    )
    shown.add_column("launch")
    shown.add_column("layout, dtype, target")
    columns = ("tile", "threads", "registers", "spilled", "loads", "stores", "occupancy")
    for column in (*columns, "programs", "in flight", "ceiling", "of a copy"):
        shown.add_column(column, justify="right", overflow="fold")
    for row, after in zip(results.rows, [*results.rows[1:], None], strict=True):
        shown.add_row(
            row["launch"],
            ", ".join(row[column] for column in ("layout", "dtype", "target")),
            *(
                str(row[column])
                for column in ("tile", "threads", "registers", "spilled", "loads_bytes", "stores_bytes")
            ),
            told(row["occupancy"], ".0%"),
            told(row["resident"], "d"),
            told(row["in_flight_bytes"] and row["in_flight_bytes"] / 1024, ".0f"),
            told(row["ceiling_tbs"], ".1f"),
            told(row["of_a_copy"], ".0%"),
            end_section=after is not None and after["launch"] != row["launch"],
        )
    return shown


def told(value: Any, form: str) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:{form}}"


def figure(results: Results) -> Any:
    """Registers a thread, of each launch, by layout; a dot for each target and dtype, told once above all panels."""
    told = results.configuration
    names = list(dict.fromkeys(row["launch"] for row in results.rows))
    layouts = told["layouts"]
    fig, panels = pyplot().subplots(
        1, len(layouts), figsize=(7.2, 4), sharey=True, sharex=True, squeeze=False, layout="constrained"
    )
    for axes, layout in zip(panels[0], layouts, strict=True):
        for row in results.rows:
            if row["layout"] == layout:
                place = names.index(row["launch"]) + 0.16 * (list(TARGETS).index(row["target"]) - 1.5)
                color = COLORS[row["target"]] if not row["spilled"] else VERMILION
                filling = color if row["dtype"] == "bfloat16" else "white"
                axes.plot(row["registers"], place, "o", color=color, markerfacecolor=filling, markersize=3.5)
        axes.axvline(MOST_REGISTERS, color=PURPLE, linewidth=0.8)
        axes.set(
            title=f"channels {layout}" if layout != "unaligned" else "first, unaligned", xlabel="registers a thread"
        )
    panels[0, 0].set_yticks(range(len(names)), names)
    panels[0, 0].set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 262))
    dot = {"marker": "o", "linestyle": "none", "markersize": 4}
    drawn = {target: {**dot, "color": COLORS[target]} for target in told["targets"]}
    if any(row["spilled"] for row in results.rows):
        drawn["spilled"] = {**dot, "color": VERMILION}
    drawn |= {
        "bfloat16": {**dot, "color": GREY},
        "float32": {**dot, "color": GREY, "markerfacecolor": "white"},
        f"{MOST_REGISTERS}, NVIDIA's most": {"color": PURPLE, "linewidth": 0.8},
    }
    samples(fig, drawn, loc="outside upper left", ncols=len(drawn), columnspacing=1, handlelength=1)
    return fig


def found(results: Results) -> list[str]:
    """Spills and registers; what loads allow, and what was measured."""
    told, summary = results.configuration, results.summary
    plain = [row for row in results.rows if row["ceiling_tbs"] and "mask" not in row["launch"]]
    least = min(row["ceiling_tbs"] for row in plain if row["layout"] != "unaligned")
    shares = [row["of_a_copy"] for row in plain if row["of_a_copy"]]
    return [
        f"{summary['spilling'] or 'None'} of {summary['binaries']} binaries spills registers; the largest takes "
        f"{summary['registers_most']} of {MOST_REGISTERS} a thread.",
        f"{len(told['layouts'])} layouts, {' and '.join(told['dtypes'])}, for {', '.join(told['targets'])}.",
        f"At 800 ns a load, what kernels without a mask ask for at once allows an H100 {least:.1f} TB/s or more where "
        f"rows are aligned; measured, {len(shares)} of these launches moved {min(shares):.0%} to {max(shares):.0%} of "
        "what a copy of x does.",
    ]
