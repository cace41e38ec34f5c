"""A pass in one launch, where each program has all rows of its channels: it reduces them, then writes what follows.

What a program has read is still in L2 when it reads it again, so that memory is read once. Nothing is handed from one
program to another: no scratch, no counters to be zeroed, no program that waits.
"""

import triton
import triton.language as tl

from jbn.kernels._tiles import channels_of, load_map, load_vectors, sizes
from jbn.kernels.apply import write_output
from jbn.kernels.gradients import load_weight, sums_of, write_cotangent
from jbn.kernels.moments import moments_of, store_moments


@triton.jit
def jbn_forward_once(
    x_ptr,  # (B, N, C, S)
    running_mean_ptr,  # float32, (B, C): of channels without a True; unread without MASK
    running_var_ptr,  # likewise
    epsilon_ptr,  # float32, (B,)
    scale_ptr,  # float32, (B, C); unread where not HAS_SCALE
    bias_ptr,  # float32, (B, C); unread where not HAS_BIAS
    residual_ptr,  # (B, N, C, S); unread where not HAS_RESIDUAL
    mask_ptr,  # bool, (B or 1, N, C, S) or (B or 1, period); unread without MASK
    outer,  # N
    units,  # C // UNIT
    mask_divisor,
    mask_period,  # row r's mask is at (r // divisor) % period, where MASK is "rows"
    kept,  # tiles that are to stay in L2, the last ones
    y_ptr,  # (B, N, C, S)
    count_ptr,  # float32, (B, C); unwritten without MASK
    mean_ptr,  # float32, (B, C)
    m2_ptr,  # float32, (B, C)
    S: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,  # tiles whose loads are in flight at once, of the reduction
    WRITE_UNROLL: tl.constexpr,  # and of what follows
    RAGGED: tl.constexpr,  # whether the last tile has fewer rows
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MASK: tl.constexpr,  # "none", "full" or "rows"
    SHARED: tl.constexpr,  # whether all batches have one mask
    WIDE: tl.constexpr,
):
    """count, mean, m2 as `jbn_moments`, then y as `jbn_apply` of them; without a True, of the running statistics."""
    rows, C = sizes(outer, units, S, UNIT, WIDE)
    blocks = tl.cdiv(C, CHANNELS)
    batch = tl.program_id(0) // blocks
    channel = channels_of(tl.program_id(0) % blocks, CHANNELS)
    start = batch.to(tl.int64) * rows * C
    if not SHARED:
        mask_ptr += batch.to(tl.int64) * (rows * C if MASK == "full" else mask_period)
    count, mean, m2 = moments_of(
        x_ptr + start, mask_ptr, 0, 1, channel, rows, C, mask_divisor, mask_period, kept,
        S, ROWS, CHANNELS, UNROLL, RAGGED, MASK, "evict_first", "evict_last",
    )  # fmt: skip
    at, inside = batch * C + channel, channel < C
    store_moments(count_ptr, mean_ptr, m2_ptr, at, inside, count, mean, m2, MASK)
    var = m2 / tl.maximum(count, 1.0)
    if MASK != "none":
        mean = tl.where(count > 0, mean, tl.load(running_mean_ptr + at, mask=inside, other=0.0))
        var = tl.where(count > 0, var, tl.load(running_var_ptr + at, mask=inside, other=0.0))
    rstd = tl.rsqrt(var + tl.load(epsilon_ptr + batch))
    slope, bias = load_vectors(scale_ptr, bias_ptr, rstd, at, inside, HAS_SCALE, HAS_BIAS)
    write_output(
        x_ptr + start, residual_ptr + start, y_ptr + start, mean, slope, bias, 0, 1, channel, rows, C,
        S, ROWS, WRITE_UNROLL, HAS_RESIDUAL, ACTIVATION, "evict_first",
    )  # fmt: skip


