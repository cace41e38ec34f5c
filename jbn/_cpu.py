"""The op's two reductions in the form that XLA's CPU compiler runs fastest: both results from one pass over x.

Its reductions and its loops have one result each, so that two sums read x twice. Here a loop over corresponding
elements of some large parts of x has complex numbers for its result, whose halves are two partial sums. What is left,
an eighth of the rows or less, is summed by a matrix product with ones: XLA fuses nothing into it, so that what comes
before is computed once.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from jbn import _xla
from jbn._plan import Coefficients, Plan, compute_dtype, row_count

PARTS = range(8, 17)  # how many equal parts rows are cut into: the first of these that divides them
LITTLE = 2**14  # elements of a batch that are reduced as they are
LONG = 2**15  # rows of a part past which the product, which adds them in turn, rounds too often
NEAR = 16  # (mean − pivot)² / var, the factor by which sums of x − pivot multiply rounding, past which they do not do


def moments(plan: Plan, x, mask):
    """`mean, Σ(x − mean)²`, and the count before them where there is a mask.

    From sums of x − pivot and its square; in the channels where these would cancel, what `jbn._xla` does.
    """
    parts = _parts(plan, x)
    if mask is not None or parts is None:
        return _xla.moments(plan, x, mask)
    wide = _in_rows(plan, x.astype(compute_dtype(x.dtype)))
    pivot = _xla.typical_row(wide, (plan.batch,))
    shifted = [part - pivot for part in _cut(wide, parts)]
    total, squares = _totals(_sum(shifted), _sum([jnp.square(v) for v in shifted]))
    shift = total / row_count(plan, x)
    m2 = squares - total * shift
    near = (total * shift <= NEAR * m2) & (m2 < jnp.inf)  # no outlier for a pivot, no NaN, no overflow
    found = jnp.squeeze(pivot, -2) + shift, m2

    def mended():
        return tuple(jnp.where(near, f, e) for f, e in zip(found, _xla.moments(plan, x, None), strict=True))

    return lax.cond(jnp.all(near), lambda: found, mended)


def gradient_sums(plan: Plan, x, coef: Coefficients, residual, mask, dy):
    """`Σ z̄, Σ z̄ · x̂` over the rows of each channel, where z̄ = activation'(z) · ȳ."""
    parts = _parts(plan, x)
    if mask is not None or parts is None:
        return _xla.gradient_sums(plan, x, coef, residual, mask, dy)
    view = plan._replace(channel=plan.batch + 1)
    cut = [[None] * parts if v is None else _cut(_in_rows(plan, v), parts) for v in (x, residual, dy)]
    pairs = [_xla.cotangent(view, x, coef, residual, None, dy)[:2] for x, residual, dy in zip(*cut, strict=True)]
    total, product = _totals(_sum([dz for dz, _ in pairs]), _sum([dz * centred for dz, centred in pairs]))
    return total, product * lax.rsqrt(coef.spread / plan.count + coef.epsilon)


def _parts(plan: Plan, x) -> int | None:
    """How many parts rows are cut into, if that can be and is worth it."""
    count = row_count(plan, x)
    if plan.channel < x.ndim - 1 or count * x.shape[-1] <= LITTLE:
        return None
    return next((n for n in PARTS if count % n == 0 and count // n <= LONG), None)


def _in_rows(plan: Plan, x):
    """x as `(*batch, rows, C)`."""
    return x.reshape(*x.shape[: plan.batch], row_count(plan, x), x.shape[-1])


def _cut(x, parts: int):
    return jnp.split(x, parts, -2)


def _totals(a, b):
    """Both summed over rows."""
    both = lax.complex(a, b)
    both = jnp.ones(both.shape[-2], both.dtype) @ both
    return both.real, both.imag


def _sum(values: Sequence):
    """By pairs."""
    half = len(values) // 2
    return _sum(values[:half]) + _sum(values[half:]) if half else values[0]
