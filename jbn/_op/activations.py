"""The activations the op applies itself, each with its derivative, from the value before it.

A plan, a row of measurements and whatever else tells one from another know an activation by one string: its name, or
"leaky_relu(0.2)" where the slope is not the usual one. `kernels/activations.py` has the same ones for kernels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NEGATIVE_SLOPE = 0.01  # of leaky_relu below zero, as in Flax and PyTorch
LOWEST, HIGHEST = -100, 20  # beyond them a gate is 0 or 1 but for rounding
GELU_SLOPE, GELU_CUBE = math.sqrt(8 / math.pi), 0.044715


class Activation(NamedTuple):
    value: Callable[[jax.Array], jax.Array]
    slope: Callable[[jax.Array], jax.Array]  # bool where it is 0 or 1: what is not let through is not even NaN


def _silu_slope(z):
    gate = jax.nn.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _hard_swish_slope(z):
    return jnp.where(z < -3, 0, jnp.where(z > 3, 1, (2 * z + 3) / 6))


def _sigmoid_slope(z):
    y = jax.nn.sigmoid(z)
    return y * (1 - y)


def _leaky_relu(below: float) -> Activation:
    return Activation(lambda z: jnp.where(z > 0, z, below * z), lambda z: jnp.where(z > 0, 1, below).astype(z.dtype))


def _gated(gate: Callable, gate_slope: Callable) -> Activation:
    """z · gate(z), of a gate from 0 to 1, which far out is taken as there: nothing overflows, and no 0 meets an inf."""

    def bounded(z):
        return jnp.where(z > HIGHEST, HIGHEST, jnp.maximum(z, LOWEST))

    def value(z):
        near = bounded(z)
        return jnp.where(z > HIGHEST, z, near * gate(near))

    def slope(z):
        near = bounded(z)
        return gate(near) + near * gate_slope(near)

    return Activation(value, slope)


def _gelu_argument(z):
    return GELU_SLOPE * z * (1 + GELU_CUBE * z * z)


def _gelu_gate(z):
    """½ (1 + tanh(√(2/π) (z + 0.044715 z³)))."""
    return jax.nn.sigmoid(_gelu_argument(z))


def _gelu_gate_slope(z):
    by = _gelu_argument(z)
    return jax.nn.sigmoid(by) * jax.nn.sigmoid(-by) * GELU_SLOPE * (1 + 3 * GELU_CUBE * z * z)


def _normal_cdf(z):
    return 0.5 * lax.erfc(-math.sqrt(0.5) * z)


def _normal_density(z):
    return math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * z * z)


def _mish_gate(z):
    """tanh(log(1 + eᶻ)) = (1 − r²) / (1 + r²), r = 1 / (1 + eᶻ)."""
    s = jax.nn.sigmoid(z)
    r = 1 - s
    return s * (1 + r) / (1 + r * r)


def _mish_gate_slope(z):
    s = jax.nn.sigmoid(z)
    r = 1 - s
    return 4 * s * jnp.square(r / (1 + r * r))


ACTIVATIONS = {
    "relu": Activation(lambda z: jnp.maximum(z, 0), lambda z: z > 0),
    "relu6": Activation(lambda z: jnp.clip(z, 0, 6), lambda z: (z > 0) & (z < 6)),
    "leaky_relu": _leaky_relu(NEGATIVE_SLOPE),
    "silu": Activation(lambda z: z * jax.nn.sigmoid(z), _silu_slope),
    "hard_swish": Activation(lambda z: z * jnp.clip(z + 3, 0, 6) / 6, _hard_swish_slope),
    "gelu": _gated(_gelu_gate, _gelu_gate_slope),
    "gelu_exact": _gated(_normal_cdf, _normal_density),
    "mish": _gated(_mish_gate, _mish_gate_slope),
    "elu": Activation(lambda z: jnp.maximum(z, 0) + jnp.expm1(jnp.minimum(z, 0)), lambda z: jnp.exp(jnp.minimum(z, 0))),
    "sigmoid": Activation(jax.nn.sigmoid, _sigmoid_slope),
    "tanh": Activation(jnp.tanh, lambda z: 1 - jnp.square(jnp.tanh(z))),
}


def encoded(name: str | None, negative_slope: float) -> str | None:
    """The string of an activation; leaky_relu without a slope is relu, and None none."""
    if name != "leaky_relu" or negative_slope == NEGATIVE_SLOPE:
        return name
    return f"leaky_relu({negative_slope!r})" if negative_slope else "relu"


def decoded(string: str | None) -> tuple[str | None, float]:
    """Name and negative slope of an activation."""
    if string is None or string in ACTIVATIONS:
        return string, NEGATIVE_SLOPE
    name, _, slope = string.removesuffix(")").partition("(")
    return name, float(slope)


def activation(string: str) -> Activation:
    """What an activation computes."""
    return ACTIVATIONS[string] if string in ACTIVATIONS else _leaky_relu(decoded(string)[1])
