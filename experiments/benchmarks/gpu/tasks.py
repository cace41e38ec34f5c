"""What is timed on a GPU, the most informative first."""

from typing import NamedTuple

from experiments.material import cases
from experiments.material.cases import Case

PASSES = ("forward", "backward", "both")
FUSED = ("alone", "relu", "add + relu")
BATCHES = (256, 128)  # of the ResNet-50 step


class Task(NamedTuple):
    """One batch norm that every candidate computes; or, with `batch`, one training step of ResNet-50."""

    case: str
    shape: tuple[int, ...]
    axis: int = -1
    dtype: str = "bfloat16"
    fused: str = "alone"
    batch: int | None = None

    @property
    def layout(self) -> str:
        return "last" if self.axis in (-1, len(self.shape) - 1) else "first"

    @property
    def size(self) -> int:
        """Bytes of x."""
        count = 4 if self.dtype == "float32" else 2
        for n in self.shape:
            count *= n
        return count


def tasks() -> list[Task]:
    """ResNet-50's shapes at batch 256 in bfloat16, its training steps, the same in float32, then all other shapes."""
    first = sorted(cases.distinct(cases.resnet50(256)), key=lambda case: -size(case))
    rest = [case for case in cases.GPU if case not in first]
    steps = [Task(f"ResNet-50, batch {batch}", (batch, 224, 224, 3), batch=batch) for batch in BATCHES]
    return [
        *layers(first, "bfloat16"),
        *steps,
        *layers(first, "float32"),
        *layers(rest, "bfloat16"),
        *layers(rest, "float32"),
    ]


def layers(found: list[Case], dtype: str) -> list[Task]:
    """Each case with each of what follows it: with add + relu, relu, alone."""
    return [Task(case.name, case.shape, case.axis, dtype, fused) for fused in reversed(FUSED) for case in found]


def size(case: Case) -> int:
    return Task(case.name, case.shape).size


def weights(batch: int) -> dict[str, int]:
    """How many of ResNet-50's batch norms have each shape."""
    norms = [case.name for case in cases.resnet50(batch)]
    return {name: norms.count(name) for name in norms}