@triton.jit
def jbn_backward_once(
    x_ptr,  # (B, N, C, S)
    mean_ptr,  # float32, (B, C)
    spread_ptr,  # float32, (B, C)
    epsilon_ptr,  # float32, (B,)
    scale_ptr,  # float32, (B, C); unread where not HAS_SCALE
    bias_ptr,  # float32, (B, C); unread where not HAS_BIAS
    weight_ptr,  # float32, (B, C); unread where not HAS_WEIGHT
    residual_ptr,  # (B, N, C, S); unread where not HAS_RESIDUAL
    mask_ptr,  # bool, (B or 1, N, C, S) or (B or 1, period); unread without MASK
    dy_ptr,  # ȳ, (B, N, C, S)
    count,  # float32
    outer,  # N
    units,  # C // UNIT
    mask_divisor,
    mask_period,  # row r's mask is at (r // divisor) % period, where MASK is "rows"
    kept,  # tiles that are to stay in L2, the last ones
    sum_ptr,  # float32, (B, C)
    product_ptr,  # float32, (B, C)
    dx_ptr,  # x̄, (B, N, C, S)
    dz_ptr,  # z̄, (B, N, C, S); unwritten where not KEEP
    S: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,  # tiles whose loads are in flight at once, of the reduction
    WRITE_UNROLL: tl.constexpr,  # and of what follows
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,  # sums are divided by data, instead of by `count`
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MASK: tl.constexpr,  # "none", "full" or "rows"
    SHARED: tl.constexpr,  # whether all batches have one mask
    KEEP: tl.constexpr,  # whether z̄ is written by the reduction, and read again in ȳ's place
    WIDE: tl.constexpr,
):
    """Σz̄ and Σz̄x̂ as `jbn_gradient_sums`, then x̄ as `jbn_gradient_input` of them."""
    rows, C = sizes(outer, units, S, UNIT, WIDE)
    blocks = tl.cdiv(C, CHANNELS)
    batch = tl.program_id(0) // blocks
    channel = channels_of(tl.program_id(0) % blocks, CHANNELS)
    start = batch.to(tl.int64) * rows * C
    if not SHARED:
        mask_ptr += batch.to(tl.int64) * (rows * C if MASK == "full" else mask_period)
    at, inside = batch * C + channel, channel < C
    mean, rstd, slope, bias = load_map(
        mean_ptr, spread_ptr, epsilon_ptr, scale_ptr, bias_ptr, count, batch, C, channel, HAS_SCALE, HAS_BIAS
    )
    total, product = sums_of(
        x_ptr + start, residual_ptr + start, mask_ptr, dy_ptr + start, dz_ptr + start, mean, slope, bias,
        0, 1, channel, rows, C, mask_divisor, mask_period, kept,
        S, ROWS, CHANNELS, UNROLL, HAS_RESIDUAL, ACTIVATION, MASK, KEEP, "evict_first", "evict_last",
    )  # fmt: skip
    product *= rstd
    tl.store(sum_ptr + at, total, mask=inside)
    tl.store(product_ptr + at, product, mask=inside)
    weight = load_weight(weight_ptr, count, at, inside, HAS_WEIGHT)
    if KEEP:
        tl.debug_barrier()  # every thread's z̄ is there
        write_cotangent(
            x_ptr + start, x_ptr, mask_ptr, dz_ptr + start, dx_ptr + start, dz_ptr, mean, slope, bias,
            total * weight, product * weight * rstd, 0, 1, channel, rows, C, mask_divisor, mask_period,
            S, ROWS, WRITE_UNROLL, True, False, "none", MASK, False, "evict_first",
        )  # fmt: skip
    else:
        write_cotangent(
            x_ptr + start, residual_ptr + start, mask_ptr, dy_ptr + start, dx_ptr + start, dz_ptr, mean, slope, bias,
            total * weight, product * weight * rstd, 0, 1, channel, rows, C, mask_divisor, mask_period,
            S, ROWS, WRITE_UNROLL, True, HAS_RESIDUAL, ACTIVATION, MASK, False, "evict_first",
        )  # fmt: skip
