"""What the kernels share: which tile a program has, where its elements lie, and what is loaded along with them.

x is `(B, N, C, S)`, row-major; a channel has M = N·S rows. With S = 1 a tile is rows × channels, else channels × rows,
so that its last axis runs along memory. C comes as `units` of UNIT channels, by which the compiler knows what divides
it. Of a kernel's constants, S is the view's, ROWS and CHANNELS are the tile's, WIDE asks for 64 bits: of `sizes`,
and so of all that is computed with them, positions and offsets among it.
"""

import triton
import triton.language as tl


@triton.jit
def sizes(outer, units, S: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """(rows, C) of a batch."""
    if WIDE:  # before they are multiplied, here and elsewhere
        outer = tl.cast(outer, tl.int64)
        units = tl.cast(units, tl.int64)
    C = units * UNIT
    return outer * S, C


@triton.jit
def program(pid, splits, C, CHANNELS: tl.constexpr, FROM_END: tl.constexpr = False):
    """(batch, split, block of channels) of a program, as wide as C; neighbours read neighbouring channels.

    Batches are counted from the first or from the last.
    """
    blocks = tl.cdiv(C, CHANNELS)
    batch = pid // (splits * blocks)
    rest = pid - batch * (splits * blocks)
    if FROM_END:
        batch = tl.num_programs(0) // (splits * blocks) - 1 - batch
    return batch, rest // blocks, rest % blocks


@triton.jit
def rows_of(tile, ROWS: tl.constexpr):
    """Indices of a tile's rows, (ROWS,)."""
    return tile * ROWS + tl.arange(0, ROWS)


@triton.jit
def rows_from_end(tile, rows, ROWS: tl.constexpr):
    """Indices of a tile's rows, (ROWS,), where tiles are counted from the last row; some may be below 0."""
    return rows - (tile + 1) * ROWS + tl.arange(0, ROWS)


@triton.jit
def channels_of(block, CHANNELS: tl.constexpr):
    """Indices of a block's channels, (CHANNELS,)."""
    return block * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def along_rows(values, S: tl.constexpr):
    """(ROWS,) as a tile that is 1 along the channels."""
    if S == 1:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def along_channels(values, S: tl.constexpr):
    """(CHANNELS,) as a tile that is 1 along the rows."""
    if S == 1:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def offsets_of(row, channel, C, S: tl.constexpr):
    """Where a tile's elements lie within their batch."""
    if S == 1:
        return row[:, None] * C + channel[None, :]
    else:
        return (row // S * (C * S) + row % S)[None, :] + (channel * S)[:, None]


@triton.jit
def place(tile, channel, rows, C, S: tl.constexpr, ROWS: tl.constexpr, FROM_END: tl.constexpr = False):
    """(rows, which of them exist, offsets within the batch, which of these exist) of a tile.

    Tiles are counted from the first row or from the last, so that what the last tile lacks is behind the last row or
    before the first.
    """
    if FROM_END:
        row = rows_from_end(tile, rows, ROWS)
        there = row >= 0
        if S != 1:
            there &= row < rows  # which holds, and spares registers
    else:
        row = rows_of(tile, ROWS)
        there = row < rows
    return row, there, offsets_of(row, channel, C, S), along_rows(there, S) & along_channels(channel < C, S)


@triton.jit
def load(ptr, offset, inside):
    """A tile in float32, 0 outside."""
    return tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_seen(
    mask_ptr, row, there, offset, inside, mask_divisor, mask_period, S: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """A tile of the mask, False outside: of x's shape ("full"), or one value a row ("rows"), broadcast over the rows.

    Row r of the latter is at (r // mask_divisor) % mask_period. Without a mask ("none") what is inside.
    """
    if MASK == "full":
        return tl.load(mask_ptr + offset, mask=inside, other=0) != 0
    elif MASK == "rows":
        index = (row // mask_divisor) % mask_period
        return along_rows(tl.load(mask_ptr + index, mask=there, other=0) != 0, S)
    else:
        tl.static_assert(MASK == "none")
        return inside


@triton.jit
def load_rstd(var_ptr, epsilon_ptr, batch, C, channel):
    """1/std of a block's channels, (CHANNELS,)."""
    var = tl.load(var_ptr + batch * C + channel, mask=channel < C, other=0.0)
    return tl.rsqrt(var + tl.load(epsilon_ptr + batch))


@triton.jit
def load_map(
    mean_ptr, var_ptr, epsilon_ptr, scale_ptr, bias_ptr, batch, C, channel,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """mean, 1/std, scale/std and bias of a block's channels, (CHANNELS,) each; a bias that is absent is 0."""
    at = batch * C + channel
    inside = channel < C
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    rstd = load_rstd(var_ptr, epsilon_ptr, batch, C, channel)
    slope = rstd
    if HAS_SCALE:
        slope = rstd * tl.load(scale_ptr + at, mask=inside, other=0.0)
    bias = tl.zeros_like(mean)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + at, mask=inside, other=0.0)
    return mean, rstd, slope, bias


@triton.jit
def is_finite(values):
    return tl.abs(values) < float("inf")


@triton.jit
def arrived_last(arrivals_ptr, index, splits):
    """Whether this program is the last of `splits` to get here; the others' stores before it can be read then."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    return tl.atomic_add(arrivals_ptr + index, 1, sem="acq_rel", scope="gpu") == splits - 1
