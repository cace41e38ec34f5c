"""READMEs, and the committed results whose figures they have."""

import functools
import json
import math
from pathlib import Path

from experiments.framework.lines import read
from experiments.material import cases, models

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments/results"
H100, H200 = RESULTS / "gpu/nvidia-h100-80gb-hbm3", RESULTS / "gpu/nvidia-h200"
APART = "forward", "backward"
README, KERNELS, EXPERIMENTS = (
    (ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in (".", "kernels", "experiments")
)


def results(name):
    return json.loads((RESULTS / f"cpu/{name}.json").read_text(encoding="utf-8"))


@functools.cache
def lines(flight, kind, card=H100):
    found = read([card / f"{flight}.jsonl"])
    return [line for line in found if line.get("kind") == kind]  # tried.jsonl has lines without


def steps():
    """(candidate, whether in segments): a training step; where one was measured twice, the last."""
    return {(line["candidate"], line["segments"]): line for line in lines("flight2", "step")}


def norms():
    """Shape and what it is with, of the batch norms in a step of ResNet-50 at batch 128."""
    found = []
    for shape in (case.shape for case in cases.resnet50(128)):
        before, fused = found[-1] if found else (shape, "relu")
        if shape[-1] == models.EXPANSION * before[-1]:
            found.append((shape, "add + relu"))
        else:  # the shortcut's comes behind the last of its block
            found.append((shape, "alone" if (before, fused) == (shape, "add + relu") else "relu"))
    counts = [[fused for _, fused in found].count(each) for each in ("relu", "add + relu", "alone")]
    assert counts == [33, 16, 4]
    return found


def mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def step_cells(step):
    """Milliseconds, images a second, GiB of a training step."""
    return f"{step['us'] / 1e3:.1f}", f"{step['images']:.0f}", f"{step['peak_bytes'] / 2**30:.2f}"


def ran_cells(kernels, candidate):
    """Milliseconds of a training step by what ran, as a row has them, and those of our kernels."""
    ms = {line["kernel"]: line["us"] / 1e3 for line in kernels if line["candidate"] == candidate}
    ours = sum(value for kernel, value in ms.items() if kernel.startswith("jbn_"))
    cells = [ms["cuDNN and cuBLAS"], ours, ms["XLA"], ms["copies and zeros"], sum(ms.values())]
    return " | ".join(f"{each:.2f}" if each else "–" for each in cells), ours


def gigabytes():
    """What our kernels cannot do without in a training step of ResNet-50 at batch 128."""
    # passes over x: 3 forward and 5 backward; with add + relu the residual is read twice more, and z̄ written
    return 2e-9 * sum(math.prod(shape) * (11 if fused == "add + relu" else 8) for shape, fused in norms())


def speeds(layers, batch, fused, other, *passes):
    """The other's time over that of the kernels, for each shape of which both were measured."""
    times = {
        (line["candidate"], line["case"], line["pass"]): line["us"]
        for line in layers
        if (line["shape"][0], line["fused"]) == (batch, fused)
    }
    return [
        sum(times[other, case, each] for each in passes) / sum(times["jbn triton", case, each] for each in passes)
        for case in dict.fromkeys(case for _, case, _ in times)
        if all((name, case, each) in times for name in (other, "jbn triton") for each in passes)
    ]


def apart(layers, batch, fused, other):
    """As written: geometric mean of forward and backward, the least and the most; either alone; in one program."""
    both = speeds(layers, batch, fused, other, *APART)
    means = [f"{mean(speeds(layers, batch, fused, other, each)):.2f}×" for each in (*APART, "both")]
    return f"{mean(both):.2f}×", f"({min(both):.2f} to {max(both):.2f})", *means
