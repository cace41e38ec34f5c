"""The differentiable op: batch norm of x, in training and with given statistics.

The derivative of either is one linear map of `(ẋ, ṡcale, ḃias, ṙesidual)` (`pieces.tangent`); reverse mode is its
transpose, and higher derivatives differentiate the pieces' plain definitions. So every transformation of JAX applies,
and in each of them the passes over tensors of x's size are the pieces.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from jbn._op import pieces
from jbn._op.merging import Statistics
from jbn._op.plan import Coefficients, Plan, where
from jbn._op.xla import inverse_std


class Running(NamedTuple):
    """The running statistics, `(*batch, C)`: what a channel without data is normalised with."""

    mean: jax.Array
    var: jax.Array


class Terms(NamedTuple):
    """What the affine map takes besides statistics."""

    scale: jax.Array | None  # (*batch, C)
    bias: jax.Array | None  # (*batch, C)
    residual: jax.Array | None  # x's shape
    epsilon: jax.Array  # (*batch, 1)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize_train(plan: Plan, x, terms: Terms, mask, running: Running):
    """`(y, (count, mean, var))`: x normalised with its own statistics, and these."""
    seen = pieces.synchronise(plan, pieces.local_moments(plan, x, mask))
    plan, coef = _coefficients(plan, seen, terms, running)
    (y,) = pieces.apply(plan, x, coef, terms.residual, mask)
    return y, _as_arrays(seen)


@partial(normalize_train.defjvp, symbolic_zeros=True)
def _normalize_train_jvp(plan, primals, tangents):
    x, terms, mask, running = primals
    dx, moved, _, _ = tangents
    # named here, and only here, do the names reach `jax.checkpoint`: kept, they spare the reduction
    x = checkpoint_name(x, "bn_input")
    seen = pieces.synchronise(plan, pieces.local_moments(plan, x, mask))
    seen = seen._replace(mean=checkpoint_name(seen.mean, "bn_stats"), var=checkpoint_name(seen.var, "bn_stats"))
    if not isinstance(seen.count, int):
        seen = seen._replace(count=checkpoint_name(seen.count, "bn_stats"))
    plan, coef = _coefficients(plan, seen, terms, running)
    (y,) = pieces.apply(plan, x, coef, terms.residual, mask)
    dy = _tangent_of_y(plan, x, coef, terms, mask, dx, moved)
    seen = _as_arrays(seen)
    return (y, seen), (dy, jax.tree.map(zero_from_primal, seen))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize_eval(plan: Plan, x, terms: Terms, running: Running):
    """x normalised with the statistics given."""
    (y,) = pieces.apply(plan, x, _given(terms, running), terms.residual, None)
    return y


@partial(normalize_eval.defjvp, symbolic_zeros=True)
def _normalize_eval_jvp(plan, primals, tangents):
    x, terms, running = primals
    dx, moved, drunning = tangents
    x = checkpoint_name(x, "bn_input")
    coef = _given(terms, running)
    (y,) = pieces.apply(plan, x, coef, terms.residual, None)
    rstd = inverse_std(running.var, terms.epsilon)
    slope = rstd if terms.scale is None else rstd * terms.scale
    dmean, dvar = (None if _is_symbolic_zero(t) else t for t in drunning)
    # ∂y/∂mean = −scale·rstd and ∂y/∂var = −½·scale·rstd²·x̂, so both move y as a bias and a scale would
    extra_bias = None if dmean is None else -slope * dmean
    extra_scale = None if dvar is None else -0.5 * slope * rstd * dvar
    return y, _tangent_of_y(plan, x, coef, terms, None, dx, moved, extra_scale, extra_bias)


def _tangent_of_y(plan, x, coef, terms, mask, dx, moved, extra_scale=None, extra_bias=None):
    """ẏ, zero tangents left out so that no zeros of x's size are stored."""
    dscale, dbias, dresidual, depsilon = (None if t is None or _is_symbolic_zero(t) else t for t in moved)
    if depsilon is not None:
        rstd = inverse_std(coef.var, coef.epsilon)
        slope = rstd if coef.scale is None else rstd * coef.scale
        extra_scale = _plus(extra_scale, -0.5 * slope * rstd * depsilon)
    dx = None if _is_symbolic_zero(dx) else dx
    linear = (dx, _plus(dscale, extra_scale), _plus(dbias, extra_bias), dresidual)
    if all(t is None for t in linear):
        return jnp.zeros_like(x, plan.dtype)
    (dy,) = pieces.tangent(plan, x, coef, terms.residual, mask, linear)
    return dy


def _coefficients(plan: Plan, seen: Statistics, terms: Terms, running: Running) -> tuple[Plan, Coefficients]:
    """The map of x's own moments; a channel that saw nothing takes the running statistics."""
    if isinstance(seen.count, int) and seen.count:
        plan = plan._replace(count=seen.count)
        return plan, Coefficients(seen.mean, seen.var, None, terms.epsilon, terms.scale, terms.bias)
    count = jnp.broadcast_to(jnp.asarray(seen.count, seen.mean.dtype), seen.mean.shape)
    weight = where(count > 0, 1 / jnp.maximum(count, 1), 0)
    mean = where(count > 0, seen.mean, running.mean)
    var = where(count > 0, seen.var, running.var)
    return plan, Coefficients(mean, var, weight, terms.epsilon, terms.scale, terms.bias)


def _as_arrays(seen: Statistics) -> Statistics:
    return seen._replace(count=jnp.full_like(seen.mean, seen.count) if isinstance(seen.count, int) else seen.count)


def _given(terms: Terms, running: Running) -> Coefficients:
    return Coefficients(running.mean, running.var, None, terms.epsilon, terms.scale, terms.bias)


def _is_symbolic_zero(tangent) -> bool:
    return isinstance(tangent, SymbolicZero)


def _plus(a, b):
    return b if a is None else a if b is None else a + b
