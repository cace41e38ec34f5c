"""The activations the op applies itself, each with its derivative, from the value before it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LEAK = 0.01  # slope of leaky_relu below zero, as in Flax and PyTorch


class Activation(NamedTuple):
    value: Callable[[jax.Array], jax.Array]
    slope: Callable[[jax.Array], jax.Array]  # bool where it is 0 or 1: what is not let through is not even NaN


def _silu_slope(z):
    gate = jax.nn.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _hard_swish_slope(z):
    return jnp.where(z < -3, 0, jnp.where(z > 3, 1, (2 * z + 3) / 6))


ACTIVATIONS = {
    "relu": Activation(lambda z: jnp.maximum(z, 0), lambda z: z > 0),
    "relu6": Activation(lambda z: jnp.clip(z, 0, 6), lambda z: (z > 0) & (z < 6)),
    "leaky_relu": Activation(
        lambda z: jnp.where(z > 0, z, LEAK * z), lambda z: jnp.where(z > 0, 1, LEAK).astype(z.dtype)
    ),
    "silu": Activation(lambda z: z * jax.nn.sigmoid(z), _silu_slope),
    "hard_swish": Activation(lambda z: z * jnp.clip(z + 3, 0, 6) / 6, _hard_swish_slope),
}
