"""What is launched and measured raw: every kernel, with what it reads, what it must write and which tilings are tried.

A new kernel is a new entry of `PIECES`; an operand or a result that none had before has its definition in `operands`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.benchmarks.gpu.flight import bandwidth
from jbn.kernels import launches
from jbn.kernels.launches import Launch, Problem
from jbn.kernels.tiling import Tiling, View

PROCESSORS, CAPABILITY = 132, 90  # multiprocessors of an H100 and an H200, and their compute capability times ten
VECTORS = ("mean", "var", "epsilon", "scale", "bias")


class Tried(NamedTuple):
    """A way to launch a piece; `tiling` None is the library's own choice, as are the constants that are not given."""

    tiling: Tiling | None = None
    constants: tuple[tuple[str, Any], ...] = ()


class Piece(NamedTuple):
    kernel: str
    fused: str  # "alone", "relu", "add + relu"
    launch: Callable[[Problem, Tiling | None], Launch]
    reads: tuple[str, ...]  # operands in the kernel's order; x stands in for what is absent
    writes: dict[int, str]  # which outputs are compared with which exact results
    moved: int  # tensors of x's size read and written: its floor
    tried: Callable[[View, str], list[Tried]]  # for x of a dtype, behind the library's own choice


class Case(NamedTuple):
    """One launch: a piece's names, channels-last shape, dtype, and how it is cut."""

    kernel: str
    fused: str
    shape: tuple[int, ...]
    dtype: str
    how: Tried = Tried()


TILES = {  # of reductions: (channels, warps, elements), 64 or 128 bytes of channels wide, four or eight warps
    "bfloat16": ((32, 4, 2048), (32, 8, 4096), (64, 8, 4096)),
    "float32": ((16, 4, 1024), (16, 8, 2048), (32, 8, 4096)),
}
RESIDENT = {8: 2, 4: 4}  # programs a multiprocessor, by warps
FEW = 2048  # rows that one program may have all of: then there is nothing to zero, nor to merge


def grid(*unrolls: int) -> Callable[[View, str], list[Tried]]:
    """TILES, in programs enough for RESIDENT, or one for FEW rows, with each of these numbers of tiles in flight."""

    def tried(view: View, dtype: str) -> list[Tried]:
        found = []
        for channels, warps, elements in TILES[dtype]:
            rows = elements // channels
            cuts = [cut(view, rows, channels, warps, RESIDENT[warps])]
            cuts += [Tiling(rows, channels, 1, warps)] * (view.rows <= FEW)
            found += [Tried(each, (("UNROLL", n),)) for each in cuts for n in unrolls]
        return found

    return tried


def streams(view: View, dtype: str) -> list[Tried]:
    """A program for each tile of 4 or 8 KB, 128 to 512 bytes of channels wide."""
    size, found = 4 if dtype == "float32" else 2, []
    for width in (128, 256, 512):
        for tile in (4096, 8192):
            rows = tile // width
            if width // size <= view.channels:
                found.append(Tried(Tiling(rows, width // size, -(-view.rows // rows), tile // 1024)))
    return found


def cut(view: View, rows: int, channels: int, warps: int, resident: int) -> Tiling:
    """Tiles of that size, split so that a multiprocessor has some `resident` programs."""
    tiles, share = -(-view.rows // rows), max(1, resident * PROCESSORS // -(-view.channels // channels))
    return Tiling(rows, channels, -(-tiles // -(-tiles // share)), warps)


def alone(_view: View, _dtype: str) -> list[Tried]:
    """Nothing but the library's choice."""
    return []


def slices(view: View, dtype: str) -> list[Tried]:
    """Slices of 32, 64 and 128 bytes, each read by all multiprocessors at once."""
    found = []
    for channels in (width // (4 if dtype == "float32" else 2) for width in (32, 64, 128)):
        tiles = -(-view.rows // (2048 // channels))
        if channels < view.channels:
            found.append(Tried(Tiling(2048 // channels, channels, min(4 * PROCESSORS, tiles), 8)))
    return found


def whole_rows(view: View) -> Tiling:
    """For reading: all channels in one slice, up to 64."""
    channels = min(64, view.channels)
    return cut(view, 4096 // channels, channels, 8, 4)


def _moments(problem: Problem, tiling: Tiling | None) -> Launch:
    return launches.moments(problem, PROCESSORS, tiling, CAPABILITY)


def _apply(problem: Problem, tiling: Tiling | None) -> Launch:
    return launches.apply(problem, problem.dtype, PROCESSORS, tiling)


def _sums(problem: Problem, tiling: Tiling | None) -> Launch:
    kept = problem.dtype if problem.residual and problem.activation else None
    return launches.gradient_sums(problem, kept, PROCESSORS, tiling, CAPABILITY)


def _input(problem: Problem, tiling: Tiling | None) -> Launch:
    return launches.gradient_input(problem, problem.dtype, None, PROCESSORS, tiling)


def _copy(problem: Problem, _tiling: Tiling | None) -> Launch:
    return bandwidth.launch_copy(problem.view, problem.dtype)


def _read(problem: Problem, tiling: Tiling | None) -> Launch:
    return bandwidth.launch_read(problem.view, tiling or whole_rows(problem.view))


APPLY_READS = ("x", *VECTORS, "residual")
SUMS_READS = ("x", *VECTORS, "residual", "x", "dy")
INPUT_READS = ("x", *VECTORS, "mean", "residual", "x", "dy", "total", "product")
SUMS = {0: "total", 1: "product"}
PIECES = (
    Piece("copy", "alone", _copy, ("x",), {0: "x"}, 2, alone),
    Piece("read", "alone", _read, ("x",), {0: "columns"}, 1, slices),
    Piece("moments", "alone", _moments, ("x", "x"), {1: "mean", 2: "var"}, 1, grid(2, 4)),
    Piece("apply", "relu", _apply, APPLY_READS, {0: "y"}, 2, streams),
    Piece("sums", "relu", _sums, SUMS_READS, SUMS, 2, grid(1, 2)),
    Piece("input", "relu", _input, INPUT_READS, {0: "dx"}, 3, streams),
    Piece("apply", "add + relu", _apply, APPLY_READS, {0: "y"}, 3, streams),
    Piece("sums", "add + relu", _sums, SUMS_READS, {**SUMS, 2: "dz"}, 4, grid(1, 2)),
    # with add + relu the second launch has z̄ for ȳ and no activation: it is this one
    Piece("input", "alone", _input, INPUT_READS, {0: "dx"}, 3, streams),
    Piece("apply", "alone", _apply, APPLY_READS, {0: "y"}, 2, alone),
    Piece("sums", "alone", _sums, SUMS_READS, SUMS, 2, alone),
)
NAMED = {(piece.kernel, piece.fused): piece for piece in PIECES}


def problem_of(case: Case) -> Problem:
    view = View(1, math.prod(case.shape[:-1]), case.shape[-1], 1)
    activation = None if case.fused == "alone" else "relu"
    return Problem(view, case.dtype, view.rows, residual=case.fused == "add + relu", activation=activation)


def launch_of(case: Case) -> Launch:
    launch = NAMED[case.kernel, case.fused].launch(problem_of(case), case.how.tiling)
    return launch._replace(constants=launch.constants | dict(case.how.constants))


def arrays_of(case: Case) -> tuple[str, ...]:
    """Dtypes of what a case reads, as they are compiled for."""
    return tuple(case.dtype if name in ("x", "residual", "dy") else "float32" for name in reads_of(case))


def reads_of(case: Case) -> tuple[str, ...]:
    return NAMED[case.kernel, case.fused].reads
