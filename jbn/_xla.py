"""The arithmetic of batch norm in jax.numpy: one function per piece of the op.

Shapes: x, residual, tangents and cotangents are `(*batch, *dims)` with the channels at `plan.channel`; vectors are
`(*batch, C)`; a mask has x's rank and may be 1 along any axis. Arithmetic is float32, or float64 for float64.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbn._activations import ACTIVATIONS
from jbn._collectives import Sync, add_across


class Plan(NamedTuple):
    """What is fixed at tracing; hashable."""

    channel: int  # position of the channel axis in x
    batch: int  # leading axes of x, each index of which is a batch of its own
    count: int  # divides `Coefficients.spread` and sums; 1 where these are divided already
    centred: bool  # statistics are x's own, so derivatives flow through them
    activation: str | None
    dtype: jnp.dtype  # of y
    sync: Sync


class Coefficients(NamedTuple):
    """The vectors of the affine map: y = scale · (x − mean) / √(spread / plan.count + epsilon) + bias."""

    mean: jax.Array  # (*batch, C)
    spread: jax.Array  # (*batch, C)
    weight: jax.Array | None  # (*batch, C), 1 / count where the count is data and `spread` divided already
    epsilon: jax.Array  # (*batch, 1)
    scale: jax.Array | None  # (*batch, C)
    bias: jax.Array | None  # (*batch, C)


def compute_dtype(dtype) -> jnp.dtype:
    """float32, or float64 for float64: what statistics and arithmetic use."""
    return jnp.promote_types(dtype, jnp.float32)


def moments(plan: Plan, x, mask):
    """Σ over the rows of each channel: `mean, Σ(x − mean)²`, and the count before them where there is a mask.

    Two passes after a shift by a value of the channel itself, so that nothing cancels: the mean is taken of
    x − pivot, which is exact for a constant channel whatever the constant.
    """
    axes = _rows(plan, x.ndim)
    x = x.astype(compute_dtype(x.dtype))
    if mask is None:
        rows = math.prod(x.shape[a] for a in axes)
        pivot = _typical_row(x, axes)
        mean = pivot + _total(x - pivot, axes) / rows
        m2 = _total(jnp.square(x - mean), axes)
        return tuple(_vector(plan, v) for v in (mean, m2))
    # what the mask is 1 along counts as often as x has entries there
    repeats = math.prod(x.shape[a] for a in axes if mask.shape[a] == 1)
    count = jnp.sum(mask, axes, keepdims=True, dtype=jnp.int32).astype(x.dtype) * repeats
    pivot = jnp.max(x, axes, keepdims=True, where=mask, initial=-jnp.inf)
    pivot = jnp.where(count > 0, pivot, 0)
    rows = jnp.maximum(count, 1)
    mean = pivot + _total(jnp.where(mask, x - pivot, 0), axes) / rows
    m2 = _total(jnp.where(mask, jnp.square(x - mean), 0), axes)
    count = jnp.broadcast_to(count, mean.shape)
    return tuple(_vector(plan, v) for v in (count, mean, m2))


def apply(plan: Plan, x, coef: Coefficients, residual):
    """y = activation(scale · (x − mean) · rstd + bias + residual)."""
    z, _, _ = _linear(plan, x, coef, residual)
    if plan.activation is not None:
        z = ACTIVATIONS[plan.activation].value(z)
    return (z.astype(plan.dtype),)


def tangent(plan: Plan, x, coef: Coefficients, residual, mask, moved):
    """The derivative of y along `moved = (ẋ, ṡcale, ḃias, ṙesidual)`, any of which may be None.

    ẏ = activation'(z) · [scale · rstd · (ẋ − mean(ẋ) − x̂ · mean(x̂ · ẋ)) + x̂ · ṡcale + ḃias + ṙesidual], where the
    means are taken over what the statistics were taken of; they vanish where the statistics are given.
    """
    dx, dscale, dbias, dresidual = moved
    z, xhat, slope = _linear(plan, x, coef, residual, mask)
    out = jnp.zeros_like(z)
    if dx is not None:
        dx = dx.astype(z.dtype)
        if plan.centred:
            axes = _rows(plan, x.ndim)
            seen = dx if mask is None else jnp.where(mask, dx, 0)
            first, second = (_vector(plan, _total(v, axes)) for v in (seen, seen * xhat))
            first, second = add_across((first, second), plan.sync)
            first, second = (_spread(plan, _mean(plan, coef, v), x.ndim) for v in (first, second))
            dx = dx - (first + xhat * second)
        out += dx * slope
    if dscale is not None:
        out += xhat * _spread(plan, dscale, x.ndim)
    if dbias is not None:
        out += _spread(plan, dbias, x.ndim)
    if dresidual is not None:
        out += dresidual.astype(z.dtype)
    return ((out * _slope(plan, z)).astype(plan.dtype),)


def gradient_sums(plan: Plan, x, coef: Coefficients, residual, mask, dy):
    """`Σ z̄, Σ z̄ · x̂` over the rows of each channel, where z̄ = activation'(z) · ȳ."""
    z, xhat, _ = _linear(plan, x, coef, residual, mask)
    dz = dy.astype(z.dtype) * _slope(plan, z)
    axes = _rows(plan, x.ndim)
    return tuple(_vector(plan, _total(v, axes)) for v in (dz, dz * xhat))


