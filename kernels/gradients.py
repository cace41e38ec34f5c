"""The two launches of the backward pass: Σz̄ and Σz̄x̂, then x̄, where z̄ = activation'(z) · ȳ."""

import triton
import triton.language as tl

from jbn.kernels._tiles import (
    along_channels,
    arrived_last,
    channels_of,
    is_finite,
    load,
    load_map,
    load_rstd,
    load_seen,
    place,
    program,
    sizes,
)
from jbn.kernels.activations import through


@triton.jit
def load_cotangent(
    tile, x_ptr, residual_ptr, mask_ptr, dy_ptr, mean, slope, bias, channel, rows, C, mask_divisor, mask_period,
    S: tl.constexpr, ROWS: tl.constexpr, FROM_END: tl.constexpr, CENTRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """(z̄, x − mean, offsets, what is inside, what the mask has) of a tile; pointers are at the batch.

    What is masked and not finite reaches no derivative: x − mean and residual count as 0 there, and so does a ȳ that is
    not finite where x is not, the 0 · NaN of a loss that masks y after squaring it. x is read where it is needed.
    """
    row, there, offset, inside = place(tile, channel, rows, C, S, ROWS, FROM_END)
    seen = load_seen(mask_ptr, row, there, offset, inside, mask_divisor, mask_period, S, MASK)
    if CENTRED or ACTIVATION != "none":
        x = load(x_ptr, offset, inside)  # before ȳ: behind it one binary spills
        dz = load(dy_ptr, offset, inside)
        centred = x - along_channels(mean, S)
        if MASK != "none":
            counts = seen | is_finite(x)
            dz = tl.where(counts | is_finite(dz), dz, 0.0)
            centred = tl.where(counts, centred, 0.0)
    else:
        dz = load(dy_ptr, offset, inside)
        centred = dz
    if ACTIVATION != "none":
        z = centred * along_channels(slope, S) + along_channels(bias, S)
        if HAS_RESIDUAL:
            residual = load(residual_ptr, offset, inside)
            if MASK != "none":
                residual = tl.where(seen | is_finite(residual), residual, 0.0)
            z += residual
        dz = through(dz, z, ACTIVATION, NEGATIVE_SLOPE)
    return dz, centred, offset, inside, seen


@triton.jit
def jbn_gradient_sums(
    x_ptr,  # (B, N, C, S)
    mean_ptr,  # float32, (B, C)
    var_ptr,  # float32, (B, C)
    epsilon_ptr,  # float32, (B,)
    scale_ptr,  # float32, (B, C); unread where not HAS_SCALE
    bias_ptr,  # float32, (B, C); unread where not HAS_BIAS
    residual_ptr,  # (B, N, C, S); unread where not HAS_RESIDUAL
    mask_ptr,  # bool, (B or 1, N, C, S) or (B or 1, period); unread without MASK
    dy_ptr,  # ȳ, (B, N, C, S)
    outer,  # N
    units,  # C // UNIT
    splits,
    mask_divisor,
    mask_period,  # row r's mask is at (r // divisor) % period, where MASK is "rows"
    sum_ptr,  # float32, (B, C)
    product_ptr,  # float32, (B, C)
    dz_ptr,  # z̄, (B, N, C, S); unwritten where not KEEP
    partial_ptr,  # float32 scratch, (B, splits, 2, C); unused where not SPLIT
    arrivals_ptr,  # int32 scratch, zeros, (B, blocks of channels); unused where not SPLIT
    S: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,  # tiles whose loads are in flight at once
    SPLITS: tl.constexpr,  # programs whose results are merged at once
    SPLIT: tl.constexpr,  # whether several programs share a block of channels
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,  # of leaky_relu
    MASK: tl.constexpr,  # "none", "full" or "rows"
    SHARED: tl.constexpr,  # whether all batches have one mask
    KEEP: tl.constexpr,  # whether z̄ is written, for the second launch and as the residual's cotangent
    WIDE: tl.constexpr,
):
    """Σ z̄ and Σ z̄ · x̂ over the rows of each channel, from the end, which is in L2 if ȳ was just written."""
    rows, C = sizes(outer, units, S, UNIT, WIDE)
    batch, split, block = program(tl.program_id(0), splits, C, CHANNELS)
    channel = channels_of(block, CHANNELS)
    start = batch.to(tl.int64) * rows * C
    if not SHARED:
        mask_ptr += batch.to(tl.int64) * (rows * C if MASK == "full" else mask_period)
    mean, _, slope, bias = load_map(
        mean_ptr, var_ptr, epsilon_ptr, scale_ptr, bias_ptr, batch, C, channel, HAS_SCALE, HAS_BIAS
    )
    AXIS: tl.constexpr = 0 if S == 1 else 1
    total = tl.zeros([ROWS, CHANNELS] if S == 1 else [CHANNELS, ROWS], tl.float32)
    product = tl.zeros_like(total)
    steps = tl.cdiv(tl.cdiv(rows, ROWS) - split, splits).to(tl.int32)
    for step in tl.range(steps, loop_unroll_factor=UNROLL):
        dz, centred, offset, inside, _seen = load_cotangent(
            split + step * splits, x_ptr + start, residual_ptr + start, mask_ptr, dy_ptr + start,
            mean, slope, bias, channel, rows, C, mask_divisor, mask_period,
            S, ROWS, True, True, HAS_RESIDUAL, ACTIVATION, NEGATIVE_SLOPE, MASK,
        )  # fmt: skip
        if KEEP:
            tl.store(dz_ptr + start + offset, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        total += dz
        product += dz * centred
    total = tl.sum(total, AXIS)
    product = tl.sum(product, AXIS)

    if SPLIT:
        partial_ptr += batch.to(tl.int64) * splits * (2 * C)
        at = partial_ptr + split.to(tl.int64) * (2 * C) + channel
        tl.store(at, total, mask=channel < C, cache_modifier=".cg")
        tl.store(at + C, product, mask=channel < C, cache_modifier=".cg")
        if arrived_last(arrivals_ptr, batch * tl.cdiv(C, CHANNELS) + block, splits):
            total, product = add_programs(partial_ptr, splits, C, channel, SPLITS)
            store_sums(sum_ptr, product_ptr, var_ptr, epsilon_ptr, batch, C, channel, total, product)
    else:
        store_sums(sum_ptr, product_ptr, var_ptr, epsilon_ptr, batch, C, channel, total, product)


@triton.jit
def store_sums(sum_ptr, product_ptr, var_ptr, epsilon_ptr, batch, C, channel, total, product):
    """Σz̄, and Σz̄ · (x − mean) times 1/std, which is loaded again rather than kept in registers all along."""
    rstd = load_rstd(var_ptr, epsilon_ptr, batch, C, channel)
    tl.store(sum_ptr + batch * C + channel, total, mask=channel < C)
    tl.store(product_ptr + batch * C + channel, product * rstd, mask=channel < C)


@triton.jit
def add_programs(partial_ptr, splits, C, channel, SPLITS: tl.constexpr):
    """The sums of what each program wrote of a block of channels; partial_ptr at their batch."""
    total = tl.zeros([SPLITS, channel.shape[0]], tl.float32)
    product = tl.zeros_like(total)
    for first in tl.range(0, splits, SPLITS, loop_unroll_factor=2):
        split = first + tl.arange(0, SPLITS)
        there = (split < splits)[:, None] & (channel < C)[None, :]
        at = partial_ptr + split[:, None] * (2 * C) + channel[None, :]
        # past L1, which is not coherent with other multiprocessors
        total += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        product += tl.load(at + C, mask=there, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0), tl.sum(product, 0)


@triton.jit
def jbn_gradient_input(
    x_ptr,  # (B, N, C, S); unread where neither CENTRED nor with an activation
    mean_ptr,  # float32, (B, C)
    var_ptr,  # float32, (B, C)
    epsilon_ptr,  # float32, (B,)
    scale_ptr,  # float32, (B, C); unread where not HAS_SCALE
    bias_ptr,  # float32, (B, C); unread where not HAS_BIAS
    weight_ptr,  # float32, (B, C); unread where not HAS_WEIGHT
    residual_ptr,  # (B, N, C, S); unread where not HAS_RESIDUAL
    mask_ptr,  # bool, (B or 1, N, C, S) or (B or 1, period); unread without MASK
    dy_ptr,  # ȳ, (B, N, C, S)
    sum_ptr,  # Σz̄, float32, (B, C); unread where not CENTRED
    product_ptr,  # Σz̄x̂, float32, (B, C); unread where not CENTRED
    count,  # float32: of rows; unread where HAS_WEIGHT or not CENTRED
    outer,  # N
    units,  # C // UNIT
    splits,
    mask_divisor,
    mask_period,  # row r's mask is at (r // divisor) % period, where MASK is "rows"
    dx_ptr,  # x̄, (B, N, C, S)
    dz_ptr,  # z̄, (B, N, C, S); unwritten where not KEEP
    S: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ONE: tl.constexpr,  # whether a program has one tile
    CENTRED: tl.constexpr,  # whether the statistics are x's own
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,  # sums are divided by data, instead of by `count`
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,  # of leaky_relu
    MASK: tl.constexpr,  # "none", "full" or "rows"
    SHARED: tl.constexpr,  # whether all batches have one mask
    KEEP: tl.constexpr,  # whether z̄ is written
    WIDE: tl.constexpr,
):
    """x̄ = scale · rstd · (z̄ − [mask] · (Σz̄ + x̂ · Σz̄x̂) / count).

    Batches, and tiles in them, go the other way round than in the sums: what these read last, still in L2, is first.
    """
    rows, C = sizes(outer, units, S, UNIT, WIDE)
    batch, split, block = program(tl.program_id(0), splits, C, CHANNELS, FROM_END=True)
    channel = channels_of(block, CHANNELS)
    start = batch.to(tl.int64) * rows * C
    if not SHARED:
        mask_ptr += batch.to(tl.int64) * (rows * C if MASK == "full" else mask_period)
    mean, rstd, slope, bias = load_map(
        mean_ptr, var_ptr, epsilon_ptr, scale_ptr, bias_ptr, batch, C, channel, HAS_SCALE, HAS_BIAS
    )
    if CENTRED:
        at = batch * C + channel
        weight = 1.0 / count
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + at, mask=channel < C, other=0.0)
        offset_pull = tl.load(sum_ptr + at, mask=channel < C, other=0.0) * weight
        slope_pull = tl.load(product_ptr + at, mask=channel < C, other=0.0) * weight * rstd
    steps = 1 if ONE else tl.cdiv(tl.cdiv(rows, ROWS) - split, splits).to(tl.int32)
    for step in range(steps):
        dx, centred, offset, inside, seen = load_cotangent(
            split + step * splits, x_ptr + start, residual_ptr + start, mask_ptr, dy_ptr + start,
            mean, slope, bias, channel, rows, C, mask_divisor, mask_period,
            S, ROWS, False, CENTRED, HAS_RESIDUAL, ACTIVATION, NEGATIVE_SLOPE, MASK,
        )  # fmt: skip
        if KEEP:
            tl.store(dz_ptr + start + offset, dx.to(dz_ptr.dtype.element_ty), mask=inside)
        if CENTRED:
            pull = along_channels(offset_pull, S) + centred * along_channels(slope_pull, S)
            if MASK != "none":
                pull = tl.where(seen, pull, 0.0)
            dx -= pull
        dx *= along_channels(slope, S)
        tl.store(dx_ptr + start + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside, eviction_policy="evict_first")
