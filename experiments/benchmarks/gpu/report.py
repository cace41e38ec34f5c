"""What a GPU's timings say: the table, the figure, and the summary with the marks and the rows for the dispatch."""

from statistics import geometric_mean
from typing import Any

from experiments.framework.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, pyplot
from experiments.framework.record import Results
from experiments.material import cases

COLORS = {
    "jbn triton": BLUE, "jbn xla": GREEN, "flax.linen": GREY, "torch": ORANGE, "torch cudnn": VERMILION, "copy": PURPLE,
}  # fmt: skip
LARGE = 100e6  # bytes of x: what the mark for bandwidth counts
OURS, PLAIN, BASELINE = "jbn triton", "jbn xla", "flax.linen"
Row = dict[str, Any]


def measured(results: Results, **wanted: Any) -> list[Row]:
    """Rows with times, that have these values."""
    rows = (row for row in results.rows if row["microseconds"] is not None)
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def key(row: Row) -> tuple[Any, ...]:
    return row["case"], row["dtype"], row["fused"], row["pass"]


def times(results: Results) -> dict[tuple[Any, ...], dict[str, float]]:
    """(case, dtype, fused, pass) → candidate → microseconds."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in measured(results):
        found.setdefault(key(row), {})[row["candidate"]] = row["microseconds"]
    return found


def copy_bandwidth(results: Results) -> float | None:
    """Bytes a second, read and written, of the fastest copy."""
    return max(
        (1e6 * row["floor_bytes"] / row["microseconds"] for row in measured(results, candidate="copy")), default=None
    )


def summary(results: Results) -> dict[str, Any]:
    """The marks, each None where nothing was measured for it."""
    bandwidth, found = copy_bandwidth(results), times(results)
    first = {case.name for case in cases.resnet50(256)}
    speedups: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32"):
        for fused in ("alone", "relu", "add + relu"):
            for each in ("forward", "backward", "both"):
                group = [t for k, t in found.items() if k[1:] == (dtype, fused, each) and k[0] in first]
                for name in ("flax.linen", "jbn xla", "torch"):
                    ratios = [b / t[OURS] for t in group if OURS in t and (b := best(t, name))]
                    if ratios:
                        speedups[f"{dtype}, {fused}, {each}, over {name}"] = geometric_mean(ratios)
    fractions = {
        name: [
            row["floor_bytes"] * 1e6 / row["microseconds"] / bandwidth
            for row in measured(results, candidate=name)
            if bandwidth and row["bytes"] > LARGE and row["pass"] in ("forward", "backward")
        ]
        for name in COLORS
    }
    behind = [
        {"case": k[0], "dtype": k[1], "fused": k[2], "speedup": t[BASELINE] / t[OURS]}
        for k, t in found.items()
        if k[3] == "both" and {OURS, BASELINE} <= t.keys() and t[BASELINE] < t[OURS]
    ]
    return {
        "copy_bandwidth_GB_per_s": bandwidth and bandwidth / 1e9,
        "fraction_of_copy_bandwidth_over_100_MB": {
            name: {"least": min(each), "geometric_mean": geometric_mean(each)}
            for name, each in fractions.items()
            if each
        },
        "resnet50_batch_256_speedup_geometric_mean": speedups,
        "behind_flax": behind,
        "wins": wins(results),
        "resnet50_step": {
            f"{row['case']}, {row['candidate']}": {
                "images_per_second": row["images_per_second"],
                "peak_bytes": row["peak_bytes"],
                "loss": row["loss"],
            }
            for row in measured(results, **{"pass": "step"})
        },
    }


def best(each: dict[str, float], name: str) -> float | None:
    """Microseconds of a candidate; of PyTorch, of the better of its two."""
    found = [
        t for candidate, t in each.items() if candidate == name or (name == "torch" and candidate.startswith(name))
    ]
    return min(found, default=None)


def wins(results: Results) -> list[dict[str, Any]]:
    """Rows for `jbn._op.dispatch.WINS`: from which size on kernels took no longer than XLA in every case measured."""
    of = {(row["case"], row["dtype"]): (row["layout"], row["bytes"]) for row in results.rows}
    ratios: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for (case, dtype, _, each), t in times(results).items():
        if each == "both" and {OURS, PLAIN} <= t.keys():
            layout, size = of[case, dtype]
            ratios.setdefault((dtype, layout), []).append((size, t[PLAIN] / t[OURS]))
    found = []
    for (dtype, layout), pairs in ratios.items():
        lost = max((size for size, ratio in pairs if ratio < 1), default=0)
        won = [size for size, _ in pairs if size > lost]
        if won:
            found.append({"dtype": dtype, "layout": layout, "size": min(won), "cases": len(won)})
    return found


def table(results: Results) -> Any:
    """Forward + backward of every case: microseconds of each candidate, and ours over Flax's; then training steps."""
    from rich.table import Table

    candidates = [name for name in results.configuration["candidates"] if name != "copy"]
    bandwidth = copy_bandwidth(results)
    shown = Table(
        title="batch norm, forward + backward",
        caption="Median microseconds of a layer; speed over Flax's. "
        + (f"A copy moves {bandwidth / 1e9:.0f} GB/s." if bandwidth else ""),
    )
    for name in ("case", "dtype", "with", *candidates, "triton over Flax"):
        shown.add_column(name)
    for (case, dtype, fused, each), found in times(results).items():
        if each not in ("both", "step"):
            continue
        cells = [f"{found[name]:.1f}" if name in found else "–" for name in candidates]
        ratio = f"{found[BASELINE] / found[OURS]:.2f}×" if {OURS, BASELINE} <= found.keys() else "–"
        shown.add_row(case, dtype, "whole step" if each == "step" else fused, *cells, ratio)
    errors = {(row["candidate"], row["error"]) for row in results.rows if row["error"]}
    for name, error in sorted(errors):
        shown.add_row("failed", "", "", f"{name}: {error}"[:100])
    return shown


def figure(results: Results) -> Any:
    """Bytes a second of the floor, forward + backward, over the size of x: a panel a fusion, a dot a case."""
    plt = pyplot()
    fusions = ("alone", "relu", "add + relu")
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True, layout="constrained")
    bandwidth = copy_bandwidth(results)
    for ax, fused in zip(axes, fusions, strict=True):
        for name, color in COLORS.items():
            rows = measured(results, candidate=name, fused=fused, **{"pass": "forward" if name == "copy" else "both"})
            if rows:
                size = [row["bytes"] / 1e6 for row in rows]
                ax.plot(size, [row["floor_bytes"] / row["microseconds"] / 1e3 for row in rows], "o", color=color,
                        markersize=3, label=name)  # fmt: skip
        if bandwidth:
            ax.axhline(bandwidth / 1e9, color=GREY, linewidth=1)
        ax.set(xscale="log", xlabel="x / MB", title=fused)
    axes[0].set_ylabel("floor's bytes over time / (GB/s)")
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    fig.suptitle("batch norm, forward + backward; line: a copy")
    return fig
