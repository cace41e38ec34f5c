"""A pass in one launch: what has been reduced is still in L2 when it is normalised, so memory is read once.

Blocks of channels, of all batches one behind the other, go in slices of `group` blocks; a slice is small enough for L2.
Programs take tickets from a counter. A ticket names a phase and a share of a slice: reduce it, or write what follows
from the reduction, or, where two slices fit, both, each of its own slice: reduce slice k, then write slice k − 1.

No program can wait for ever, however few of them run at once. Tickets are taken in order, and all that a ticket waits
for are reductions of tickets before it: of phases before its own. A reduction waits for nothing and comes first in its
ticket. So the running program with the earliest unfinished ticket never waits, and ends it. This needs that a program
that has begun goes on, as on CUDA it does: one that is preempted is resumed. It does not need that others have begun.

Which share is added where follows from the ticket, not from who holds it: the same bits every time.
"""

import triton
import triton.language as tl

from jbn.kernels._tiles import arrived_last, channels_of, load_map, sizes
from jbn.kernels.apply import write_output
from jbn.kernels.gradients import (
    add_programs,
    hand_in_sums,
    load_pulls,
    store_sums,
    sums_of,
    write_cotangent,
)
from jbn.kernels.moments import hand_in, merge_programs, moments_of, store_moments

FRESH = tl.constexpr(".cg")  # past L1, which may hold what was there before another multiprocessor wrote


