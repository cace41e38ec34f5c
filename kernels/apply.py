"""Second launch of the forward pass, and the only one of inference: the affine map and what follows it."""

import triton
import triton.language as tl

from jbn.kernels._tiles import along_channels, channels_of, load, load_map, place, program, sizes
from jbn.kernels.activations import activate


@triton.jit
def jbn_apply(
    x_ptr,  # (B, N, C, S)
    mean_ptr,  # float32, (B, C)
    var_ptr,  # float32, (B, C)
    epsilon_ptr,  # float32, (B,)
    scale_ptr,  # float32, (B, C); unread where not HAS_SCALE
    bias_ptr,  # float32, (B, C); unread where not HAS_BIAS
    residual_ptr,  # (B, N, C, S); unread where not HAS_RESIDUAL
    outer,  # N
    units,  # C // UNIT
    splits,
    y_ptr,  # (B, N, C, S)
    S: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ONE: tl.constexpr,  # whether a program has one tile
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,  # of leaky_relu
    WIDE: tl.constexpr,
):
    """y = activation(scale · (x − mean) / √(var + epsilon) + bias + residual).

    Batches, and tiles in them, go the other way round than in the first launch: what that read last, still in L2, is
    read first.
    """
    rows, C = sizes(outer, units, S, UNIT, WIDE)
    batch, split, block = program(tl.program_id(0), splits, C, CHANNELS, FROM_END=True)
    channel = channels_of(block, CHANNELS)
    start = batch.to(tl.int64) * rows * C
    mean, _, slope, bias = load_map(
        mean_ptr, var_ptr, epsilon_ptr, scale_ptr, bias_ptr, batch, C, channel, HAS_SCALE, HAS_BIAS
    )
    steps = 1 if ONE else tl.cdiv(tl.cdiv(rows, ROWS) - split, splits).to(tl.int32)
    for step in range(steps):
        _row, _there, offset, inside = place(split + step * splits, channel, rows, C, S, ROWS)
        x = load(x_ptr + start, offset, inside)
        z = (x - along_channels(mean, S)) * along_channels(slope, S) + along_channels(bias, S)
        if HAS_RESIDUAL:
            z += load(residual_ptr + start, offset, inside)
        y = activate(z, ACTIVATION, NEGATIVE_SLOPE)
        tl.store(y_ptr + start + offset, y.to(y_ptr.dtype.element_ty), mask=inside, eviction_policy="evict_first")
