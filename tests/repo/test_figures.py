"""Figures in READMEs are those of committed results."""

import json
import math
import re
from pathlib import Path

import pytest

from experiments.benchmarks import overhead, speed
from experiments.framework import report
from experiments.framework.record import Results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments/results"
H100 = RESULTS / "gpu/nvidia-h100-80gb-hbm3"
README, KERNELS, EXPERIMENTS = (
    (ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in (".", "kernels", "experiments")
)


def results(name):
    return json.loads((RESULTS / f"cpu/{name}.json").read_text(encoding="utf-8"))


def lines(flight, kind):
    text = (H100 / f"{flight}.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def test_claims():
    [shown] = re.findall(r"<!-- claims -->\n(.*?)<!-- /claims -->", EXPERIMENTS, re.DOTALL)
    assert shown == report.markdown(report.read(RESULTS / "cpu"))


@pytest.mark.parametrize("benchmark", [speed, overhead], ids=["speed", "overhead"])
def test_tables_of_benchmarks(benchmark):
    name = benchmark.__name__.rpartition(".")[2]
    [shown] = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", EXPERIMENTS, re.DOTALL)
    assert shown == benchmark.markdown(Results.read(RESULTS / f"cpu/{name}.json"))


def test_speed():
    for dtype, means in results("speed")["summary"]["speedup_geometric_mean"].items():
        functions, modules, torch = (f"{means[name]:.2f}×" for name in ("jbn.bn_train", "jbn.linen", "torch"))
        assert re.search(rf"{dtype}[^|]*`bn_train` {functions}, `jbn.linen` {modules}, PyTorch {torch}", README)


def test_digits():
    for row in results("digits")["rows"]:
        accuracy = f"{100 * row['accuracy_mean']:.1f} ± {100 * row['accuracy_deviation']:.1f}"
        assert re.search(rf"\| {row['learning_rate']:g} \| {row['network']} \| .* \| {accuracy} \|", EXPERIMENTS)


def test_folding():
    found = results("folding")
    assert found["complete"] and found["summary"] == {"folded": 53, "left": 0}
    assert f"of {found['configuration']['turns']} turns" in EXPERIMENTS
    speeds = []
    for before, after in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        quartiles = f"{after['speedup_lower_quartile']:.2f}–{after['speedup_upper_quartile']:.2f}"
        times = f"{before['milliseconds']:.1f} | {after['milliseconds']:.1f}"
        assert f"| {before['case']} | {times} | {after['speedup']:.2f}× ({quartiles}) |" in EXPERIMENTS
        speeds.append(after["speedup"])
    assert f"as fast as not folded {min(speeds):.2f}× to {max(speeds):.2f}×" in README


def test_communication():
    rows = results("communication")["rows"]
    for devices in (8, 256, 4096):
        found = [row for row in rows if row["devices"] == devices]
        cells = (f"{row['collectives']}, {row['received_bytes'] / 1e6:.3g} MB" for row in found)
        assert f"| {devices} | {' | '.join(cells)} |" in EXPERIMENTS


def test_training_step_on_a_gpu():
    flax, kernels, saving = found = lines("flight2", "step")

    def told(step):
        return f"{step['us'] / 1e3:.1f}", f"{step['images']:.0f}", f"{step['peak_bytes'] / 2**30:.2f}"

    def beside(step):
        return f"{flax['us'] / step['us']:.2f}", f"{step['peak_bytes'] / flax['peak_bytes']:.2f}"

    for step in found:
        assert f"| {' | '.join(told(step))} | {'× | '.join(beside(step))}× |" in KERNELS
    host = [f"{step['host_us'] / 1e3:.1f}" for step in found]
    assert f"took the host {host[0]}, {host[1]} and {host[2]} ms" in KERNELS
    rows = [line.split("|")[3] for line in README.splitlines() if "the memory |" in line]
    numbers = [re.findall(r"\d+\.?\d*", row) for row in rows]
    assert numbers[0] == [*told(kernels), *told(flax), *beside(kernels)]
    assert numbers[1] == [*told(saving)[::2], *beside(saving)]
    assert f"runs {beside(kernels)[0]}× as fast" in README


def test_layers_on_a_gpu():
    times = {
        (line["candidate"], line["case"], line["pass"]): line["us"]
        for line in lines("flight2", "layer")
        if line["fused"] == "relu"
    }

    def speeds(other, *passes):
        cases = [case for name, case, each in times if (name, each) == (other, "forward")]
        return [
            sum(times[other, case, each] for each in passes) / sum(times["jbn triton", case, each] for each in passes)
            for case in cases
        ]

    shown = {}
    for other in ("flax.linen", "jbn xla", "torch"):
        forward, backward = speeds(other, "forward"), speeds(other, "backward")
        both = speeds(other, "forward", "backward")
        assert len(both) == (6 if other == "torch" else 12)
        shown[other] = [f"{mean(each):.2f}×" for each in (both, forward, backward)]
        shown[other].append(f"({min(both):.2f} to {max(both):.2f})")
    (flax, *flax_apart, flax_range), (xla, *xla_apart, xla_range), (torch, *_) = shown.values()
    assert f"| `flax.linen` | {flax} {flax_range} | {flax_apart[0]}, a loss | {flax_apart[1]} |" in KERNELS
    assert f"| our own XLA | {xla} {xla_range} | {' | '.join(xla_apart)} |" in KERNELS
    assert f"| PyTorch, native and cuDNN, 6 shapes | {torch} |" in KERNELS
    assert f"Flax {flax} {flax_range}, as our own XLA {xla} {xla_range}, as PyTorch {torch} (6 shapes)" in README
    apart = zip(flax_apart, xla_apart, (", **a loss**", ""), strict=True)
    forward, backward = (f"as fast as Flax {flax}{loss}, XLA {xla}" for flax, xla, loss in apart)
    assert f"forward {forward}; backward {backward} |" in README


def test_kernels_on_a_gpu():
    runs = lines("flight3", "run")
    assert all(run["ok"] for run in runs)
    chosen = [run for run in runs if run["chosen"] and run["dtype"] == "bfloat16" and math.prod(run["shape"]) > 50e6]
    copies = {tuple(run["shape"]): run["bytes"] / run["us"] for run in chosen if run["kernel"] == "copy"}
    least, most = min(copies.values()) / 1e6, max(copies.values()) / 1e6
    assert f"moves {least:.1f} to {most:.1f} TB/s" in KERNELS
    shares = [
        run["bytes"] / run["us"] / copies[shape]
        for run in chosen
        if run["kernel"] not in ("copy", "read") and (shape := tuple(run["shape"])) in copies
    ]
    assert len(shares) > 50 and f"at least {100 * min(shares):.0f} % of what the copy" in KERNELS
    checks, repeats = lines("flight3", "check"), lines("flight3", "repeat")
    assert all(check["ok"] for check in checks) and not any(repeat["differing"] for repeat in repeats)
    assert f"on all kernels ({len(checks)}\nlaunches). {len(repeats)} launches, 100 times each" in KERNELS