@triton.jit
def take(counters_ptr):
    """The next ticket."""
    return tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def work_of(ticket, splits, slices, group, AHEAD: tl.constexpr):
    """(slice to reduce, slice to write, block within it, split) of a ticket; a slice outside 0 … slices − 1 is none."""
    shares = splits * group
    phase, share = ticket // shares, ticket % shares
    if AHEAD:
        reduced, written = phase, phase - 1
    else:
        reduced, written = tl.where(phase % 2 == 0, phase // 2, slices), tl.where(phase % 2 == 1, phase // 2, -1)
    return reduced, written, share % group, share // group


@triton.jit
def tickets(splits, slices, group, AHEAD: tl.constexpr):
    """How many there are."""
    return (slices + 1 if AHEAD else 2 * slices) * splits * group


@triton.jit
def tell(ready_ptr, index):
    """A block's results are there."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    tl.atomic_add(ready_ptr + index, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(ready_ptr, index):
    """Until a block's results are there."""
    while tl.atomic_add(ready_ptr + index, 0, sem="acquire", scope="gpu") == 0:
        pass
    tl.debug_barrier()


@triton.jit
def jbn_forward_once(
    x_ptr,  # (B, N, C, S)
    epsilon_ptr,  # float32, (B,)
    scale_ptr,  # float32, (B, C); unread where not HAS_SCALE
    bias_ptr,  # float32, (B, C); unread where not HAS_BIAS
    residual_ptr,  # (B, N, C, S); unread where not HAS_RESIDUAL
    count,  # float32
    outer,  # N
    units,  # C // UNIT
    splits,
    batches,  # B
    group,  # blocks of channels in a slice
    y_ptr,  # (B, N, C, S)
    mean_ptr,  # float32, (B, C)
    m2_ptr,  # float32, (B, C)
    partial_ptr,  # float32 scratch, (B, splits, 2, C)
    counters_ptr,  # int32 scratch, zeros: the next ticket, arrivals at each block, whether each block is ready
    S: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr,  # whether a slice is reduced before the one before it is written
    UNROLL: tl.constexpr,  # tiles whose loads are in flight at once, of the reduction
    WRITE_UNROLL: tl.constexpr,  # and of what is written
    SPLITS: tl.constexpr,  # programs whose results are merged at once
    MERGE: tl.constexpr,  # times that many are loaded at once
    RAGGED: tl.constexpr,  # whether the last tile has fewer rows
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """mean, m2 = Σ (x − mean)², y = activation(scale · (x − mean) / √(m2 / count + epsilon) + bias + residual)."""
    rows, C = sizes(outer, units, S, UNIT, WIDE)
    blocks = tl.cdiv(C, CHANNELS).to(tl.int32)
    total = batches * blocks
    slices = tl.cdiv(total, group)
    arrivals_ptr = counters_ptr + 1
    ready_ptr = arrivals_ptr + total
    ticket = take(counters_ptr)
    while ticket < tickets(splits, slices, group, AHEAD):
        reduced, written, member, split = work_of(ticket, splits, slices, group, AHEAD)
        index = reduced * group + member
        if index < total:
            batch, block = index // blocks, index % blocks
            channel = channels_of(block, CHANNELS)
            count_, mean, m2 = moments_of(
                x_ptr + batch.to(tl.int64) * rows * C, x_ptr, split, splits, channel, rows, C, 1, 1,
                S, ROWS, CHANNELS, UNROLL, RAGGED, "none", "evict_last",
            )  # fmt: skip
            partials_ptr = partial_ptr + batch.to(tl.int64) * splits * (2 * C)
            hand_in(partials_ptr, split, C, channel, count_, mean, m2, "none")
            if arrived_last(arrivals_ptr, index, splits):
                count_, mean, m2 = merge_programs(partials_ptr, splits, rows, C, channel, ROWS, SPLITS, MERGE, False)
                store_moments(mean_ptr, mean_ptr, m2_ptr, batch * C + channel, channel < C, count_, mean, m2, "none")
                tell(ready_ptr, index)
        index = written * group + member
        if (written >= 0) & (index < total):
            batch, block = index // blocks, index % blocks
            channel = channels_of(block, CHANNELS)
            wait_for(ready_ptr, index)
            mean, _, slope, bias = load_map(
                mean_ptr, m2_ptr, epsilon_ptr, scale_ptr, bias_ptr, count, batch, C, channel,
                HAS_SCALE, HAS_BIAS, FRESH,
            )  # fmt: skip
            start = batch.to(tl.int64) * rows * C
            write_output(
                x_ptr + start, residual_ptr + start, y_ptr + start, mean, slope, bias, split, splits, channel, rows, C,
                S, ROWS, WRITE_UNROLL, HAS_RESIDUAL, ACTIVATION, "evict_first",
            )  # fmt: skip
        ticket = take(counters_ptr)


@triton.jit
def jbn_backward_once(
    x_ptr,  # (B, N, C, S)
    mean_ptr,  # float32, (B, C)
    spread_ptr,  # float32, (B, C)
    epsilon_ptr,  # float32, (B,)
    scale_ptr,  # float32, (B, C); unread where not HAS_SCALE
    bias_ptr,  # float32, (B, C); unread where not HAS_BIAS
    residual_ptr,  # (B, N, C, S); unread where not HAS_RESIDUAL
    dy_ptr,  # ȳ, (B, N, C, S)
    count,  # float32
    outer,  # N
    units,  # C // UNIT
    splits,
    batches,  # B
    group,  # blocks of channels in a slice
    sum_ptr,  # float32, (B, C)
    product_ptr,  # float32, (B, C)
    dx_ptr,  # x̄, (B, N, C, S)
    dz_ptr,  # z̄, (B, N, C, S); unwritten where not KEEP
    partial_ptr,  # float32 scratch, (B, splits, 2, C)
    counters_ptr,  # int32 scratch, zeros: as of `jbn_forward_once`
    S: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr,  # whether a slice is reduced before the one before it is written
    UNROLL: tl.constexpr,  # tiles whose loads are in flight at once, of the reduction
    WRITE_UNROLL: tl.constexpr,  # and of what is written
    SPLITS: tl.constexpr,  # programs whose results are merged at once
    MERGE: tl.constexpr,  # times that many are loaded at once
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,  # whether z̄ is written by the reduction, and read again in ȳ's place
    WIDE: tl.constexpr,
):
    """Σz̄, Σz̄x̂ and x̄ = scale · rstd · (z̄ − (Σz̄ + x̂ · Σz̄x̂) / count)."""
    rows, C = sizes(outer, units, S, UNIT, WIDE)
    blocks = tl.cdiv(C, CHANNELS).to(tl.int32)
    total = batches * blocks
    slices = tl.cdiv(total, group)
    arrivals_ptr = counters_ptr + 1
    ready_ptr = arrivals_ptr + total
    ticket = take(counters_ptr)
    while ticket < tickets(splits, slices, group, AHEAD):
        reduced, written, member, split = work_of(ticket, splits, slices, group, AHEAD)
        index = reduced * group + member
        if index < total:
            batch, block = index // blocks, index % blocks
            channel = channels_of(block, CHANNELS)
            start = batch.to(tl.int64) * rows * C
            mean, _, slope, bias = load_map(
                mean_ptr, spread_ptr, epsilon_ptr, scale_ptr, bias_ptr, count, batch, C, channel, HAS_SCALE, HAS_BIAS
            )
            sum_, product = sums_of(
                x_ptr + start, residual_ptr + start, x_ptr, dy_ptr + start, dz_ptr + start, mean, slope, bias,
                split, splits, channel, rows, C, 1, 1,
                S, ROWS, CHANNELS, UNROLL, HAS_RESIDUAL, ACTIVATION, "none", KEEP, "evict_last",
            )  # fmt: skip
            partials_ptr = partial_ptr + batch.to(tl.int64) * splits * (2 * C)
            hand_in_sums(partials_ptr, split, C, channel, sum_, product)
            if arrived_last(arrivals_ptr, index, splits):
                sum_, product = add_programs(partials_ptr, splits, C, channel, SPLITS, MERGE)
                store_sums(sum_ptr, product_ptr, spread_ptr, epsilon_ptr, count, batch, C, channel, sum_, product)
                tell(ready_ptr, index)
        index = written * group + member
        if (written >= 0) & (index < total):
            batch, block = index // blocks, index % blocks
            channel = channels_of(block, CHANNELS)
            start = batch.to(tl.int64) * rows * C
            mean, rstd, slope, bias = load_map(
                mean_ptr, spread_ptr, epsilon_ptr, scale_ptr, bias_ptr, count, batch, C, channel, HAS_SCALE, HAS_BIAS
            )
            wait_for(ready_ptr, index)
            offset_pull, slope_pull = load_pulls(
                sum_ptr, product_ptr, mean_ptr, rstd, count, batch, C, channel, False, FRESH
            )
            if KEEP:
                write_cotangent(
                    x_ptr + start, x_ptr, x_ptr, dz_ptr + start, dx_ptr + start, dz_ptr, mean, slope, bias,
                    offset_pull, slope_pull, split, splits, channel, rows, C, 1, 1,
                    S, ROWS, WRITE_UNROLL, True, False, "none", "none", False, FRESH, "evict_first",
                )  # fmt: skip
            else:
                write_cotangent(
                    x_ptr + start, residual_ptr + start, x_ptr, dy_ptr + start, dx_ptr + start, dz_ptr,
                    mean, slope, bias, offset_pull, slope_pull, split, splits, channel, rows, C, 1, 1,
                    S, ROWS, WRITE_UNROLL, True, HAS_RESIDUAL, ACTIVATION, "none", False, "", "evict_first",
                )  # fmt: skip
        ticket = take(counters_ptr)
