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
