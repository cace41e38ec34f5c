"""What came back, as tables of plain text: tilings beside the library's own, kernels beside XLA, Flax and PyTorch."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from experiments.framework.lines import read

Line = dict[str, Any]
OURS, PLAIN, BASELINE = "jbn triton", "jbn xla", "flax.linen"
CANDIDATES = (OURS, PLAIN, BASELINE, "torch", "torch cudnn")


def summarise(paths: Iterable[Path]) -> str:
    """All tables for which there are lines; where something was measured twice, the last time counts."""
    files = [file for path in paths for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])]
    found = list(read(file for file in files if file.exists()))
    tables = (machine, copies, kernels, layers, wins, steps, ran, repeats, failures)
    shown = ["\n".join(lines) for lines in (list(table(found)) for table in tables) if lines]
    return "\n\n".join(shown) if shown else "no lines were found: a run on a GPU writes them (experiments/README.md)"


def of(found: list[Line], kind: str) -> Iterator[Line]:
    return (line for line in found if line.get("kind") == kind)  # tried.jsonl has lines without


def name(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def terabytes(line: Line, us: str = "us") -> float:
    """TB/s of what a run could not do without, at its `us` or `same_us`; 0 where there is none."""
    return line["bytes"] / line[us] / 1e6 if line.get(us) else 0.0


def machine(found: list[Line]) -> Iterator[str]:
    for line in of(found, "environment"):
        packages = " ".join(f"{name} {version}" for name, version in line["packages"].items() if version)
        yield f"run {line['flight']} on {line['card']}, {line['cores']} cores; {packages}"
    for line in of(found, "part"):
        took = f"{line['seconds']} s" if "seconds" in line else None
        told = [each for each in (line.get("ended"), took, line.get("last")) if each]
        yield f"  {line['part']:18} {', '.join(told)}"


def copies(found: list[Line]) -> Iterator[str]:
    """Where L2 ends: the speed on one buffer falls to that on many."""
    runs = {(run["kernel"], *run["shape"]): run for run in of(found, "run") if len(run["shape"]) == 2}
    if runs:
        yield "copy and read by size of x / TB/s: on buffers of their own, and on one"
    for (kernel, *shape), run in sorted(runs.items()):
        size = math.prod(shape) * 2 / 2**20
        yield f"  {kernel:5} {size:5.0f} MiB {terabytes(run):5.2f} {terabytes(run, 'same_us'):5.2f}"


def kernels(found: list[Line]) -> Iterator[str]:
    """The library's tiling beside the best that was right, and the copy of the same shape."""
    runs: dict[tuple[Any, ...], dict[tuple[Any, ...], Line]] = {}
    for run in of(found, "run"):
        if len(run["shape"]) == 4:
            ways = runs.setdefault((run["dtype"], run["kernel"], run["fused"], *run["shape"]), {})
            ways[*run["tiling"], run["unroll"], run["chosen"]] = run
    if runs:
        yield "kernels: microseconds and TB/s of the library's tiling, and of the best that was right"
    for (dtype, kernel, fused, *shape), ways in runs.items():
        lines = list(ways.values())
        chosen = next((line for line in lines if line["chosen"]), None)
        right = min((line for line in lines if line["ok"]), key=lambda line: line["us"], default=None)
        copy = next(iter(runs.get((dtype, "copy", "alone", *shape), {}).values()), None)
        bad = sum(not line["ok"] for line in lines)
        cells = [f"  {dtype:8} {kernel:7} {fused:10} {name(shape):14}"]
        cells.append(f"{chosen['us']:8.1f} {terabytes(chosen):5.2f}" if chosen else " " * 14)
        if right:
            how = f"{name(right['tiling'])} unroll {right['unroll']} resident {right['resident']}"
            how += f" registers {right['registers']}" + f" SPILLS {right['spilled']}" * bool(right["spilled"])
            cells.append(f"best {right['us']:8.1f} {terabytes(right):5.2f} {how}")
        if copy and right and kernel != "copy" and terabytes(copy):
            cells.append(f"{terabytes(right) / terabytes(copy):.0%} of a copy")
        yield " | ".join([*cells, f"{bad} of {len(lines)} WRONG" if bad else f"{len(lines)} right"])
    for line in {(*b["shape"], b["dtype"], b["baseline"], b["pass"]): b for b in of(found, "baseline")}.values():
        yield f"  {line['dtype']:8} {line['baseline']:11} {line['pass']:8} {name(line['shape']):14} {line['us']:8.1f}"


