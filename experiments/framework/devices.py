"""What runs on GPUs found, for the report: the folders of `results/gpu` beside the folder that is reported on."""

from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from experiments.framework.lines import read
from experiments.framework.record import CHECKOUT

Line = dict[str, Any]
FLAX, KERNELS = "flax.linen", "jbn triton"
RIVALS = {FLAX: "Flax", "jbn xla": "jbn's own XLA", "torch": "PyTorch"}


class Device(NamedTuple):
    """A kind of GPU: its name in links and in words, and sentences of what was found, the most telling first."""

    key: str
    card: str
    found: list[str]


def devices(folder: Path) -> list[Device]:
    """Those that have lines of training steps or layers in a folder of their own, or measured again in another file."""
    found = []
    for path in sorted(folder.glob("*/flight2.jsonl")):
        again = path.with_name("again.jsonl")
        path = again if again.exists() else path
        lines = list(read([path]))
        card = next(
            (line["card"].partition(",")[0] for line in lines if line["kind"] == "environment"), path.parent.name
        )
        if sentences := [*steps(lines), *layers(lines)]:
            where = path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else path
            sentences.append(f"All of it is printed by `.ci/flight summary {where}`.")
            found.append(Device(f"gpu-{path.parent.name}", card, sentences))
    return found


def steps(lines: list[Line]) -> Iterator[str]:
    """Training steps of ResNet-50, beside Flax's."""
    taken = [line for line in lines if line["kind"] == "step"]
    for batch in sorted({line["batch"] for line in taken}, reverse=True):
        by = {(line["candidate"], line["named"]): line for line in taken if line["batch"] == batch}
        if flax := by.pop((FLAX, False), None):
            others = (
                f"{line['us'] / 1e3:.1f} ms with {name}{', saving memory' * named}: {flax['us'] / line['us']:.2f}× as "
                f"fast, {line['peak_bytes'] / flax['peak_bytes']:.2f}× the memory"
                for (name, named), line in by.items()
            )
            yield (
                f"A training step of ResNet-50 at batch {batch}, bfloat16: {flax['us'] / 1e3:.1f} ms with {FLAX}; "
                f"{'; '.join(others)}."
            )


def layers(lines: list[Line]) -> Iterator[str]:
    """Layers of each batch and with each activation, forward and backward timed apart and added, over shapes."""
    times: dict[tuple[int, str], dict[tuple[str, str], dict[str, float]]] = {}
    for line in lines:
        if line["kind"] == "layer" and line["pass"] in ("forward", "backward"):
            kind = times.setdefault((line["shape"][0], line["fused"]), {})
            kind.setdefault((line["candidate"], line["case"]), {})[line["pass"]] = line["us"]
    for (batch, fused), kind in times.items():
        total = {key: sum(each.values()) for key, each in kind.items() if len(each) == 2}
        told = []
        for rival, name in RIVALS.items():
            speeds = [
                us / total[KERNELS, case]
                for (who, case), us in total.items()
                if who == rival and (KERNELS, case) in total
            ]
            if speeds:
                mean = f"{geometric_mean(speeds):.2f}× as fast as {name}"
                told.append(f"{mean} ({min(speeds):.2f} to {max(speeds):.2f}, {len(speeds)} shapes)")
        if told:
            layer = "A layer alone" if fused == "alone" else f"A layer with {fused}"
            yield f"{layer}, batch {batch}, forward and backward apart: kernels are {'; '.join(told)}; geometric means."
