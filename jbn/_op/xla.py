"""The arithmetic of batch norm in jax.numpy: one function per piece of the op.

Shapes: x, residual, tangents and cotangents are `(*batch, *dims)` with the channels at `plan.channel`; vectors are
`(*batch, C)`; a mask has x's rank and may be 1 along any axis. Arithmetic is float32, or float64 for float64.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbn._op.activations import activation
from jbn._op.plan import Coefficients, Plan, compute_dtype, rows, where
from jbn._op.sync import add_across


def moments(plan: Plan, x, mask):
    """Over the rows of each channel: `mean, Σ(x − mean)² / count`, and the count before them where there is a mask.

    Two passes after a shift by a value of the channel itself, so that nothing cancels: the mean is taken of
    x − pivot, which is exact for a constant channel whatever the constant.
    """
    axes = rows(plan, x.ndim)
    x = x.astype(compute_dtype(x.dtype))
    if mask is None:
        size = math.prod(x.shape[a] for a in axes)
        pivot = lax.stop_gradient(typical_row(x, axes))  # the mean does not depend on it
        mean = pivot + _total(x - pivot, axes) / max(size, 1)
        unit = _unit(pivot, mean)
        var = _total(jnp.square((x - mean) * unit), axes) / (jnp.square(unit) * max(size, 1))
        return _vector(plan, mean), _vector(plan, var)
    # what the mask is 1 along counts as often as x has entries there
    repeats = math.prod(x.shape[a] for a in axes if mask.shape[a] == 1)
    count = jnp.sum(mask, axes, keepdims=True, dtype=jnp.int32).astype(x.dtype) * repeats
    pivot = jnp.max(x, axes, keepdims=True, where=mask, initial=-jnp.inf)
    pivot = lax.stop_gradient(where(count > 0, pivot, 0))
    size = jnp.maximum(count, 1)
    mean = pivot + _total(where(mask, x - pivot, 0), axes) / size
    unit = _unit(pivot, mean)
    # chosen before it is squared: the derivative of a square that is not chosen may be NaN
    var = _total(jnp.square(where(mask, x - mean, 0) * unit), axes) / (jnp.square(unit) * size)
    count = jnp.broadcast_to(count, mean.shape)
    return tuple(_vector(plan, v) for v in (count, mean, var))


def _unit(pivot, mean):
    """A power of two, in which up to 2⁴⁰ squares of x − mean add up to what is finite if each of them is.

    What lies far out has its mean, or else the value that is the pivot, beyond 1; then what it takes from the least
    squares is no more than rounding.
    """
    return where(jnp.maximum(jnp.abs(pivot), jnp.abs(mean)) > 1, jnp.full_like(mean, 2.0**-20), 1)


def apply(plan: Plan, x, coef: Coefficients, residual, mask=None):
    """y = activation(scale · (x − mean) · rstd + bias + residual); at every position, so without the mask."""
    del mask
    return apply_masked(plan, x, coef, residual, None)


def apply_masked(plan: Plan, x, coef: Coefficients, residual, mask):
    """`apply` as derivatives see it: with x̂ = 0 at a masked position that is not finite."""
    map_ = _map(plan, x, coef)
    z = _linear(plan, _centred(x, map_, mask), map_, coef, residual, mask)
    if plan.activation is not None:
        z = activation(plan.activation).value(z)
    return (z.astype(plan.dtype),)


def tangent(plan: Plan, x, coef: Coefficients, residual, mask, moved):
    """The derivative of y along `moved = (ẋ, ṡcale, ḃias, ṙesidual)`, any of which may be None.

    ẏ = activation'(z) · [scale · rstd · (ẋ − mean(ẋ) − x̂ · mean(x̂ · ẋ)) + x̂ · ṡcale + ḃias + ṙesidual], where the
    means are taken over what the statistics were taken of; they vanish where the statistics are given.
    """
    dx, dscale, dbias, dresidual = moved
    map_ = _map(plan, x, coef)
    centred = _centred(x, map_, mask)
    xhat = centred * map_.rstd
    out = jnp.zeros_like(xhat)
    if dx is not None:
        dx = dx.astype(out.dtype)
        out += dx * map_.slope
        if plan.centred:
            axes = rows(plan, x.ndim)
            seen = dx if mask is None else where(mask, dx, 0)
            sums = add_across(tuple(_vector(plan, _total(v, axes)) for v in (seen, seen * xhat)), plan.sync)
            out -= _projection(plan, coef, centred, map_, sums)
    if dscale is not None:
        out += xhat * _spread(plan, dscale, x.ndim)
    if dbias is not None:
        out += _spread(plan, dbias, x.ndim)
    if dresidual is not None:
        out += dresidual.astype(out.dtype)
    return (_through_activation(plan, out, centred, map_, coef, residual, mask).astype(plan.dtype),)


def gradient_sums(plan: Plan, x, coef: Coefficients, residual, mask, dy, above=jnp.greater_equal):
    """`Σ z̄, Σ z̄ · x̂` over the rows of each channel, where z̄ = activation'(z) · ȳ; `above` as `_map` has it."""
    dz, centred, map_ = cotangent(plan, x, coef, residual, mask, dy, above)
    axes = rows(plan, x.ndim)
    return _vector(plan, _total(dz, axes)), _vector(plan, _total(dz * centred, axes) * map_.rstd)


def cotangent(plan: Plan, x, coef: Coefficients, residual, mask, dy, above=jnp.greater):
    """z̄ = activation'(z) · ȳ, x − mean, and the map at x's rank, told apart by `above` as `_map` has it."""
    map_ = _map(plan, x, coef, above)
    dy = _seen(x, dy, mask)
    centred = _centred(x, map_, mask)
    return _through_activation(plan, dy, centred, map_, coef, residual, mask), centred, map_