def layers(found: list[Line]) -> Iterator[str]:
    """Each pass of each candidate, and how much faster kernels are."""
    times: dict[tuple[Any, ...], dict[str, Line]] = {}
    for line in of(found, "layer"):
        key = line["shape"][0], line["fused"], line["case"], line["pass"]
        times.setdefault(key, {})[line["candidate"]] = line
    if times:
        yield f"through JAX, microseconds a layer: {', '.join(CANDIDATES)}; Flax, XLA and PyTorch over kernels"
    ratios: dict[tuple[Any, ...], list[float]] = {}
    for (batch, fused, case, each), by in times.items():
        us = {candidate: line["us"] for candidate, line in by.items()}
        torch = [value for candidate, value in us.items() if candidate.startswith("torch")]
        cells = [f"{us[c]:8.1f}" if c in us else " " * 7 + "–" for c in CANDIDATES]
        for rival, value in ((BASELINE, us.get(BASELINE)), (PLAIN, us.get(PLAIN)), ("torch", min(torch, default=None))):
            if OURS in us and value:
                ratios.setdefault((batch, fused, each, rival), []).append(value / us[OURS])
                cells.append(f"{value / us[OURS]:5.2f}×")
        wrong = [candidate for candidate, line in by.items() if line["same"] is False]
        host = [candidate for candidate, line in by.items() if line["host_us"] > 0.9 * line["us"]]
        notes = [f"DIFFERS: {', '.join(wrong)}"] * bool(wrong) + [f"the host's time: {', '.join(host)}"] * bool(host)
        yield " ".join([f"  {case:16} {fused:10} {each:8}", *cells, *notes])
    for (batch, fused, each, rival), values in ratios.items():
        mean = geometric_mean(values)
        yield f"  batch {batch}, {fused}, {each}, {rival} over kernels: geometric mean {mean:.3f}× of {len(values)}"


def wins(found: list[Line]) -> Iterator[str]:
    """Rows for `jbn._op.dispatch.WINS`."""
    lines = list(of(found, "layer"))
    if lines:
        from experiments.benchmarks.gpu import report
        from experiments.framework.record import Results

        keys = ("case", "dtype", "fused", "pass", "candidate", "bytes")
        rows = [{key: line[key] for key in keys} | {"layout": "last", "microseconds": line["us"]} for line in lines]
        yield "from which size on kernels took no longer than XLA in every case, forward + backward"
        for row in report.wins(Results("flight", rows=rows)):
            yield f"  {row['dtype']}, channels {row['layout']}: from {row['size'] / 1e6:.1f} MB, {row['cases']} cases"


def steps(found: list[Line]) -> Iterator[str]:
    last = {(line["batch"], line["candidate"], kept(line)): line for line in of(found, "step")}
    if last:
        yield "a training step of ResNet-50: milliseconds, images a second, GiB held and planned"
    for (batch, candidate, which), line in sorted(last.items()):
        held = [f"{line[key] / 2**30:6.2f}" if line[key] else "     –" for key in ("peak_bytes", "planned_bytes")]
        told = f"  {batch:4} {candidate:11} {which:36}"
        yield f"{told} {line['us'] / 1e3:8.2f} {line['images']:8.0f} {' '.join(held)}"


def ran(found: list[Line]) -> Iterator[str]:
    """What the device ran in the last training steps."""
    last = {(line["batch"], line["candidate"], kept(line), line["kernel"]): line for line in of(found, "kernels")}
    if last:
        yield "of it the device ran: launches and milliseconds a step"
    for (batch, candidate, which, kernel), line in sorted(last.items()):
        yield f"  {batch:4} {candidate:11} {which:36} {kernel:20} {line['launches']:5.0f} {line['us'] / 1e3:8.3f}"


def kept(step: Line) -> str:
    """Of what a training step keeps little."""
    return "inputs and statistics kept" * step["named"] + ", in segments" * step.get("segments", False)


def repeats(found: list[Line]) -> Iterator[str]:
    checked = list(of(found, "check"))
    if checked:
        wrong = [line for line in checked if not line["ok"]]
        yield f"checked without being timed: {len(checked)} launches, {len(wrong)} WRONG"
        yield from (f"  {line['kernel']} {line['fused']} {name(line['shape'])} {line['errors']}" for line in wrong)
    lines = list(of(found, "repeat"))
    if lines:
        times, differing = sum(line["times"] for line in lines), [line for line in lines if line["differing"]]
        yield f"the same bits: {len(lines)} launches, {times} runs, {len(differing)} launches DIFFER"
        yield from (f"  {line['kernel']} {line['fused']} {name(line['shape'])} {line['dtype']}" for line in differing)


def failures(found: list[Line]) -> Iterator[str]:
    counted = Counter(
        (line.get("candidate") or line.get("kernel") or line.get("baseline") or "", line["error"])
        for line in of(found, "error")
    )
    if counted:
        yield "what failed"
    yield from (f"  {count} times: {who} {error}" for (who, error), count in counted.most_common(30))
