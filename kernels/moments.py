"""First launch of the forward pass: count, mean and Σ(x − mean)² of each channel, in one pass over x.

It begins at the end of each batch: whoever wrote x wrote its end last, and that is in L2 still.

Nothing cancels. Each lane of a program, one element of a tile, keeps the mean and squared deviations of its own values
(Welford 1962); lanes, then programs, merge by δ = mean_b − mean_a (Chan, Golub, LeVeque 1979), in a fixed order: the
last program to arrive at a block of channels merges what all of them wrote. A constant has δ = 0 everywhere.
"""

import triton
import triton.language as tl

from jbn.kernels._tiles import (
    along_rows,
    arrived_last,
    channels_of,
    load,
    load_seen,
    place,
    program,
    rows_from_end,
    sizes,
)


@triton.jit
def merge_lanes(count, mean, m2, AXIS: tl.constexpr):
    """Moments of all lanes along AXIS; an empty lane's mean is not looked at."""
    total = tl.sum(count, AXIS)
    pivot = tl.max(tl.where(count > 0, mean, float("-inf")), AXIS, keep_dims=True)
    delta = mean - pivot
    # chosen behind the product, which would else be fused into the first addition, and threads differ by rounding
    weighted = tl.where(count > 0, count * delta, 0.0)
    shift = tl.sum(weighted, AXIS, keep_dims=True) / tl.maximum(tl.sum(count, AXIS, keep_dims=True), 1.0)
    off = delta - shift
    m2 = tl.sum(tl.where(count > 0, m2 + count * off * off, 0.0), AXIS)
    mean = tl.max(pivot + shift, AXIS)  # of one: drops the axis
    return total, tl.where(total > 0, mean, 0.0), m2


