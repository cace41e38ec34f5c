"""Which launches are measured raw, the most informative first: for ResNet-50's shapes, and copies by size."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.flight import ahead
from experiments.benchmarks.gpu.flight.pieces import NAMED, PIECES, Case, arrays_of, launch_of, problem_of, reads_of
from experiments.benchmarks.gpu.flight.raw import COPIED
from experiments.material import cases
from jbn.kernels.binaries import name_of

BATCHES, DTYPES = (256, 32), ("bfloat16", "float32")
KNEE = (4, 8, 16, 24, 32, 48, 64, 96, 128)  # MB of x, bfloat16: where L2 ends
Shapes = dict[int, list[tuple[int, ...]]]


def resnet50() -> Shapes:
    """Batch → shapes, the largest first."""
    return {
        batch: sorted((case.shape for case in cases.distinct(cases.resnet50(batch))), key=math.prod, reverse=True)
        for batch in BATCHES
    }


def everything(shapes: Shapes | None = None, knee: Iterable[int] = KNEE) -> list[Case]:
    """Copies and reads by size; the library's own choices; then what else is tried, for bfloat16, then float32."""
    shapes = resnet50() if shapes is None else shapes
    copied = [Case(name, "alone", (megabytes * 2**20 // 128, 64), "bfloat16") for megabytes in knee for name in COPIED]
    chosen, tried = [], []
    for dtype in DTYPES:
        for each in shapes.values():
            chosen += [Case(piece.kernel, piece.fused, shape, dtype) for shape in each for piece in PIECES]
            tried += [more for shape in each for piece in PIECES for more in others(piece, shape, dtype)]
    return list(dict.fromkeys([*copied, *chosen, *tried]))


def others(piece: Any, shape: tuple[int, ...], dtype: str) -> Iterator[Case]:
    """What is tried of a piece beside the library's own choice."""
    case = Case(piece.kernel, piece.fused, shape, dtype)
    for how in piece.tried(problem_of(case).view, dtype):
        yield case._replace(how=how)


def described(case: Case) -> dict[str, Any]:
    """A case as whoever launches it needs it, without Triton: see `raw`. Numbers that are 1 are compiled in."""
    launch, piece = launch_of(case), NAMED[case.kernel, case.fused]
    return {
        "binary": name_of(launch, arrays_of(case), ahead.TARGET),
        "kernel": case.kernel,
        "fused": case.fused,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "tiling": list(launch.tiling),
        "unroll": launch.constants.get("UNROLL"),
        "chosen": case.how.tiling is None,
        "programs": launch.programs,
        "moved": piece.moved,
        "reads": list(reads_of(case)),
        "numbers": [[type(n).__name__, n] for n in launch.numbers if n != 1],
        "outputs": [[list(o.shape), o.dtype, o.zeroed, piece.writes.get(i)] for i, o in enumerate(launch.outputs)],
    }


def write(folder: Path, planned: list[Case]) -> dict[str, Case]:
    """Writes `runs.json`; returns each binary's name with a case that it serves."""
    runs = [described(case) for case in planned]
    ahead.write(folder / "runs.json", runs)
    binaries: dict[str, Case] = {}
    for run, case in zip(runs, planned, strict=True):
        binaries.setdefault(run["binary"], case)
    return binaries
