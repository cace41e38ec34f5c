"""The activations and their derivatives, on the value before them; the constexpr KIND names one, or is "none".

The same as in `jbn/_op/activations.py`, of exp alone and without branches. `tl.where` bounds values, as it keeps NaN.
"""

import triton
import triton.language as tl

LOWEST, HIGHEST = tl.constexpr(-100.0), tl.constexpr(20.0)  # beyond them a gate is 0 or 1 but for rounding
GELU_SLOPE, GELU_CUBE = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)  # the former is √(8/π)
DENSITY = tl.constexpr(0.3989422804014327)  # 1/√(2π)


@triton.jit
def activate(z, KIND: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """activation(z); NaN stays NaN."""
    if KIND == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif KIND == "relu6":
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif KIND == "leaky_relu":
        z = tl.where(z > 0, z, NEGATIVE_SLOPE * z)
    elif KIND == "silu":
        z = z * tl.sigmoid(z)
    elif KIND == "hard_swish":
        gate = z + 3
        z = z * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) * (1 / 6)
    elif KIND == "gelu" or KIND == "gelu_exact" or KIND == "mish":
        near = bounded(z)
        gate, _ = gate_of(near, KIND)
        z = tl.where(z > HIGHEST, z, near * gate)
    elif KIND == "elu":
        z = tl.where(z > 0, z, expm1(z))
    elif KIND == "sigmoid":
        z = tl.sigmoid(z)
    elif KIND == "tanh":
        below = expm1(-2 * tl.abs(z))
        below = below / (below + 2)
        z = tl.where(z < 0, below, -below)
    else:
        tl.static_assert(KIND == "none")
    return z


@triton.jit
def through(dz, z, KIND: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """activation'(z) · dz, in float32; what relu and relu6 do not let through is not even NaN."""
    if KIND == "relu":
        out = tl.where(z > 0, dz, 0.0)
    elif KIND == "relu6":
        out = tl.where((z > 0) & (z < 6), dz, 0.0)
    elif KIND == "leaky_relu":
        out = dz * tl.where(z > 0, 1.0, NEGATIVE_SLOPE)
    elif KIND == "silu":
        gate = tl.sigmoid(z)
        out = dz * (gate * (1 + z * (1 - gate)))
    elif KIND == "gelu" or KIND == "gelu_exact" or KIND == "mish":
        near = bounded(z)
        gate, slope = gate_of(near, KIND)
        out = dz * (gate + near * slope)
    elif KIND == "elu":
        out = dz * tl.where(z > 0, 1.0, tl.exp(z))
    elif KIND == "sigmoid":
        y = tl.sigmoid(z)
        out = dz * (y * (1 - y))
    elif KIND == "tanh":
        u = tl.exp(-2 * tl.abs(z))
        out = dz * (4 * u / ((1 + u) * (1 + u)))
    else:
        tl.static_assert(KIND == "hard_swish")
        out = dz * tl.where(z < -3, 0.0, tl.where(z > 3, 1.0, (2 * z + 3) * (1 / 6)))
    return out


@triton.jit
def bounded(z):
    return tl.where(z < LOWEST, LOWEST, tl.where(z > HIGHEST, HIGHEST, z))


@triton.jit
def gate_of(z, KIND: tl.constexpr):
    """(gate(z), its derivative) of an activation z · gate(z)."""
    if KIND == "gelu":
        by = z * GELU_SLOPE * (1 + z * z * GELU_CUBE)
        u = tl.exp(-tl.abs(by))
        above = 1 / (1 + u)
        gate = tl.where(by < 0, u * above, above)  # sigmoid(by)
        slope = u * above * above * GELU_SLOPE * (1 + 3 * (z * z * GELU_CUBE))  # not 1 − gate, which cancels
    elif KIND == "gelu_exact":
        density = tl.exp(-0.5 * z * z) * DENSITY
        gate, slope = normal_cdf(z, density), density
    else:
        tl.static_assert(KIND == "mish")
        s = tl.sigmoid(z)
        r = 1 - s
        gate = s * (1 + r) / (1 + r * r)
        slope = 4 * s * (r / (1 + r * r)) * (r / (1 + r * r))
    return gate, slope


@triton.jit
def normal_cdf(z, density):
    """To 2e-7, without a branch; Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.2.17."""
    t = 1 / (1 + 0.2316419 * tl.abs(z))
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    return tl.where(z < 0, density * series, 1 - density * series)


@triton.jit
def expm1(z):
    """eᶻ − 1 for z ≤ 0, to a few units in the last place; near 0, where that would cancel, by its series."""
    series = z * (1 + z * (1 / 2 + z * (1 / 6 + z * (1 / 24 + z * (1 / 120 + z * (1 / 720))))))
    return tl.where(z > -0.25, series, tl.exp(z) - 1)
