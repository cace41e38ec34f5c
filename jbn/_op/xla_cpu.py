"""The op's two reductions in the form that XLA's CPU compiler runs fastest: both results from one pass over x.

Reduced over all rows, two sums are two passes there, or one of scalar code. But rows cut into few parts are added part
to part by one loop with both results, whose few steps the compiler unrolls and vectorises. What is left, a part's rows,
is summed as it is.
"""

import math
from collections.abc import Iterable

import jax.numpy as jnp
from jax import lax

from jbn._op import xla
from jbn._op.plan import Coefficients, Plan, compute_dtype, row_count, rows

LITTLE = 2**15  # elements that are reduced as they are: more loops cost more than they save
FEW = 2**8  # rows whose moments are taken about one of them
FEW_UNIT = 2.0**-5  # `UNIT` of so many: a distance may be twice as far as from the mean
# The axes before the channels are cut into equal parts, of the first number here that divides them. A loop over more
# parts is not unrolled; of fewer, each is longer, and within a part rows are summed the slow way.
PARTS = (*range(8, 15), 7, 6, 5, 4)  # with an activation's derivative in the loop
PLAIN_PARTS = range(32, 11, -1)
HALF_PARTS = range(24, 11, -1)  # each number is converted
UNIT = 2.0**-4  # in which the squares of so many parts' distances add up to what is finite if (x − mean)² is


def moments(plan: Plan, x, mask):
    """`mean, Σ(x − mean)² / count`, and the count before them where there is a mask.

    The i-th rows of all P parts make a group, with sums s, q of its distances d from its first row and their squares.
    Its own Σ(x − mean)² = q − s²/P cancels by no more than P times rounding, as q ≤ P · (q − s²/P) with one d = 0.
    Groups then merge (Chan, Golub, LeVeque 1979) about the mean of all, so that nothing cancels.
    """
    parts = _parts(plan, x, _plain(x))
    if mask is None and parts is None and 0 < row_count(plan, x) <= FEW:
        return _moments_of_few(plan, x)
    if mask is not None or parts is None:
        behind = x.shape[plan.channel + 1 :]
        if mask is None and len(behind) > 1:  # as one axis: loops of few steps over several are not vectorised
            x = x.reshape(*x.shape[: plan.channel + 1], math.prod(behind))
        return xla.moments(plan, x, mask)
    groups, axes = row_count(plan, x) // parts, _within(plan, x)
    cut = _cut(plan, x.astype(compute_dtype(x.dtype)), parts)
    first = lax.slice_in_dim(cut, 0, 1, axis=plan.batch)
    distance = cut - first
    s, q = _add_parts(plan, distance, jnp.square(distance * UNIT))
    first = jnp.squeeze(first, plan.batch)
    pivot = xla.typical_row(first, axes)
    off = first - pivot + s / parts  # a group's mean
    shift = jnp.sum(off / groups, axes, keepdims=True)
    m2 = q - jnp.square(s * (UNIT * parts**-0.5)) + parts * jnp.square((off - shift) * UNIT)  # times UNIT²
    # divided before they are added: what is behind a sum is compiled by itself
    return jnp.squeeze(pivot + shift, axes), jnp.sum(m2 / (groups * parts * UNIT**2), axes)


def _moments_of_few(plan: Plan, x):
    """`moments` of n rows in the fewest loops: sums s, q of their distances d from a typical row and their squares.

    Σ(x − mean)² = q − s²/n. That row is the median of three, so two rows lie as far from the mean as it does, or
    farther: q ≤ (1 + n/2) · (q − s²/n), and no more than that, times rounding, is lost.
    """
    axes, n = rows(plan, x.ndim), row_count(plan, x)
    x = x.astype(compute_dtype(x.dtype))
    pivot = xla.typical_row(x, axes)
    distance = (x - pivot) * FEW_UNIT
    s, q = (jnp.sum(v, axes, keepdims=True) for v in (distance, jnp.square(distance)))
    mean = pivot + s / (n * FEW_UNIT)
    var = (q - s * (s / n)) / (n * FEW_UNIT**2)  # XLA takes factors out of a square, which may be too large then
    return jnp.squeeze(mean, axes), jnp.squeeze(var, axes)


def gradient_sums(plan: Plan, x, coef: Coefficients, residual, mask, dy):
    """`Σ z̄, Σ z̄ · x̂` over the rows of each channel, where z̄ = activation'(z) · ȳ."""
    parts = _parts(plan, x, PARTS if plan.activation else _plain(x))
    if mask is not None or parts is None:
        # of little x, what both passes compute is kept
        above = jnp.greater if x.size <= LITTLE else jnp.greater_equal
        return xla.gradient_sums(plan, x, coef, residual, mask, dy, above)
    axes = _within(plan, x)
    x, residual, dy = (None if v is None else _cut(plan, v, parts) for v in (x, residual, dy))
    cut = plan._replace(channel=plan.batch + 2)
    dz, centred, map_ = xla.cotangent(cut, x, coef, residual, None, dy, jnp.greater_equal)
    total, product = _add_parts(plan, dz, dz * centred)
    rstd = jnp.squeeze(map_.rstd, plan.batch)
    return jnp.sum(total, axes), jnp.sum(product * rstd, axes)


def gradient_sums_keeping(plan: Plan, x, coef: Coefficients, residual, mask, dy):
    """`gradient_sums`, and z̄ in the residual's dtype behind them."""
    sums = gradient_sums(plan, x, coef, residual, mask, dy)
    return *sums, xla.kept_cotangent(plan, x, coef, residual, mask, dy)


def _plain(x) -> Iterable[int]:
    """The numbers for a loop without an activation's derivative."""
    return PLAIN_PARTS if x.dtype.itemsize > 2 else HALF_PARTS


def _parts(plan: Plan, x, numbers: Iterable[int]) -> int | None:
    """How many parts rows are cut into, if that can be and is worth it."""
    if x.size <= LITTLE:
        return None
    before = math.prod(x.shape[plan.batch : plan.channel])
    return next((n for n in numbers if before % n == 0), None)


def _cut(plan: Plan, x, parts: int):
    """x as `(*batch, parts, rows of a part before the channels, C)`, and the rows behind them, if any, as one axis."""
    before, behind = (math.prod(n) for n in (x.shape[plan.batch : plan.channel], x.shape[plan.channel + 1 :]))
    last = plan.channel == x.ndim - 1  # a loop over an axis of 1 would not be vectorised
    shape = (*x.shape[: plan.batch], parts, before // parts, x.shape[plan.channel])
    return x.reshape(shape if last else (*shape, behind))


def _within(plan: Plan, x) -> tuple[int, ...]:
    """The axes of a part's own rows, once the parts are added."""
    return (plan.batch,) if plan.channel == x.ndim - 1 else (plan.batch, plan.batch + 2)


def _add_parts(plan: Plan, *values):
    """Each summed over the parts."""
    zeros = tuple(jnp.zeros((), v.dtype) for v in values)
    return lax.reduce(values, zeros, lambda a, b: tuple(map(lax.add, a, b)), (plan.batch,))
