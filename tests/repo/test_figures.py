"""Figures in READMEs are those of committed results; of a GPU in `test_figures_gpu.py`."""

import re

import pytest
from figures import EXPERIMENTS, README, RESULTS, ROOT, lines, results, steps

from experiments.benchmarks import memory, overhead, speed
from experiments.framework import report
from experiments.framework.record import Results


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
    assert f"{min(speeds):.2f}× to {max(speeds):.2f}× as fast as not folded" in README


def test_communication():
    rows = results("communication")["rows"]
    for devices in (8, 256, 4096):
        found = [row for row in rows if row["devices"] == devices]
        cells = (f"{row['collectives']}, {row['received_bytes'] / 1e6:.3g} MB" for row in found)
        assert f"| {devices} | {' | '.join(cells)} |" in EXPERIMENTS


def test_memory():
    rows = results("memory")["rows"]
    pages = {name: (ROOT / name / "README.md").read_text(encoding="utf-8") for name in (".", "jbn")}
    networks = {row["network"]: {} for row in rows}
    for row in rows:
        networks[row["network"]][row["candidate"]] = row
    ratios = {name: [] for name in ("plan", "planned", "fused", "policy", "InPlace-ABN", "over InPlace-ABN")}
    for network, of in networks.items():
        flax, ours, fused, policy, torch, in_place = of.values()
        saved = [memory.gib(row["saved_bytes"]) for row in of.values()]
        for name, row in of.items():
            cells = (memory.gib(row[f"{kind}_bytes"]) for kind in ("saved", "planned", "peak"))
            assert f"| {name} | {' | '.join(cells)} |" in EXPERIMENTS
        batch, size, *_ = results("memory")["configuration"]["images"][network]
        assert f"| {network}, {batch}×{size}² | {' | '.join(saved)} |" in pages["."]
        assert f"| {network} | {saved[4]} | {saved[5]} | {saved[2]} | {saved[3]} |" in pages["jbn"]
        ratios["plan"].append(ours["planned_bytes"] / flax["planned_bytes"])
        ratios["planned"].append(policy["planned_bytes"] / fused["planned_bytes"])
        ratios["fused"].append(fused["saved_bytes"] / torch["saved_bytes"])
        ratios["policy"].append(policy["saved_bytes"] / fused["saved_bytes"])
        ratios["InPlace-ABN"].append(100 - 100 * in_place["saved_bytes"] / torch["saved_bytes"])
        ratios["over InPlace-ABN"].append(policy["saved_bytes"] / in_place["saved_bytes"])
    shown = {name: f"{min(each):.2f} to {max(each):.2f}×" for name, each in ratios.items()}
    assert (
        f"for a CPU: jbn {shown['plan']} of Flax's. The policy\n  shows no gain there ({shown['planned']})"
        in EXPERIMENTS
    )
    assert f"keeps what PyTorch does, {shown['fused']} of it" in EXPERIMENTS
    assert f"the inputs alone:\n  {shown['policy']} of fused" in EXPERIMENTS
    percent = f"{min(ratios['InPlace-ABN']):.0f} to {max(ratios['InPlace-ABN']):.0f} %"
    assert (
        f"InPlace-ABN saves {percent} of\n" in EXPERIMENTS
        and f"keeps {shown['over InPlace-ABN']} of what" in EXPERIMENTS
    )
    found = steps()
    kernels, saving = (found["jbn triton", segments] for segments in (False, True))
    [whole] = (
        line for line in lines("tried", "step") if line["named"] and "tried" not in line and not line.get("stages")
    )
    one, six, flax = (f"{step['peak_bytes'] / 2**30:.2f}" for step in (whole, saving, found["flax.linen", False]))
    assert f"it fell to {one} GiB" in EXPERIMENTS
    assert f"takes {six} GiB in six segments, {one}\nin one (Flax {flax};" in pages["jbn"]
    assert f"to {saving['peak_bytes'] / kernels['peak_bytes']:.2f}×, as parameters" in EXPERIMENTS
    ms = f"{saving['us'] / 1e3:.1f} ms\n  with the policy and {kernels['us'] / 1e3:.1f} without"
    assert ms in pages["jbn"] and f"so {100 - 100 * kernels['us'] / saving['us']:.0f} % of the step" in pages["jbn"]