def gradient_input(plan: Plan, x, coef: Coefficients, residual, mask, dy, sums):
    """x̄ = scale · rstd · (z̄ − [mask] · (Σz̄ + x̂ · Σz̄x̂) / count), and z̄ behind it where there is a residual."""
    z, xhat, slope = _linear(plan, x, coef, residual, mask)
    dz = dy.astype(z.dtype) * _slope(plan, z)
    dx = dz
    if plan.centred:
        first, second = (_spread(plan, _mean(plan, coef, v), x.ndim) for v in sums)
        pull = first + xhat * second
        dx = dz - (pull if mask is None else jnp.where(mask, pull, 0))
    dx = (dx * slope).astype(x.dtype)
    return (dx,) if residual is None else (dx, dz.astype(residual.dtype))


def _linear(plan: Plan, x, coef: Coefficients, residual, mask=None):
    """`z, x̂, scale · rstd`: the value before the activation, the normalised input, and dz/dx.

    A masked position that is not finite stands for x̂ = 0, so that it reaches no other position in a derivative.
    """
    dtype = coef.mean.dtype
    mean, rstd = coef.mean, lax.rsqrt(coef.spread / plan.count + coef.epsilon)
    slope = rstd if coef.scale is None else rstd * coef.scale
    mean, rstd, slope = (_spread(plan, v, x.ndim) for v in (mean, rstd, slope))
    x = x.astype(dtype)
    if mask is not None:
        x = jnp.where(mask | jnp.isfinite(x), x, mean)
    centred = x - mean
    z = centred * slope
    if coef.bias is not None:
        z += _spread(plan, coef.bias, x.ndim)
    if residual is not None:
        residual = residual.astype(dtype)
        z += residual if mask is None else jnp.where(mask | jnp.isfinite(residual), residual, 0)
    return z, centred * rstd, slope


def _slope(plan: Plan, z):
    return jnp.ones_like(z) if plan.activation is None else ACTIVATIONS[plan.activation].slope(z)


def _mean(plan: Plan, coef: Coefficients, total):
    return total / plan.count if coef.weight is None else total * coef.weight


def _rows(plan: Plan, ndim: int) -> tuple[int, ...]:
    """The axes that a channel's statistics are taken over."""
    return tuple(a for a in range(plan.batch, ndim) if a != plan.channel)


def _spread(plan: Plan, vector, ndim: int):
    """`(*batch, C)` → x's rank, 1 along the rows."""
    return lax.expand_dims(vector, _rows(plan, ndim))


def _vector(plan: Plan, kept):
    """x's rank, 1 along the rows → `(*batch, C)`."""
    return lax.squeeze(kept, _rows(plan, kept.ndim))


def _total(values, axes):
    return jnp.sum(values, axes, keepdims=True)


def _typical_row(x, axes):
    """The median of the first, middle and last row: equal to a constant channel's value, and no single outlier."""
    if any(x.shape[a] == 0 for a in axes):
        return jnp.zeros([1 if a in axes else n for a, n in enumerate(x.shape)], x.dtype)

    def row(place):
        return lax.slice(
            x,
            [place(n) if a in axes else 0 for a, n in enumerate(x.shape)],
            [place(n) + 1 if a in axes else n for a, n in enumerate(x.shape)],
        )

    first, middle, last = row(lambda n: 0), row(lambda n: n // 2), row(lambda n: n - 1)
    return jnp.maximum(jnp.minimum(first, middle), jnp.minimum(jnp.maximum(first, middle), last))