@triton.jit
def merge_programs(
    partial_ptr, splits, rows, C, channel, ROWS: tl.constexpr, SPLITS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Moments of a block of channels from what each program wrote of them; partial_ptr at their batch.

    About one program's mean, or with a mask the largest: with P programs of alike counts, nothing cancels beyond P
    times rounding, even if that program has the outlier.
    """
    FIELDS: tl.constexpr = 3 if MASKED else 2
    inside = channel < C
    C = tl.cast(C, tl.int32)  # enough here, as `launches` sees to it, and spares registers
    partial_ptr += channel
    # loads go past L1 (.cg), which is not coherent with other multiprocessors
    if MASKED:
        highest = tl.full([SPLITS, channel.shape[0]], float("-inf"), tl.float32)
        for first in tl.range(0, splits, SPLITS, loop_unroll_factor=2):
            split = first + tl.arange(0, SPLITS)
            there = (split < splits)[:, None] & inside[None, :]
            at = partial_ptr[None, :] + split[:, None] * (FIELDS * C)
            mean = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
            count = tl.load(at + 2 * C, mask=there, other=0.0, cache_modifier=".cg")
            highest = tl.maximum(highest, tl.where(count > 0, mean, float("-inf")))
        pivot = tl.max(highest, 0)
    else:
        pivot = tl.load(partial_ptr, mask=inside, other=0.0, cache_modifier=".cg")
        tiles = tl.cdiv(rows, ROWS)
    total = tl.zeros([SPLITS, channel.shape[0]], tl.float32)
    first_order = tl.zeros_like(total)
    second_order = tl.zeros_like(total)
    for first in tl.range(0, splits, SPLITS, loop_unroll_factor=2):
        split = first + tl.arange(0, SPLITS)
        there = (split < splits)[:, None] & inside[None, :]
        at = partial_ptr[None, :] + split[:, None] * (FIELDS * C)
        mean = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        m2 = tl.load(at + C, mask=there, other=0.0, cache_modifier=".cg")
        if MASKED:
            count = tl.load(at + 2 * C, mask=there, other=0.0, cache_modifier=".cg")
        else:
            walked = (tiles // splits + (split < tiles % splits).to(tl.int32)) * ROWS
            # the last tile may have fewer rows
            walked -= tl.where(split == (tiles - 1) % splits, (tiles * ROWS - rows).to(tl.int32), 0)
            count = tl.where(split < splits, walked.to(tl.float32), 0.0)[:, None]
        delta = tl.where(count > 0, mean - pivot[None, :], 0.0)
        total += count
        first_order += count * delta
        second_order += m2 + count * delta * delta
    count = tl.sum(total, 0)
    shift = tl.sum(first_order, 0)
    mean = shift / tl.maximum(count, 1.0)
    m2 = tl.sum(second_order, 0) - shift * mean
    return count, tl.where(count > 0, pivot + mean, 0.0), tl.where(m2 < 0, 0.0, m2)


@triton.jit
def jbn_moments(
    x_ptr,  # (B, N, C, S)
    mask_ptr,  # bool, (B or 1, N, C, S) or (B or 1, period); unread without MASK
    outer,  # N
    units,  # C // UNIT
    splits,
    mask_divisor,
    mask_period,  # row r's mask is at (r // divisor) % period, where MASK is "rows"
    count_ptr,  # float32, (B, C); unwritten without MASK
    mean_ptr,  # float32, (B, C)
    var_ptr,  # float32, (B, C)
    partial_ptr,  # float32 scratch, (B, splits, 2, C), or 3 with MASK; unused where not SPLIT
    arrivals_ptr,  # int32 scratch, zeros, (B, blocks of channels); unused where not SPLIT
    S: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,  # tiles whose loads are in flight at once
    SPLITS: tl.constexpr,  # programs whose results are merged at once
    SPLIT: tl.constexpr,  # whether several programs share a block of channels
    RAGGED: tl.constexpr,  # whether the last tile has fewer rows
    MASK: tl.constexpr,  # "none", "full" or "rows"
    SHARED: tl.constexpr,  # whether all batches have one mask
    WIDE: tl.constexpr,
):
    """count = Σ mask, mean = Σ x / count, var = Σ (x − mean)² / count over a channel's rows that the mask has."""
    rows, C = sizes(outer, units, S, UNIT, WIDE)
    batch, split, block = program(tl.program_id(0), splits, C, CHANNELS)
    channel = channels_of(block, CHANNELS)
    x_ptr += batch.to(tl.int64) * rows * C
    if not SHARED:
        mask_ptr += batch.to(tl.int64) * (rows * C if MASK == "full" else mask_period)

    AXIS: tl.constexpr = 0 if S == 1 else 1
    mean = tl.zeros([ROWS, CHANNELS] if S == 1 else [CHANNELS, ROWS], tl.float32)
    m2 = tl.zeros_like(mean)
    count = along_rows(tl.zeros([ROWS], tl.float32), S)
    if MASK == "full":
        count = tl.zeros_like(mean)
    tiles = tl.cdiv(rows, ROWS)
    steps = tl.cdiv(tiles - split, splits).to(tl.int32)
    share = 1.0  # of a lane's next value in its mean; a GPU's 1 / 1 may be off by a bit
    for step in tl.range(steps, loop_unroll_factor=UNROLL):
        row, there, offset, inside = place(split + step * splits, channel, rows, C, S, ROWS, FROM_END=True)
        x = load(x_ptr, offset, inside)
        if MASK != "none":
            seen = load_seen(mask_ptr, row, there, offset, inside, mask_divisor, mask_period, S, MASK)
            x = tl.where(seen, x, mean)
            count += seen.to(tl.float32)
            delta = x - mean
            mean += delta * tl.div_rn(1.0, tl.maximum(count, 1.0))
        else:
            if RAGGED:
                x = tl.where(along_rows(there, S), x, mean)
            delta = x - mean
            mean += delta * share
            share = 1.0 / (step + 2)
        m2 += delta * (x - mean)
    if MASK == "none":
        last = rows_from_end(split + (steps - 1) * splits, rows, ROWS)
        count += along_rows(steps - (last < 0).to(tl.int32), S).to(tl.float32)
    if MASK != "full":
        count = tl.broadcast_to(count, mean.shape)
    total, mean, m2 = merge_lanes(count, mean, m2, AXIS)

    if SPLIT:
        FIELDS: tl.constexpr = 2 if MASK == "none" else 3
        partial_ptr += batch.to(tl.int64) * splits * (FIELDS * C)
        at = partial_ptr + split.to(tl.int64) * (FIELDS * C) + channel
        tl.store(at, mean, mask=channel < C, cache_modifier=".cg")
        tl.store(at + C, m2, mask=channel < C, cache_modifier=".cg")
        if MASK != "none":
            tl.store(at + 2 * C, total, mask=channel < C, cache_modifier=".cg")
        if arrived_last(arrivals_ptr, batch * tl.cdiv(C, CHANNELS) + block, splits):
            total, mean, m2 = merge_programs(partial_ptr, splits, rows, C, channel, ROWS, SPLITS, MASK != "none")
            store_moments(count_ptr, mean_ptr, var_ptr, batch * C + channel, channel < C, total, mean, m2, MASK)
    else:
        store_moments(count_ptr, mean_ptr, var_ptr, batch * C + channel, channel < C, total, mean, m2, MASK)


@triton.jit
def store_moments(count_ptr, mean_ptr, var_ptr, at, inside, count, mean, m2, MASK: tl.constexpr):
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(var_ptr + at, m2 / tl.maximum(count, 1.0), mask=inside)
    if MASK != "none":
        tl.store(count_ptr + at, count, mask=inside)
