"""Count, mean and squared deviations of each channel: what batch norm needs from data, and how parts combine.

Moments form a commutative monoid: those of two disjoint parts give those of the whole, and empty ones change nothing.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbn import _pieces
from jbn._check import check_axis, check_input, check_mask, check_names
from jbn._collectives import Sync, gather
from jbn._xla import Plan, compute_dtype


class Moments(NamedTuple):
    """Moments of each channel.

    Attributes:
      count: number of values, `()` where all channels have as many, else `(C,)`.
      mean: Σx / count, `(C,)`; 0 where count is 0.
      m2: Σ(x − mean)², `(C,)`: the sum of squared deviations, in squared units of x.
    """

    count: jax.Array | int
    mean: jax.Array
    m2: jax.Array

    def variance(self, unbiased: bool = False) -> jax.Array:
        """m2 / count, or with `unbiased` m2 / max(count − 1, 1) (Bessel); 0 for an empty channel. Shape `(C,)`."""
        count = jnp.asarray(self.count, self.m2.dtype)
        return self.m2 / jnp.maximum(count - 1 if unbiased else count, 1)


def moments(x, *, axis: int = -1, mask=None, axis_name: str | Sequence[str] | None = None) -> Moments:
    """Moments of every channel of `x`.

    Two passes after a shift by a value of the channel, so the variance never cancels: a constant channel has m2 = 0
    exactly.

    Args:
      x: float array of any rank ≥ 1, channels along `axis`.
      axis: position of the channel axis.
      mask: bool, of x's rank and broadcastable to it; only True positions count.
      axis_name: one or several axes bound by `shard_map`, `pmap` or `vmap`; moments are then of all members' rows.

    Returns:
      `Moments` in float32 (float64 for float64 input), differentiable.

    Raises:
      TypeError, ValueError: for an argument out of contract, naming it.

    Source: Chan, Golub, LeVeque (1979), Updating formulae and a pairwise algorithm for computing sample variances.
    """
    x = check_input(x)
    plan = Plan(check_axis(axis, x), 0, 1, True, None, compute_dtype(x.dtype), Sync())
    names, groups = check_names(axis_name, None)
    local = local_moments(plan, x, check_mask(mask, x))
    out = merge_across(local, Sync(names, groups))
    return out._replace(count=jnp.asarray(out.count, out.mean.dtype))


def merge(*parts: Moments) -> Moments:
    """Moments of the union of disjoint parts; of none, an error, since their channels are unknown.

    With δ = mean_b − mean_a and n = n_a + n_b: mean = mean_a + δ·n_b/n, m2 = m2_a + m2_b + δ²·n_a·n_b/n
    (Chan, Golub, LeVeque 1979, eq. 2.1). Exact to rounding in any order and grouping.

    Raises:
      ValueError: without arguments.
    """
    if not parts:
        raise ValueError("merge got no moments: give at least one, the channels of nothing are unknown")
    return reduce(_merge_two, parts)


def local_moments(plan: Plan, x, mask) -> Moments:
    """Moments of this member's rows, `(*batch, C)`; the count is a Python integer unless a mask makes it data."""
    if mask is None:
        rows = x.size
        for size in (*x.shape[: plan.batch], x.shape[plan.channel]):
            rows = rows // size if size else 0
        return Moments(rows, *_pieces.moments(plan, x, None))
    return Moments(*_pieces.moments(plan, x, mask))


def merge_across(own: Moments, sync: Sync) -> Moments:
    """Moments of all members' rows, by one gather and merges in a fixed order."""
    if not sync.names:
        return own
    static = isinstance(own.count, int)
    every = gather(jnp.stack(own[1:] if static else own), sync)
    members = Moments(own.count, every[:, 0], every[:, 1]) if static else Moments(*jnp.unstack(every, axis=1))
    return merge_along(members)


def merge_along(members: Moments) -> Moments:
    """Merges moments stacked along their first axis, pairwise; a static count is that of each one."""
    size = members.mean.shape[0]
    if size == 1:
        return Moments(
            members.count if isinstance(members.count, int) else members.count[0],
            members.mean[0],
            members.m2[0],
        )
    half = size // 2

    def part(start, stop):
        return Moments(
            members.count if isinstance(members.count, int) else members.count[start:stop],
            members.mean[start:stop],
            members.m2[start:stop],
        )

    merged = merge_along(_merge_two(part(0, half), part(half, 2 * half)))
    return merged if size % 2 == 0 else _merge_two(merged, merge_along(part(size - 1, size)))


def _merge_two(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    if isinstance(count, int):
        weight = b.count / count if count else 0.0
        took_b = a.count == 0
    else:
        weight = b.count / jnp.maximum(count, 1)
        took_b = a.count == 0
    delta = b.mean - a.mean
    # an empty part's mean is arbitrary, so it must not enter even by rounding
    mean = jnp.where(took_b, b.mean, a.mean + delta * weight)
    m2 = jnp.where(took_b, b.m2, a.m2 + b.m2 + jnp.square(delta) * (a.count * weight))
    return Moments(count, mean, m2)
