"""Batch renormalization: training sees what inference will, for batches that are small or not independent."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import register_namedtuple_serialization

from jbn._functions.checks import check_between
from jbn._op.normalize import Running, Terms
from jbn._op.pieces import local_moments, synchronise
from jbn._op.plan import Plan, where


@partial(register_namedtuple_serialization, serialized_name="jbn.Renorm")  # in programs that are exported
class Renorm(NamedTuple):
    """Batch renormalization, for `bn_train(…, renorm=Renorm(r_max, d_max))`; numbers, or traced scalars of a schedule.

    With σ_B = √(var_B + epsilon) of the batch and σ = √(var + epsilon) of the state given,

        r = clip(σ_B / σ, 1 / r_max, r_max)         d = clip((mean_B − mean) / σ, −d_max, d_max)
        y = activation(scale · (r · (x − mean_B) / σ_B + d) + bias + residual)

    where r and d are constants for the gradient. Where neither is clipped, y is `bn_eval`'s under the state given, so
    inference sees what training saw. With r_max = 1 and d_max = 0 it is `bn_train` without, bit for bit: begin so, then
    relax both (the paper reaches 3 and 5). Where the bounds are traced it is that still, but to the last rounding of a
    sum with virtual batches, or with a residual and no bias. Each virtual batch has its own r and d; a channel without
    data has r = 1 and d = 0. The state moves as without, and inference is `bn_eval`.

    Attributes:
      r_max: largest correction of the scale, ≥ 1.
      d_max: largest correction of the mean in running standard deviations, ≥ 0.

    Source: Ioffe (2017), Batch Renormalization, algorithm 1 (https://arxiv.org/abs/1702.03275); the running average is
    of the variance, where the paper's is of σ, so that one state serves both.
    """

    r_max: float | jax.Array
    d_max: float | jax.Array


def check_renorm(renorm: Renorm | None) -> Renorm | None:
    """The bounds, or None where nothing may be corrected."""
    if renorm is None:
        return None
    if not isinstance(renorm, Renorm):
        raise TypeError(
            f"renorm is {renorm!r}, expected None or bounds as jbn.Renorm(r_max, d_max): give e.g. jbn.Renorm(3.0, 5.0)"
        )
    r_max = check_between("r_max", renorm.r_max, 1, float("inf"))
    d_max = check_between("d_max", renorm.d_max, 0, float("inf"))
    known = isinstance(r_max, float | int) and isinstance(d_max, float | int)
    return None if known and r_max == 1 and d_max == 0 else Renorm(r_max, d_max)


def corrected(renorm: Renorm, plan: Plan, x: jax.Array, terms: Terms, mask, running: Running) -> Terms:
    """The scale and bias that make r · x̂ + d of x̂; `jit` computes the statistics once, for this and for x̂."""
    seen = synchronise(plan, local_moments(plan, lax.stop_gradient(x), mask))
    some = jnp.asarray(seen.count) > 0  # where nothing is seen, r = 1 and d = 0
    mean, var = where(some, seen.mean, running.mean), where(some, seen.variance(), running.var)
    std, running_std = (jnp.sqrt(v + terms.epsilon) for v in (var, running.var))
    r_max, d_max = (jnp.asarray(v).astype(std.dtype) for v in renorm)
    # without room for a correction there is none, even where the state is NaN
    r = where(r_max > 1, jnp.clip(std / running_std, 1 / r_max, r_max), 1)
    d = where(d_max > 0, jnp.clip((mean - running.mean) / running_std, -d_max, d_max), 0)
    r, d = lax.stop_gradient((r, d))
    scale, bias = terms.scale, terms.bias
    shift = d if scale is None else scale * d
    return terms._replace(scale=r if scale is None else scale * r, bias=shift if bias is None else bias + shift)
