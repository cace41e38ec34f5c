"""Kernels that do nothing but move memory: what a kernel of ours can at best reach, by size and by width of access."""

import triton
import triton.language as tl

from jbn.kernels.launches import Launch, Output
from jbn.kernels.tiling import Tiling, View, alignment

BLOCK = 4096  # elements that a program copies


@triton.jit
def copy(x_ptr, units, y_ptr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """y = x, of units · UNIT elements, a block of them a program."""
    size = units * UNIT
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < size, other=0.0), mask=at < size)


@triton.jit
def read(x_ptr, rows, units, splits, sum_ptr, UNIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Each program's sums of its rows of x, (rows, units · UNIT): sums are (splits, channels).

    All programs of one slice of CHANNELS channels come before those of the next, as a kernel would read that keeps
    slices in L2: where slices are narrow, every access to memory is.
    """
    C = units * UNIT
    split = tl.program_id(0) % splits
    channel = tl.program_id(0) // splits * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    steps = tl.cdiv(tl.cdiv(rows, ROWS) - split, splits)
    for step in tl.range(steps, loop_unroll_factor=4):  # pyright: ignore[reportGeneralTypeIssues]
        row = (split + step * splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (channel < C)[None, :]
        total += tl.load(x_ptr + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + split * C + channel, tl.sum(total, 0), mask=channel < C)


def launch_copy(view: View, dtype: str) -> Launch:
    """Arrays: x. Output: y."""
    programs, unit = -(-view.size // BLOCK), alignment(view.size)
    tiling, outputs = Tiling(BLOCK, 1, programs, 8), (Output(tuple(view), dtype),)
    return Launch(copy, tiling, programs, 8, (view.size // unit,), outputs, {"UNIT": unit, "BLOCK": BLOCK})


def launch_read(view: View, tiling: Tiling) -> Launch:
    """Arrays: x. Output: each program's sums."""
    unit = alignment(view.channels)
    constants = {"UNIT": unit, "ROWS": tiling.ROWS, "CHANNELS": tiling.CHANNELS}
    outputs = (Output((tiling.splits, view.channels), "float32"),)
    numbers = (view.rows, view.channels // unit, tiling.splits)
    return Launch(read, tiling, tiling.programs(view), 4, numbers, outputs, constants)
