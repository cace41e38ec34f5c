"""The activations and their derivatives, on the value before them; the constexpr KIND names one, or is "none"."""

import triton
import triton.language as tl

LEAK = tl.constexpr(0.01)  # slope of leaky_relu below zero


@triton.jit
def activate(z, KIND: tl.constexpr):
    """activation(z); NaN stays NaN."""
    if KIND == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif KIND == "relu6":
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif KIND == "leaky_relu":
        z = tl.where(z > 0, z, LEAK * z)
    elif KIND == "silu":
        z = z * tl.sigmoid(z)
    elif KIND == "hard_swish":
        gate = z + 3
        z = z * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) * (1 / 6)
    else:
        tl.static_assert(KIND == "none")
    return z


@triton.jit
def through(dz, z, KIND: tl.constexpr):
    """activation'(z) · dz, in float32; what relu and relu6 do not let through is not even NaN."""
    if KIND == "relu":
        out = tl.where(z > 0, dz, 0.0)
    elif KIND == "relu6":
        out = tl.where((z > 0) & (z < 6), dz, 0.0)
    elif KIND == "leaky_relu":
        out = dz * tl.where(z > 0, 1.0, LEAK)
    elif KIND == "silu":
        gate = tl.sigmoid(z)
        out = dz * (gate * (1 + z * (1 - gate)))
    else:
        tl.static_assert(KIND == "hard_swish")
        out = dz * tl.where(z < -3, 0.0, tl.where(z > 3, 1.0, (2 * z + 3) * (1 / 6)))
    return out
