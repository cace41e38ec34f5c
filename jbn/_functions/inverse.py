"""Batch norm undone: parameters that make it the identity, and the way back from its output to its input."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbn._functions import checks
from jbn._functions.batch_norm import BNParams, BNState
from jbn._functions.eager import one_program
from jbn._op.plan import compute_dtype


def identity_params(state: BNState, *, epsilon: float | jax.Array = 1e-5) -> BNParams:
    """Parameters with which `bn_eval` under `state` returns x: scale = √(var + epsilon), bias = mean.

    Args:
      state: vectors `(C,)`.
      epsilon: the one that `bn_eval` will be given.

    Returns:
      `BNParams` of the state's dtypes (half types widen to float32). With the statistics of a batch as `state` the
      same holds for `bn_train`.

    Raises:
      TypeError, ValueError: for an argument out of contract, naming it.

    Source: Ioffe, Szegedy (2015), Batch Normalization, section 3: γ = √Var[x] and β = E[x] "recover the original
    activations" (https://arxiv.org/abs/1502.03167).
    """
    epsilon = checks.check_between("epsilon", epsilon, 0, float("inf"))
    checks.check_vectors("state", state, BNState, *_only(state))
    mean, var = (jnp.asarray(v).astype(compute_dtype(jnp.result_type(v))) for v in state)
    return BNParams(jnp.sqrt(var + jnp.asarray(epsilon).astype(var.dtype)), mean)


def denormalize(
    params: BNParams, state: BNState, y: ArrayLike, *, axis: int = -1, epsilon: float | jax.Array = 1e-5
) -> jax.Array:
    """The x of which `bn_eval` makes y: x = (y − bias) · √(var + epsilon) / scale + mean.

    Args:
      params: `BNParams`, vectors `(C,)` or None.
      state: `BNState`, vectors `(C,)`. That of one batch's statistics undoes `bn_train` on that batch.
      y: floats of any rank ≥ 1, C channels along `axis`, before any residual or activation.
      axis: position of the channels.
      epsilon: the one that made y.

    Returns:
      Array of y's shape and dtype, computed in float32 (float64 for float64). A channel with scale 0 kept nothing of
      its x: there it is ±∞ or NaN.

    Raises:
      TypeError, ValueError: for an argument out of contract, naming it.
    """
    y = checks.check_input(y)
    channel = checks.check_axis(axis, y)
    checks.check_vectors("params", params, BNParams, y.shape[channel], y, axis)
    checks.check_vectors("state", state, BNState, y.shape[channel], y, axis)
    return _denormalize(channel, params, state, y, checks.check_between("epsilon", epsilon, 0, float("inf")))


@partial(one_program, static_argnums=0)
def _denormalize(channel, params, state, y, epsilon):
    kind = compute_dtype(y.dtype)
    others = tuple(a for a in range(y.ndim) if a != channel)

    def spread(vector):
        return lax.expand_dims(jnp.asarray(vector).astype(kind), others)

    std = jnp.sqrt(spread(state.var) + jnp.asarray(epsilon).astype(kind))
    x = y.astype(kind)
    if params.bias is not None:
        x -= spread(params.bias)
    x *= std if params.scale is None else std / spread(params.scale)
    return (x + spread(state.mean)).astype(y.dtype)


def _only(state):
    """The channels that a state has by itself, as `check_vectors` asks for them."""
    mean = jnp.asarray(getattr(state, "mean", ()))
    return mean.size, mean, -1
