"""Count, mean and squared deviations of each channel: what batch norm needs from data, and the state they give."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike

from jbn._functions.batch_norm import BNState
from jbn._functions.checks import check_axis, check_input, check_mask, check_names
from jbn._op import pieces
from jbn._op.merging import Moments, merge_stream, merge_two
from jbn._op.partition import like
from jbn._op.plan import Plan, compute_dtype, row_count
from jbn._op.sync import Sync, splittable


def moments(
    x: ArrayLike, *, axis: int = -1, mask: ArrayLike | None = None, axis_name: str | Sequence[str] | None = None
) -> Moments:
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
    plan = Plan(check_axis(axis, x), 0, 1, True, None, compute_dtype(x.dtype), Sync(), splittable(), None)
    plan = plan._replace(sync=check_names(axis_name, None))
    mask = like(check_mask(mask, x), x)
    out = pieces.synchronise(plan, pieces.local_moments(plan, x, mask))
    count = row_count(plan, x) * plan.sync.members if mask is None else out.count
    count = jnp.asarray(count, out.mean.dtype)
    return Moments(count, out.mean, out.var * count)


def merge(*parts: Moments) -> Moments:
    """Moments of the union of disjoint parts; of none, an error, since their channels are unknown.

    With δ = mean_b − mean_a and n = n_a + n_b: mean = mean_a + δ·n_b/n, m2 = m2_a + m2_b + δ²·n_a·n_b/n
    (Chan, Golub, LeVeque 1979, eq. 2.1). Exact to rounding in any order and grouping; of many parts neighbours merge
    first, so that rounding grows with the logarithm of their number. Added one by one to a total, as a `scan`'s carry
    is, parts of 1/2²⁴ of its count and less are lost in float32: merge such parts among themselves before.

    Raises:
      TypeError, ValueError: without arguments, or for one that is not `Moments` of the same channels.
    """
    for part in parts:
        if not isinstance(part, Moments):
            raise TypeError(f"merge got a {type(part).__name__}, expected jbn.Moments: call merge(*parts) for a list")
        if jnp.shape(part.mean) != jnp.shape(parts[0].mean):
            raise ValueError(
                f"merge got means of shapes {jnp.shape(parts[0].mean)} and {jnp.shape(part.mean)}, expected the same "
                "channels in each: take all moments along the same axis"
            )
    total = merge_stream(parts, merge_two)
    if total is None:
        raise ValueError("merge got no moments: give at least one, the channels of nothing are unknown")
    return total


def population_state(moments: Moments, unbiased: bool = False) -> BNState:
    """The state of exact statistics: mean = Σx / n and var = Σ(x − mean)² / n of all that `moments` saw.

    Args:
      moments: of the data set, as `jbn.moments` gives them for one array and `jbn.merge` for several.
      unbiased: var = Σ(x − mean)² / max(n − 1, 1) instead, as Ioffe and Szegedy do and PyTorch stores.

    Returns:
      `BNState`, vectors `(C,)` in the moments' dtype. A channel of which nothing was seen gets mean 0 and var 1, as
      from `bn_init`.

    Raises:
      TypeError: if `moments` is not `Moments`.

    Source: Ioffe, Szegedy (2015), Batch Normalization, algorithm 2, step 10 (https://arxiv.org/abs/1502.03167),
    with one variance over all values in place of the mean of the batches' variances.
    """
    if not isinstance(moments, Moments):
        raise TypeError(f"moments is a {type(moments).__name__}, expected jbn.Moments: make it with jbn.moments(x)")
    seen = jnp.asarray(moments.count) > 0
    return BNState(jnp.where(seen, moments.mean, 0), jnp.where(seen, moments.variance(unbiased), 1))