def gradient_sums_keeping(plan: Plan, x, coef: Coefficients, residual, mask, dy):
    """`gradient_sums`, and z̄ in the residual's dtype behind them."""
    return *gradient_sums(plan, x, coef, residual, mask, dy), kept_cotangent(plan, x, coef, residual, mask, dy)


def kept_cotangent(plan: Plan, x, coef: Coefficients, residual, mask, dy):
    """z̄ in the residual's dtype."""
    return cotangent(plan, x, coef, residual, mask, dy)[0].astype(residual.dtype)


def gradient_input(plan: Plan, x, coef: Coefficients, residual, mask, dy, sums, kept=None):
    """x̄ = scale · rstd · (z̄ − [mask] · (Σz̄ + x̂ · Σz̄x̂) / count), and z̄ behind it where there is a residual.

    z̄ is computed here, whether or not it was `kept`.
    """
    del kept
    dz, centred, map_ = cotangent(plan, x, coef, residual, mask, dy)
    dx = dz * map_.slope
    if plan.centred:
        pull = _projection(plan, coef, centred, map_, sums)
        dx -= pull if mask is None else where(mask, pull, 0)
    dx = dx.astype(x.dtype)
    return (dx,) if residual is None else (dx, dz.astype(residual.dtype))


@jax.custom_jvp
def inverse_std(var, epsilon):
    """1 / √(var + epsilon)."""
    return lax.rsqrt(var + epsilon)


@inverse_std.defjvp
def _inverse_std_jvp(primals, tangents):
    rstd = inverse_std(*primals)
    dvar, depsilon = tangents
    # factor by factor: the cube of 1e-13 is 0, and that of 1e13 infinite
    return rstd, -0.5 * rstd * (rstd * (rstd * (dvar + depsilon)))


class _Map(NamedTuple):
    """The affine map at x's rank, 1 along the rows."""

    mean: jax.Array
    rstd: jax.Array
    slope: jax.Array  # scale · rstd


def _map(plan: Plan, x, coef: Coefficients, above=jnp.greater) -> _Map:
    rstd = inverse_std(coef.var, coef.epsilon)
    slope = rstd if coef.scale is None else rstd * coef.scale
    # This is the mean in any case: the choice only makes x − mean look different in one of the backward's two passes.
    # Of equal expressions XLA would compute one, write it to memory at x's size and read it again; two cost nothing.
    mean = where(above(rstd, 0), coef.mean, 0)
    return _Map(*(_spread(plan, v, x.ndim) for v in (mean, rstd, slope)))


def _seen(x, dy, mask):
    """ȳ; 0 where it is not finite because x, masked, is not: 0 · NaN of a loss that masks y after squaring it."""
    if mask is None:
        return dy
    return where(mask | jnp.isfinite(x) | jnp.isfinite(dy), dy, 0)


def _centred(x, map_: _Map, mask):
    """x − mean; 0 at a masked position that is not finite, so that it reaches no other in a derivative."""
    x = x.astype(map_.mean.dtype)
    if mask is not None:
        x = where(mask | jnp.isfinite(x), x, map_.mean)
    return x - map_.mean


def _linear(plan: Plan, centred, map_: _Map, coef: Coefficients, residual, mask):
    """z: the value before the activation."""
    z = centred * map_.slope
    if coef.bias is not None:
        z += _spread(plan, coef.bias, z.ndim)
    if residual is not None:
        residual = residual.astype(z.dtype)
        z += residual if mask is None else where(mask | jnp.isfinite(residual), residual, 0)
    return z


def _through_activation(plan: Plan, moved, centred, map_: _Map, coef: Coefficients, residual, mask):
    """activation'(z) · moved."""
    moved = moved.astype(centred.dtype)
    if plan.activation is None:
        return moved
    slope = activation(plan.activation).slope(_linear(plan, centred, map_, coef, residual, mask))
    return where(slope, moved, 0) if slope.dtype == bool else moved * slope


def _projection(plan: Plan, coef: Coefficients, centred, map_: _Map, sums):
    """scale · rstd · (mean(v) + x̂ · mean(v · x̂)), from the sums of v and v · x̂."""
    first, second = (_spread(plan, _mean(plan, coef, v), centred.ndim) for v in sums)
    # What can be is multiplied once for a channel, and the first product is that of z: XLA gives a CPU's threads what
    # has more than an operation for a byte, and waking one takes longer than a small layer. All of it once for a
    # channel would leave float32's range, as rstd² does.
    return centred * map_.slope * (map_.rstd * second) + map_.slope * first


def _mean(plan: Plan, coef: Coefficients, total):
    return total / plan.count if coef.weight is None else total * coef.weight


def _spread(plan: Plan, vector, ndim: int):
    """`(*batch, C)` → x's rank, 1 along the rows."""
    return lax.expand_dims(vector, rows(plan, ndim))


def _vector(plan: Plan, kept):
    """x's rank, 1 along the rows → `(*batch, C)`."""
    return lax.squeeze(kept, rows(plan, kept.ndim))


def _total(values, axes):
    return jnp.sum(values, axes, keepdims=True)


def typical_row(x, axes):
    """The median of the first, middle and last row: equal to a constant channel's value, and no single outlier."""
    if any(jax.typeof(x).sharding.spec[a] is not None for a in axes):
        return jnp.max(x, axes, keepdims=True)  # a row of an array sharded by an explicit mesh cannot be cut out
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
